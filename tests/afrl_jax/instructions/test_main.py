"""The program: what its three commands leave, and what it refuses."""

import json
import os
import pathlib
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from afrl_jax.data.readers import read_judgments, write_judgments
from afrl_jax.instructions.__main__ import main
from afrl_jax.schema import Document, Judgment, Query, Scale

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
SCALE = Scale(("0", "1", "2", "3"))
EXPLANATION = "Match: red shoes | red shoes | met\nRule: 0\nVerdict: 3"


@pytest.fixture
def folder(tmp_path):
    """Two human judgments; the model below explains the first well."""
    judgments = [
        Judgment(Query("q1", "red shoes"), Document("d1", "Red shoes for men"), 3),
        Judgment(Query("q2", "green hat"), Document("d2", "Blue scarf"), 0),
    ]
    write_judgments(tmp_path / "human", judgments, SCALE)
    return tmp_path / "human"


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            message = {"choices": [{"message": {"content": EXPLANATION}, "finish_reason": "stop"}]}
            body = json.dumps(message | {"usage": {"prompt_tokens": 50, "completion_tokens": 20}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()
    running.server_close()


def explain(folder, output, server, *more):
    paths = [f"--judgments={folder}", f"--output={output}"]
    main(["explain", *paths, f"--base_url={server}", "--language_model=m", *more])


def test_explanations_do_not_take_the_place_of_the_judgments(folder, server, capsys):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit):
        explain(folder, folder, server)
    assert "holds the judgments themselves" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_examples_do_not_take_the_place_of_judgments(folder, server, tmp_path, capsys):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "judgments.jsonl").write_text("{}\n")
    for run in (
        lambda: main(["synthesize", f"--output={folder}", "--per_rule=1"]),
        lambda: explain(tmp_path / "other", folder, server),
    ):
        with pytest.raises(SystemExit) as ended:
            run()
        assert ended.value.code == 2 and "judgments that were not made here" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_examples_need_rules_that_can_be_read(tmp_path, capsys):
    guide = {"task": "Grade.", "scale": {"labels": ["0", "1", "2", "3"], "meanings": []},
             "rules": [{"number": 1, "text": "it is on another subject: 0", "grades": [0]},
                       {"number": 2, "text": "anything else: 3", "grades": [3]}]}  # fmt: skip
    (tmp_path / "guide.json").write_text(json.dumps(guide))
    with pytest.raises(SystemExit) as ended:
        main(["synthesize", f"--output={tmp_path / 'made'}", f"--instruction={tmp_path / 'guide.json'}"])
    assert ended.value.code == 2 and "rule 'it is on another subject: 0' is neither" in capsys.readouterr().err


def test_human_grades_are_explained(folder, server, tmp_path, capsys):
    output = tmp_path / "explained"
    explain(folder, output, server)
    (judgment,) = read_judgments({"path": output}, SCALE)
    assert judgment.query.text == "red shoes" and judgment.grade == 3 and judgment.explanation.facts == ("red shoes",)
    told = capsys.readouterr().err
    assert "2 pairs to explain\nat most 2 calls and " in told and "budget: calls 0 of 500" in told
    assert "calls 2 of 500, tokens 140" in told
    explain(folder, output, server, "--calls=2")  # a rerun costs nothing
    assert "calls 2 of 2" in capsys.readouterr().err


def test_a_model_in_process_explains_too(folder, tiny_model, tmp_path, capsys):
    from lm_jax.weights import write_weights

    model = tiny_model("qwen3")
    write_weights(tmp_path / "model", model.config, model.parameters)
    model.format.tokenizer.save(tmp_path / "model")
    output = tmp_path / "explained"
    with pytest.raises(SystemExit):  # a random model explains nothing
        main(["explain", f"--judgments={folder}", f"--output={output}", f"--language_model={tmp_path / 'model'}"])
    assert "0 of 2 explanations pass" in capsys.readouterr().err
    reasons = [json.loads(line)["reason"] for line in (output / "set_aside.jsonl").read_text().splitlines()]
    assert len(reasons) == 2 and set(reasons) <= {"cut off", "not in the format"}


