import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest

from core_jax.rewrite_format import RewriteFormat
from core_jax.rewriter import Rewriter, export_weights
from core_jax.sampler import InProcess, Server
from core_jax.schema import Context
from core_jax.sessions import simulate

ANSWER = 6


@pytest.fixture(scope="module")
def contexts():
    return [each.session.context for each in simulate(0, "dev", 0, 5)]


@pytest.fixture(scope="module")
def format(clips_tokenizer):
    return RewriteFormat(clips_tokenizer, max_watched_tokens=24)


def in_process(format, shape, rows=2) -> InProcess:
    return InProcess(format, shape, max_new_tokens=ANSWER, prompt_tokens=96, rows=rows)


def plain(rewrites) -> list[list[list[int]]]:
    return [[tokens.tolist() for tokens in group] for group in rewrites]


def test_a_rewrite_depends_on_its_context_number_and_seed_alone(format, tiny_shape, contexts, random_model):
    sampler = in_process(format, tiny_shape)
    sampler.sync(random_model(tiny_shape, 1), "phase1")
    numbers = [3, 4, 5, 6, 7]
    found = plain(sampler.sample(contexts, numbers, seed=9, group=4))
    assert [len(group) for group in found] == [4] * 5
    assert all(1 <= len(tokens) <= ANSWER for group in found for tokens in group)
    assert plain(sampler.sample(contexts[3:], numbers[3:], seed=9, group=4)) == found[3:]
    assert plain(sampler.sample(contexts, numbers, seed=8, group=4)) != found
    assert plain(sampler.sample(contexts, [4, *numbers[1:]], seed=9, group=4))[0] != found[0]
    sampler.sync(random_model(tiny_shape, 2), "phase2")
    assert plain(sampler.sample(contexts, numbers, seed=9, group=4)) != found


def test_an_ended_rewrite_keeps_its_end_of_text(format, tiny_shape, contexts, random_model):
    sampler = in_process(format, tiny_shape)
    sampler.sync(random_model(tiny_shape, 1), "phase1")
    for group in sampler.sample(contexts, range(5), seed=0, group=16):
        for tokens in group:
            assert (tokens == format.tokenizer.eos).sum() == (tokens[-1] == format.tokenizer.eos)
            assert tokens[-1] == format.tokenizer.eos or len(tokens) == ANSWER


@pytest.fixture(scope="module")
def transformers_server(tmp_path_factory):
    """`transformers serve`, which loads the folder that a request names."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output, stderr=output, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    try:
        for _ in range(1200):
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(f"http://127.0.0.1:{port}/health").status == 200:
                    break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait()


def server(format, shape, url, folder, **changes) -> Server:
    def export(parameters, folder):
        export_weights(folder, shape, parameters, format.tokenizer)

    return Server(format, url, folder, export, **({"max_new_tokens": ANSWER, "parallel": 2} | changes))


def of_words(parameters, format):
    """Parameters that, when sharp, say letters, digits and blanks: text that is the same when it is encoded again."""
    tokens = [format.tokenizer.decode([token]) for token in range(512)]
    says = np.array([text.replace(" ", "a").isalnum() and text.isascii() for text in tokens])
    says[format.tokenizer.eos] = True
    return parameters | {"embed": parameters["embed"] * says[:, None]}


def test_a_server_that_others_wrote_samples_from_the_policy_of_the_phase(
    transformers_server, format, tiny_shape, contexts, random_model, tmp_path
):
    """The weights are so sharp that sampling at temperature 1 is greedy: what each policy must say is known."""
    told = []
    for phase in (1, 2):
        parameters = of_words(random_model(tiny_shape, phase), format)
        parameters["final_norm"] = parameters["final_norm"] * 1e4
        sampler = server(format, tiny_shape, transformers_server, tmp_path)
        sampler.sync(parameters, f"phase{phase}")
        assert (tmp_path / f"phase{phase}" / "model.safetensors").exists()
        found = sampler.sample(contexts, range(len(contexts)), seed=0, group=2)
        rewriter = Rewriter(tiny_shape, parameters, format, max_new_tokens=ANSWER)
        expected = [
            format.encode_rewrite(rewrite.text, ended=not rewrite.truncated)[:ANSWER].tolist()
            for rewrite in rewriter.rewrite(contexts)
        ]
        assert plain(found) == [[tokens, tokens] for tokens in expected]
        told.append(expected)
    assert told[0] != told[1]


def test_a_server_draws_and_heeds_seeds(transformers_server, format, tiny_shape, contexts, random_model, tmp_path):
    """A policy that knows nothing: greedy decoding, transformers' own default, would say one thing 24 times."""
    parameters = random_model(tiny_shape, 1)
    parameters["final_norm"] = parameters["final_norm"] * 1e-3
    sampler = server(format, tiny_shape, transformers_server, tmp_path)
    sampler.sync(parameters, "flat")
    (drawn,) = plain(sampler.sample(contexts[:1], [0], seed=0, group=24))
    assert len({tuple(tokens) for tokens in drawn}) > 18
    assert plain(sampler.sample(contexts[:1], [0], seed=1, group=2))[0] != drawn[:2]


