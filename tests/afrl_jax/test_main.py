"""What the command line says before any work: help, and the name of whatever is wrong."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from afrl_jax import main

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SMOKE = f"--config={REPOSITORY / 'configs/afrl_smoke.py'}"
INSTRUCTION = """--config.instruction={"task": "Judge.", "labels": ("0", "1")}"""


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """A function: arguments -> what a start that is refused with status 2 says; nothing may be left in the workdir."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)

    def start(*arguments: str, config: str = SMOKE) -> str:
        with pytest.raises(SystemExit) as stopped:
            main.main([config, f"--workdir={tmp_path / 'run'}", *arguments])
        assert stopped.value.code == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    return start


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("rl.stepz=3", "unknown config key rl.stepz; did you mean rl.steps?"),
        ("stepz=3", "unknown config key stepz"),
        ("rl.steps=many", "rl.steps: 'many' is a str, expected int"),
        ("rl.steps=0", "rl.steps: 0 must be at least 1"),
        ("sft.learning_rate=-1", "sft.learning_rate: -1.0 must be above 0"),
        ("sft.rows=3", "sft.rows (3) must be a multiple of sft.micro_batches (2)"),
        ("dtype=float16", "dtype: 'float16' is unknown; it is one of float32, bfloat16"),
        ("sft.optimizer=sgd", "sft.optimizer: 'sgd' is unknown; it is one of adamw, muon"),
        ("sft.mixture.trian=1", "sft.mixture.trian: 'trian' is unknown; it is one of calibration, dev, expert, texts"),
        ("text.texts=train", "data.train: a text stage reads a source of format 'clips_text'"),
        ("evaluation.test=texts", "evaluation.test: data.texts has texts, where judged pairs are read"),
        ("rl.prompts_from=texts", "rl.prompts_from: data.texts has texts, where judged pairs are read"),
        ("data.train.documents_per_query=2.5", "data.train: documents_per_query: 2.5 is a float, expected int"),
        ("data.train.queries=x", "data.train: queries: 'x' is a str, expected int"),
        ("data.texts.texts=many", "data.texts: texts: 'many' is a str, expected int"),
        ("data.train.keep=0.5", "data.train: keep: 0.5 is a float, expected tuple[float, float]"),
        ("data.train.keep=(0.9, 0.1)", "data.train: keep: (0.9, 0.1) must be two numbers from 0 to 1, the lower first"),
        ("data.train.explained=no", "data.train: explained: 'no' is a str, expected bool"),
        ("data.train.split=trian", "data.train: split is 'trian'; it is one of train, dev, test"),
        ("data.train.splitt=train", "data.train: judgments() got an unexpected keyword argument 'splitt'"),
        ("data.train.queries=0", "data.train is empty"),
        ("student.shape.layerz=3", "student: unknown config key shape.layerz; did you mean shape.layers?"),
        ("student.shape.embed=12.5", "student: shape.embed: 12.5 is a float, expected int"),
        ("teacher.shape.kv_heads=0", "teacher: kv_heads: 0 must be at least 1"),
        ("teacher.shape.family=llama", "teacher: qk_norm must be False in the family 'llama'"),
        ("student.shape.vocab_size=64", "student: vocab_size 64 is below the tokenizer's, 512"),
        ("teacher.shape={}", "teacher needs one of source, shape, cut; it has none"),
        ("mesh=fsdp=3", "mesh 'fsdp=3' does not cover 1 devices"),
        ('stages=("text",)', "stages text: none trains a grade"),
        ('stages=("distill",)', "distill: distillation comes after the teacher's last stage"),
        ("sft.row_tokens=150", "sft.row_tokens: 150 is too small: in data.train, query 'train-0-"),
        ("teacher.shape.max_positions=100", "teacher: max_positions: 100 is too small: in data.train, query 'train-0-"),
        ("text.row_tokens=40", "text.row_tokens: 40 is too small: in data.texts a text has "),
        (
            INSTRUCTION.removeprefix("--config."),
            "data.calibration: clips are not graded on the scale of the instruction, ('0', '1')",
        ),
    ],
)
def test_a_wrong_config_is_refused_by_name_before_any_work(refused, override, told):
    said = refused(f"--config.{override}")
    assert told in said and said.startswith("error: ") and "Traceback" not in said