def test_a_spent_budget_is_an_exit_of_1(folder, server, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        explain(folder, tmp_path / "explained", server, "--calls=1")
    assert ended.value.code == 1 and "budget of calls: 2 are needed and 1 are left" in capsys.readouterr().err
    assert not (tmp_path / "explained" / "language_model_calls").exists()  # nothing was spent on it


EVOLVE = ["--queries=40", "--rounds=1", "--clusters=3", "--edits=2"]


def test_a_spent_budget_can_be_raised_and_the_server_moved(server, tmp_path, capsys):
    command = ["evolve", f"--workdir={tmp_path}", *EVOLVE, "--proposer=language_model", "--language_model=m"]
    with pytest.raises(SystemExit) as ended:
        main([*command, f"--base_url={server}", "--calls=1"])
    told = capsys.readouterr().err
    assert ended.value.code == 1 and "budget of calls" in told and "run again with a larger budget" in told
    first = tmp_path / "evolution" / "language_model" / "round_01.json"
    assert not first.exists()
    main([*command, f"--base_url={server}/", "--calls=50"])
    assert json.loads(first.read_text())["stopped"] == "nothing was proposed"


def test_examples_for_every_rule(tmp_path, capsys):
    main(["synthesize", f"--output={tmp_path / 'made'}", "--per_rule=1"])
    assert len(read_judgments({"path": tmp_path / "made"}, SCALE)) > 60
    assert "acceptance_rate: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["evolve", "--workdir=w", "--dev_new=x"], "give both --dev_new and --dev_replay"),
        (["evolve", "--workdir=w", "--dev_new=x", "--dev_replay=y"], "need --model and --instruction"),
        (["evolve", "--workdir=w", "--model=./absent"], "./absent: neither a model folder"),
        (["evolve", "--workdir=w", "--model=."], "to judge zero-shot it needs --calibration"),
        (["evolve", "--workdir=w", "--calibration=x"], "--calibration and --pairs go with your own judgments"),
        (["evolve", "--workdir=w", "--pairs=9"], "--calibration and --pairs go with your own judgments"),
        (
            ["evolve", "--workdir=w", "--dev_new=x", "--dev_replay=y", "--model=.", "--instruction=i", "--queries=9"],
            "--queries is the size of the built-in world",
        ),
        (["synthesize", "--output=o", "--model=."], "is no relevance model"),
        (["explain", "--judgments=j", "--output=o", "--seed=1"], "unrecognized arguments: --seed=1"),
        (["explain", "--judgments=j", "--output=o", "--model=m"], "--model"),
        (["evolve", "--workdir=w", "--proposer=guess", "--queries=10"], "proposer: 'guess' is unknown"),
        (["evolve", "--workdir=w", "--proposer=language_model", "--queries=10"], "needs base_url and model"),
        (["evolve", "--workdir=w", "--base_url=http://h/v1", "--queries=10"], "mined rules ask no language model"),
        (["evolve", "--workdir=w", "--edits=-1"], "edits: -1 must be at least 1"),
        (["evolve", "--workdir=w", "--p=-3"], "p: -3.0 must be at least 0"),
        (["explain", "--judgments=nowhere", "--output=o", "--base_url=http://h/v1", "--language_model=m"], "nowhere"),
        (["explain", "--judgments=nowhere", "--output=o"], "needs base_url and model"),
    ],
)
def test_what_is_wrong_is_told_with_status_2(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_a_pretrained_model_on_human_judgments(tiny_model, tmp_path, capsys):
    """Zero-shot, calibrated on other queries; dev is split by query. The random model reads nothing, the loop runs."""
    from lm_jax.weights import write_weights

    model = tiny_model("qwen3")
    write_weights(tmp_path / "model", model.config, model.parameters)
    model.format.tokenizer.save(tmp_path / "model")
    guide = {"task": "Grade.", "scale": {"labels": ["1", "2", "3"], "meanings": []}, "rules": []}
    (tmp_path / "guide.json").write_text(json.dumps(guide))
    scale = Scale(("1", "2", "3"))
    for part in ("dev", "held"):
        queries = [Query(f"{part}{number}", f"chess {part} {number}") for number in range(10)]
        documents = [Document(f"{part}{number}", f"{'chess' * (number % 2)} kids {number}") for number in range(4)]
        judgments = [Judgment(q, document, 2 * (k % 2)) for q in queries for k, document in enumerate(documents)]
        write_judgments(tmp_path / part, judgments, scale)
    dev, held = tmp_path / "dev", tmp_path / "held"
    command = ["evolve", f"--workdir={tmp_path / 'run'}", f"--model={tmp_path / 'model'}", f"--dev_new={dev}",
               f"--dev_replay={dev}", f"--instruction={tmp_path / 'guide.json'}", "--rounds=1", "--clusters=1",
               "--edits=1", "--pairs=20"]  # fmt: skip
    for more, told in (([], "needs --calibration"), ([f"--calibration={dev}"], "--calibration shares")):
        with pytest.raises(SystemExit):
            main([*command, *more])
        assert told in capsys.readouterr().err
    command.append(f"--calibration={held}")
    main(command)
    done = json.loads((tmp_path / "run" / "evolution" / "mined" / "round_01.json").read_text())
    assert done["proposals"] or done["stopped"] == "nothing was proposed"
    assert "pairs to grade (56 each)" in capsys.readouterr().err  # 20 of 24 and 16 of 16, 20 to calibrate
    # Another model, and other judgments, under the same paths.
    write_weights(tmp_path / "model", model.config, {name: 2 * value for name, value in model.parameters.items()})
    write_judgments(held, judgments[:8], scale)
    with pytest.raises(SystemExit):
        main(command)
    told = capsys.readouterr().err
    assert "  model_version: '" in told and "  judgments.calibration: '" in told and told.count(" then, '") == 2


def test_a_broken_instruction_is_named(tmp_path, capsys):
    (tmp_path / "guide.json").write_text('{"task": "grade"}')
    with pytest.raises(SystemExit) as ended:
        main(["synthesize", f"--output={tmp_path / 'x'}", f"--instruction={tmp_path / 'guide.json'}"])
    assert ended.value.code == 2 and "guide.json: no instruction: KeyError" in capsys.readouterr().err


def test_the_built_in_world_evolves_without_any_model(tmp_path):
    command = [sys.executable, "-m", "afrl_jax.instructions", "evolve", "--workdir=run", *EVOLVE]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "at most 18 instructions to probe, 8,640 pairs to grade (480 each)" in done.stderr
    metrics = json.loads((tmp_path / "run" / "evolution" / "report" / "metrics.json").read_text())
    assert metrics["full rulebook/macro_f1"] == metrics["full rulebook, held-out wording/macro_f1"] == 1.0
    assert metrics["mined/1/dev_new"] >= metrics["mined/0/dev_new"]
    other = subprocess.run([*command, "--p=0.5"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert other.returncode == 2 and "p: '0.1' then, '0.5' now" in other.stderr