def test_a_server_of_one_model_is_reloaded_by_a_command(format, tiny_shape, random_model, tmp_path):
    marker, folder = tmp_path / "told", tmp_path / "with a blank; and more"
    sampler = server(
        format, tiny_shape, "http://127.0.0.1:9", folder, reload=f"echo {{folder}} > {marker}", patience=0.0
    )
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9/v1/models"):
        sampler.sync(random_model(tiny_shape, 1), "phase1")
    assert marker.read_text().strip() == str(folder / "phase1")


def test_a_command_that_fails_is_told(format, tiny_shape, random_model, tmp_path):
    sampler = server(format, tiny_shape, "http://127.0.0.1:9", tmp_path, reload="exit 3")
    with pytest.raises(ConnectionError, match=r"sampler\.reload: 'exit 3' ended with status 3"):
        sampler.sync(random_model(tiny_shape, 1), "phase1")


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [{"text": "a"}]}, {"choices": None}, []])
def test_an_answer_that_is_none_is_told(format, tiny_shape, contexts, tmp_path, monkeypatch, answer):
    sampler = server(format, tiny_shape, "http://127.0.0.1:9", tmp_path)
    monkeypatch.setattr(sampler, "_post", lambda path, body: answer)
    with pytest.raises(ConnectionError, match="/v1/completions: an answer without"):
        sampler.sample(contexts[:1], [0], seed=0, group=1)


@pytest.mark.parametrize("takes_ids", [True, False])
def test_prompts_travel_as_the_tokens_of_the_losses_and_as_text_where_those_are_refused(
    format, tiny_shape, contexts, tmp_path, takes_ids, capsys
):
    asked = []

    class Completions(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append(body["prompt"])
            status = 200 if takes_ids or isinstance(body["prompt"], str) else 400
            answer = json.dumps({"choices": [{"text": "chess", "finish_reason": "stop"}]}).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments):
            pass

    typed = Context("chess <|endoftext|> kids")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Completions) as serving:
        threading.Thread(target=serving.serve_forever).start()
        try:
            url = f"http://127.0.0.1:{serving.server_port}"
            sampler = server(format, tiny_shape, url, tmp_path, parallel=1)
            found = sampler.sample([typed, contexts[0]], [0, 1], seed=0, group=2)
        finally:
            serving.shutdown()
    prompts = [tokens.tolist() for tokens in format.encode_prompts([typed, contexts[0]])]
    assert format.tokenizer.eos not in prompts[0]
    if takes_ids:
        assert asked == [prompts[0], prompts[0], prompts[1], prompts[1]]
    else:
        texts = [format.tokenizer.decode(tokens) for tokens in prompts]
        assert asked == [prompts[0], texts[0], texts[0], texts[1], texts[1]]
    assert ("takes no token ids" in capsys.readouterr().err) != takes_ids
    assert plain(found) == [[format.encode_rewrite("chess")[:ANSWER].tolist()] * 2] * 2


def test_a_server_that_is_not_ready_yet_is_waited_for_and_one_that_stays_so_is_told(
    format, tiny_shape, contexts, random_model, tmp_path, monkeypatch
):
    monkeypatch.setattr("core_jax.sampler.time.sleep", lambda seconds: None)
    statuses = {"GET": [503, 502], "POST": [429, 503]}  # then 200

    class Loading(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            left = statuses[self.command]
            answer = json.dumps({"choices": [{"text": "chess", "finish_reason": "stop"}]}).encode()
            self.send_response(left.pop(0) if left else 200, "loading")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_GET

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Loading) as serving:
        threading.Thread(target=serving.serve_forever).start()
        try:
            url = f"http://127.0.0.1:{serving.server_port}"
            sampler = server(format, tiny_shape, url, tmp_path, parallel=1)
            sampler.sync(random_model(tiny_shape, 1), "phase1")
            assert statuses == {"GET": [], "POST": [429, 503]}
            assert plain(sampler.sample(contexts[:1], [0], seed=0, group=1)) == [
                [format.encode_rewrite("chess")[:ANSWER].tolist()]
            ]
            assert not statuses["POST"]
            statuses.update(GET=[503] * 1000, POST=[503] * 1000)
            hurried = server(format, tiny_shape, url, tmp_path, parallel=1, patience=0.05)
            with pytest.raises(ConnectionError, match="/v1/models: HTTP Error 503: loading"):
                hurried.sync(random_model(tiny_shape, 1), "phase2")
            with pytest.raises(ConnectionError, match="/v1/completions: HTTP Error 503: loading"):
                hurried.sample(contexts[:1], [0], seed=0, group=1)
        finally:
            serving.shutdown()


def test_a_refusal_says_what_the_server_said(transformers_server, format, tiny_shape, contexts, random_model, tmp_path):
    sampler = server(format, tiny_shape, transformers_server, tmp_path)
    sampler.sync(random_model(tiny_shape, 1), "gone")
    (tmp_path / "gone" / "config.json").unlink()
    with pytest.raises(ConnectionError, match="/v1/completions: HTTP Error"):
        sampler.sample(contexts[:1], [0], seed=0, group=1)
