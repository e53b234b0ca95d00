"""The client against a server that fails in every way, and against one that this project did not write."""

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest

from afrl_jax.instructions.budget import Budget, BudgetExceeded, Limits, Spent
from afrl_jax.instructions.client import ChatClient, Completion, LanguageModelError, LocalModel

KEY = "sk-very-secret-0123456789"


def answer(text="fine", **usage):
    usage = {"prompt_tokens": 11, "completion_tokens": 3, **usage}
    return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": usage}


class Server(ThreadingHTTPServer):
    """Plays its script, one entry a request: a body to send with 200, (status, body, headers), or a function of the
    handler. When the script is over, it answers with the prompt in capitals."""

    daemon_threads = True

    def __init__(self, script=()):
        self.script, self.requests, self.lock, self.busy, self.most_busy = list(script), [], threading.Lock(), 0, 0
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), body))
            step = self.server.script.pop(0) if self.server.script else None
            self.server.busy += 1
            self.server.most_busy = max(self.server.most_busy, self.server.busy)
        if step is None:
            time.sleep(0.02)
            step = answer(body["messages"][0]["content"].upper())
        with self.server.lock:
            self.server.busy -= 1
        if callable(step):
            return step(self)
        status, content, headers = step if isinstance(step, tuple) else (200, step, {})
        self.send(status, content, headers)

    def send(self, status, content, headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def cut(handler):
    """Promises more than it sends."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.connection.shutdown(socket.SHUT_RDWR)


def silent(handler):
    time.sleep(0.6)


def dripping(handler):
    """Never silent for long, and never done."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(20):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)


@pytest.fixture
def serve():
    started = []

    def start(*script):
        server = Server(script)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture
def connect(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)

    def make(server, **changes):
        waits = []
        settings = {"cache": tmp_path / "cache", "budget": Budget(Limits()), "key_variable": "TEST_KEY", "timeout": 5.0}
        client = ChatClient(server.url, "judge", **(settings | {"sleep": waits.append} | changes))
        client.waits = waits
        return client

    return make


def test_an_answer_comes_with_what_it_took(serve, connect):
    server = serve(answer("grade 2"))
    client = connect(server)
    found = client.complete(["how good?"], max_tokens=9, temperature=0.5, seed=3)
    assert found == [Completion("grade 2", False, 11, 3)]
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body == {
        "model": "judge", "messages": [{"role": "user", "content": "how good?"}], "max_tokens": 9, "temperature": 0.5,
        "seed": 3, "stream": False,
    }  # fmt: skip
    assert client.budget.spent == Spent(1, 14)


def test_an_answer_that_was_cut_off_says_so(serve, connect):
    long = answer()
    long["choices"][0]["finish_reason"] = "length"
    assert connect(serve(long)).complete(["?"], max_tokens=3)[0].truncated


def test_a_rerun_asks_nobody_and_is_exact(serve, connect):
    prompts = [f"prompt {i}" for i in range(7)] + ["prompt 0"]
    server = serve()
    first = connect(server).complete(prompts, max_tokens=5)
    assert [c.text for c in first] == [p.upper() for p in prompts]
    assert len(server.requests) == 7  # equal prompts are one call
    again = connect(server)
    assert again.complete(prompts, max_tokens=5) == first
    assert len(server.requests) == 7 and again.budget.spent == Spent()
    again.complete(prompts[:1], max_tokens=6)  # another request
    assert len(server.requests) == 8


def test_a_damaged_cache_file_is_asked_again(serve, connect, tmp_path):
    server = serve()
    connect(server).complete(["a"], max_tokens=5)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(file.read_text()[:20])
    assert connect(server).complete(["a"], max_tokens=5)[0].text == "A"
    assert len(server.requests) == 2


def test_no_more_calls_at_once_than_allowed(serve, connect):
    server = serve()
    connect(server, concurrency=3).complete([str(i) for i in range(20)], max_tokens=5)
    assert server.most_busy == 3


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ((429, {"error": "slow down"}, {}), "status 429"),
        ((500, {"error": "broken"}, {}), "status 500"),
        ((503, b"<html>busy</html>", {}), "status 503"),
        (b"this is no JSON", "malformed"),
        ({"choices": []}, "malformed"),
        ({"choices": [{"message": {"content": None}}]}, "malformed"),
        ([1, 2], "malformed"),
        (cut, "the connection broke"),
        (silent, "no answer within 0.3 s"),
        (dripping, "no whole answer within 0.3 s"),
    ],
    ids=["429", "500", "503", "no json", "no choice", "no text", "a list", "cut", "timeout", "drip"],
)
def test_what_may_pass_is_tried_again_and_then_told(serve, connect, fault, told):
    client = connect(serve(fault, answer("at last")), timeout=0.3)
    assert client.complete(["?"], max_tokens=5)[0].text == "at last"
    assert len(client.waits) == 1 and 0.5 <= client.waits[0] <= 1.0
    client = connect(serve(fault, fault, fault), timeout=0.3, attempts=3)
    with pytest.raises(LanguageModelError, match=rf"{told}.*\(attempt 3 of 3\)"):
        client.complete(["??"], max_tokens=5)
    assert 1.0 <= client.waits[1] <= 2.0
    assert client.budget.spent.calls == 3