def test_a_student_cannot_be_cut_to_more_layers_than_there_are(refused):
    said = refused("--config.student.shape={}", "--config.student.cut=3")
    assert "student: cannot keep 3 of 2 layers" in said


def test_a_model_that_is_not_there_is_refused(refused, tmp_path):
    source = f"--config.teacher.source={tmp_path / 'absent.gguf'}"
    assert 'tokenizer "train" makes tokens that the weights of teacher.source do not know' in refused(
        source, "--config.teacher.shape={}"
    )
    said = refused(source, "--config.teacher.shape={}", "--config.tokenizer=")
    assert f"{tmp_path / 'absent.gguf'}: neither a model folder nor a .gguf file" in said


@pytest.mark.parametrize("argument", ["--stepz=3", "stray", "--config.rl.steps"])
def test_an_unknown_argument_is_refused(refused, argument):
    said = refused(argument)
    assert f"unknown argument {argument}; --config.some.key=value changes a value of the config" in said
    assert said.startswith("usage: python -m afrl_jax.main --config=FILE --workdir=DIR")


def test_a_config_file_that_is_not_there_is_refused(refused):
    assert "there is no file configs/absent.py" in refused(config="--config=configs/absent.py")


def test_every_bad_row_of_the_data_is_named_with_file_line_and_field(refused, tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    rows = {
        "queries": [{"query_id": "q1", "text": "red shoes"}],
        "documents": [{"doc_id": "d1", "title": "Red shoes"}, {"doc_id": "d2", "title": 7}],
        "judgments": [
            {"query_id": "q1", "doc_id": "d1", "grade": "9"},
            {"query_id": "q9", "doc_id": "d1", "grade": "1"},
        ],
    }
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    source = json.dumps({"format": "folder", "path": str(folder)})
    names = ("train", "expert", "calibration", "dev")
    said = refused(INSTRUCTION, *(f"--config.data.{name}={source}" for name in names))
    assert "data.calibration: " in said
    assert f"{folder / 'documents.jsonl'}:2: title: " in said
    assert f"{folder / 'judgments.jsonl'}:1: grade: " in said
    assert f"{folder / 'judgments.jsonl'}:2: query_id: " in said


def test_help_teaches_by_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main(["--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "python -m afrl_jax.main --config=configs/afrl_quickstart.py --workdir=runs/quickstart" in said
    assert "--config.rl.steps=40" in said and "report/report.html" in said and "Exit status" in said


@pytest.mark.parametrize(
    ("number", "status", "told"),
    [
        (signal.SIGINT, 130, r""),
        (signal.SIGTERM, 75, r"SIGTERM: the running step is finished and saved first\n(text: saved at step \d+; )"),
    ],
)
def test_a_stopped_run_says_how_it_continues(tmp_path, number, status, told):
    process = subprocess.Popen(
        [sys.executable, "-m", "afrl_jax.main", SMOKE, f"--workdir={tmp_path / 'run'}", "--config.text.steps=100000"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    log = tmp_path / "run/log.jsonl"
    while process.poll() is None and not log.exists():
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == status, said
    kernels = ("row_attention", "token_logprobs")
    chosen = "".join(f"kernel {name}: xla, as on every cpu\n" for name in kernels)
    assert re.fullmatch(chosen + told + "stopped; the same command continues from the newest checkpoint\n", said)
    if status == 75:  # what it says it saved is there, before any checkpoint was due
        saved = int(re.search(r"saved at step (\d+)", said)[1])
        assert (tmp_path / "run/checkpoints/text" / str(saved)).is_dir()


def test_an_unexpected_error_keeps_its_traceback(tmp_path, monkeypatch, capsys):
    from afrl_jax import recipe

    def broken(self, name, stage, log):
        raise ZeroDivisionError("a defect of ours")

    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(recipe.Recipe, "_train", broken)
    with pytest.raises(ZeroDivisionError, match="a defect of ours"):
        main.main([SMOKE, f"--workdir={tmp_path / 'run'}"])