def test_a_server_may_say_how_long_to_wait_but_not_for_ever(serve, connect):
    slow, rude, dated = ((429, {}, {"Retry-After": wait}) for wait in ("7", "86400", "Mon, 01 Jan 2035 00:00:00 GMT"))
    client = connect(serve(slow, rude, dated))
    client.complete(["?"], max_tokens=5)
    assert client.waits[:2] == [7.0, 60.0] and 2 <= client.waits[2] <= 4


def test_a_wrong_request_is_not_tried_again(serve, connect):
    client = connect(serve((401, {"error": f"no such key: {KEY}"}, {})))
    with pytest.raises(LanguageModelError, match=r"status 401.*no such key: \*\*\*"):
        client.complete(["?"], max_tokens=5)
    assert client.waits == [] and client.budget.spent == Spent(1, 0)


NO_TEXT = {"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]}


@pytest.mark.parametrize("refusal", [(400, {"error": f"too long for {KEY}"}, {}), (422, {"error": "no"}, {}), NO_TEXT])
def test_a_prompt_that_is_refused_leaves_the_others_their_answers(serve, connect, tmp_path, refusal):
    times = 3 if refusal is NO_TEXT else 1  # what is no text may be one the next time
    client = connect(serve(answer("first"), *[refusal] * times), concurrency=1, attempts=3)
    found = client.complete(["a", "b", "c"], max_tokens=5)
    assert [one.text for one in found] == ["first", "", "C"] and found[0].refused == found[2].refused == ""
    assert ("no text" if times == 3 else f"status {refusal[0]}") in found[1].refused and KEY not in found[1].refused
    assert len(list((tmp_path / "cache").iterdir())) == 2  # it may be answered another time


def test_a_refused_prompt_that_comes_often_is_one_refused_prompt(serve, connect):
    client = connect(serve((400, {"error": "too long"}, {}), answer("second")), concurrency=1)
    found = client.complete([*["a"] * 12, "b", "a"], max_tokens=5)
    assert [one.text for one in found] == [*[""] * 12, "second", ""] and found[0].refused == found[-1].refused != ""


def test_when_all_are_refused_it_is_the_request(serve, connect):
    refusal = (400, {"error": "no parameter max_tokens"}, {})
    server = serve(*[refusal] * 500)
    for prompts in (["a"], [str(i) for i in range(500)]):
        with pytest.raises(LanguageModelError, match=r"status 400: .*no parameter max_tokens"):
            connect(server).complete(prompts, max_tokens=5)
    assert len(server.requests) < 30


def test_nobody_listening_costs_no_tokens(connect):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        client = connect(type("Address", (), {"url": f"http://127.0.0.1:{unused.getsockname()[1]}"}), attempts=2)
        with pytest.raises(LanguageModelError, match="not reachable"):
            client.complete(["?"], max_tokens=5)
    assert client.budget.spent == Spent(2, 0)


def test_the_budget_stops_before_the_call_and_finished_answers_stay(serve, connect):
    server = serve()
    client = connect(server, budget=Budget(Limits(calls=2)), concurrency=1)
    with pytest.raises(BudgetExceeded):
        client.complete(["a", "b", "c"], max_tokens=5)
    assert len(server.requests) == 2
    assert [c.text for c in connect(server).complete(["a", "b", "c"], max_tokens=5)] == ["A", "B", "C"]
    assert len(server.requests) == 3


def test_the_key_is_nowhere(serve, connect, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    echo = answer(f"you sent {KEY}")
    refusal = (500, "x" * (300 - len(KEY) // 2) + KEY, {})  # what is shown of it ends amid the key
    client = connect(serve(echo, refusal, f"Bearer {KEY}".encode(), refusal), attempts=3)
    first = client.complete(["fine"], max_tokens=5)
    assert client.complete(["fine"], max_tokens=5) == first  # the first answer is what is kept of it
    with pytest.raises(LanguageModelError) as caught:
        client.complete(["not fine"], max_tokens=5)
    seen = "".join(traceback.format_exception(caught.value)) + repr(vars(client)) + caplog.text
    seen += "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    assert KEY[:8] not in seen and "***" in seen and KEY not in first[0].text
    error = caught.value
    while error is not None:
        assert error.__suppress_context__ or error.__context__ is None
        error = error.__cause__


def test_no_key_is_sent_where_there_is_none(serve, connect, monkeypatch):
    monkeypatch.delenv("TEST_KEY")
    server = serve()
    connect(server).complete(["?"], max_tokens=5)
    assert "Authorization" not in server.requests[0][1]


@pytest.mark.parametrize("url", ["http://me:secret@host/v1", "ftp://host", "host/v1", "https://host/v1?key=secret"])
def test_a_bad_address_is_refused_without_repeating_a_secret(tmp_path, url):
    with pytest.raises(ValueError, match="base_url") as caught:
        ChatClient(url, "m", cache=tmp_path, budget=Budget(Limits()))
    assert "secret" not in str(caught.value)


def test_the_projects_own_model_answers_alike_in_any_company(tiny_model, tiny_tokenizer):
    model = tiny_model("qwen3")
    prompts = ["chess for kids", "robots", "sourdough at home: grade it", "?"]
    local = LocalModel(model.config, model.parameters, tiny_tokenizer, template="Query: {prompt}\n", rows=3)
    together = local.complete(prompts, max_tokens=6, temperature=1.0, seed=5)
    alone = [local.complete([prompt], max_tokens=6, temperature=1.0, seed=5)[0] for prompt in prompts]
    assert together == alone
    assert together != local.complete(prompts, max_tokens=6, temperature=1.0, seed=6)
    assert all(c.completion_tokens <= 6 for c in together)
    lengths = [len(tiny_tokenizer.encode(f"Query: {prompt}\n")) for prompt in prompts]
    assert [c.prompt_tokens for c in together] == lengths


@pytest.fixture(scope="module")
def transformers_server(tmp_path_factory):
    """`transformers serve` with a tiny random Llama: (address, model)."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("served") / "tiny"
    words = {word: number for number, word in enumerate(["<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), eos_token_id=0, **sizes)).save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = folder.parent / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(1200):
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield type("Address", (), {"url": f"http://127.0.0.1:{port}/v1"}), str(folder)
    finally:
        process.terminate()
        process.wait()


def test_a_server_that_others_wrote_understands_the_client(transformers_server, tmp_path):
    address, name = transformers_server
    budget = Budget(Limits())
    client = ChatClient(address.url, name, cache=tmp_path, budget=budget, attempts=1)
    found = client.complete(["a b c", "x y"], max_tokens=4)
    assert [completion.prompt_tokens for completion in found] == [3, 2]
    assert all(1 <= completion.completion_tokens <= 4 and completion.text for completion in found)
    assert budget.spent == Spent(2, sum(c.prompt_tokens + c.completion_tokens for c in found))
    assert client.complete(["a b c"], max_tokens=4) == found[:1] and budget.spent.calls == 2
    wrong = ChatClient(address.url, "no/such-model", cache=tmp_path, budget=budget, attempts=1)
    with pytest.raises(LanguageModelError, match="status"):
        wrong.complete(["a"], max_tokens=4)
