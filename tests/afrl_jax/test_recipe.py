"""The whole program on the smoke config: what it leaves, what it compiles, and that being killed changes nothing."""

import collections
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import random
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from afrl_jax import batch_plan, recipe
from afrl_jax.data import clips
from afrl_jax.data.readers import write_judgments
from afrl_jax.label_scorer import CPU_BATCH_TOKENS
from afrl_jax.settings import DistillStage, ModelSettings, RLStage, SFTStage, TextStage, read_settings
from afrl_jax.sft import SFT, TERMS
from afrl_jax.stage_steps import stage_learning_rate
from lm_jax.checkpoint import load_tree
from lm_jax.config import DecoderConfig
from lm_jax.config_file import read_config
from lm_jax.parameters import abstract
from lm_jax.run_folder import RunFolder
from lm_jax.run_log import RunLog

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
STAGES = ("text", "sft", "rl", "distill")
STEPS = 4
# The clock's, not the computation's.
CLOCK = {"time", "seconds", "tokens_per_second"}


def test_an_instruction_does_not_evolve_in_several_processes(tmp_path, monkeypatch):
    """Each would write the same files; said before any data are opened."""
    config = read_config(REPOSITORY / "configs/afrl_rulebooks.py", [])
    settings = read_settings(config)
    assert settings.evolve
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="evolve: an instruction evolves in one process, not in 2"):
        recipe.Recipe(settings, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def run(workdir: pathlib.Path, *arguments: str, death: str = "never", config: str = "afrl_smoke"):
    """One start of the program, see watched_run.py."""
    command = [sys.executable, REPOSITORY / "tests/afrl_jax/watched_run.py", workdir.with_suffix(".events"), death]
    command += [f"--config={REPOSITORY / 'configs' / config}.py", f"--workdir={workdir}", *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=workdir.parent)


def records(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]


def without_clock(record: dict) -> dict:
    return {name: value for name, value in record.items() if name not in CLOCK}


def digests(folder: pathlib.Path) -> dict[str, str]:
    """The bytes of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = run(workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def trained_parameters(workdir: pathlib.Path) -> dict[tuple[str, str], bytes]:
    """The bits of every array that every stage left."""
    config = json.loads((workdir / "config.json").read_text())
    found = {}
    for stage in STAGES:
        model = "student" if stage == "distill" else "teacher"
        like = abstract(DecoderConfig(vocab_size=config["vocabulary"], **config[model]["shape"]))
        arrays = load_tree(workdir / "stages" / stage / "arrays", like)
        found |= {(stage, name): np.asarray(array).tobytes() for name, array in arrays.items()}
    return found


def test_a_run_killed_in_every_stage_ends_with_the_same_bits(uninterrupted, tmp_path):
    draw = random.Random(0)
    deaths = [
        "saving:text:2",
        f"logged:sft:{draw.randrange(STEPS - 1)}:{draw.uniform(0, 0.01):.4f}",
        "finishing:sft",
        f"logged:rl:{draw.randrange(STEPS - 1)}:{draw.uniform(0, 0.01):.4f}",
        f"logged:distill:{draw.randrange(STEPS - 1)}:{draw.uniform(0, 0.01):.4f}",
        "finishing:evaluate.rl",
        "exporting",
    ]
    workdir = tmp_path / "run"
    for death in deaths:
        killed = run(workdir, death=death)
        assert killed.returncode == -9, f"{death}: {killed.returncode}\n{killed.stderr}"
    done = run(workdir)
    assert done.returncode == 0, done.stderr
    expected, found = trained_parameters(uninterrupted), trained_parameters(workdir)
    assert expected[("text", "query")] != expected[("sft", "query")] != expected[("rl", "query")]
    assert [key for key in expected if found[key] != expected[key]] == []
    assert list(map(without_clock, records(workdir))) == list(map(without_clock, records(uninterrupted)))
    assert json.loads((workdir / "report/metrics.json").read_text()) == json.loads(
        (uninterrupted / "report/metrics.json").read_text()
    )
    assert digests(workdir / "export") == digests(uninterrupted / "export")


def test_every_step_is_logged_once_under_the_names_of_trl(uninterrupted):
    found = records(uninterrupted)
    assert [(r["stage"], r["step"]) for r in found] == [(s, n) for s in STAGES for n in range(STEPS)]
    settings = read_settings(json.loads((uninterrupted / "config.json").read_text()))
    rates = dict(zip(settings.stage_names, map(stage_learning_rate, settings.stages), strict=True))
    for record in found:
        assert {"loss", "grad_norm", "tokens_per_second", "time"} <= record.keys()
        assert record["learning_rate"] == rates[record["stage"]](record["step"])
        assert all(value is not None and math.isfinite(value) for key, value in record.items() if key != "stage")
    trl = {
        "reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "clip_ratio/low_mean",
        "clip_ratio/high_mean", "completions/mean_length", "completions/clipped_ratio", "rewards/label/mean",
        "rewards/rule/mean",
    }  # fmt: skip
    ours = {"first_token/accuracy", "first_token/entropy", "sampler_logprob_gap"}
    for record in found[2 * STEPS : 3 * STEPS]:
        assert trl | ours <= record.keys()
        assert record["sampler_logprob_gap"] < 1e-4  # sampler and train step agree on what was sampled, float32
    of_labels = {"first_token/accuracy", "first_token/entropy", "sft/label"}
    assert all(of_labels.isdisjoint(record) for record in found[:STEPS])  # texts have no labels: not 0, but nothing
    assert found[2 * STEPS]["kl"] == 0  # the policy is its own reference at first
    assert found[3 * STEPS - 1]["kl"] > 0
    for stage in STAGES:
        assert len(list((uninterrupted / "tensorboard" / stage).glob("events.out.tfevents.*"))) == 1


def test_the_run_folder_is_what_the_readme_says(uninterrupted):
    assert sorted(path.name for path in uninterrupted.iterdir()) == [
        "checkpoints", "config.json", "data.json", "export", "log.jsonl", "report", "stages", "tensorboard",
        "tokenizer",
    ]  # fmt: skip
    assert not list((uninterrupted / "checkpoints").iterdir())  # those of finished stages are dropped
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config["rl"]["rollouts"]["group"] == 4 and config["seed"] == 0
    report = uninterrupted / "report"
    pictures = {path.stem for path in report.glob("*.png")}
    assert pictures == {path.stem for path in report.glob("*.csv")}
    assert {"loss", "rewards", "entropy", "dead_groups", "confusion", "reliability", "rule_recall"} <= pictures
    assert all(f"{picture}.png" in (report / "report.html").read_text() for picture in pictures)
    metrics = json.loads((report / "metrics.json").read_text())
    for model in ("sft", "rl", "student"):
        low, accuracy, high = (metrics[f"{model}/accuracy{end}"] for end in ("/low", "", "/high"))
        assert 0 <= low <= accuracy <= high <= 1
        assert 0 <= metrics[f"{model}/macro_f1"] <= 1
    export = uninterrupted / "export"
    for folder in (export, export / "sequence_classifier"):
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
            path.name for path in folder.iterdir()
        }
    assert {"relevance.json", "README.md", "generation_config.json"} <= {path.name for path in export.iterdir()}
    assert json.loads((export / "relevance.json").read_text())["golden"]


def test_compilations_are_bounded_by_stages_and_length_buckets(uninterrupted):
    """The lengths of clips fall into one bucket, so a function compiles once for each model or objective it serves."""
    events = json.loads(uninterrupted.with_suffix(".events").read_text())
    compiled = collections.Counter(name for kind, name, *_ in events if kind == "compiled")
    assert compiled["jit(update)"] == len(STAGES)
    assert compiled["jit(sample)"] == 1 + 2  # rollouts; explanations of teacher and student
    assert compiled["jit(_reference_logprobs)"] == 1
    # Teacher and student are scored on training, calibration and test pairs, the golden pairs included, in full batches
    # and in the smaller ones that remain; queries are computed apart. All of it stays within the buckets of lengths.
    buckets = len(batch_plan.shapes(1, longest=256, budget=CPU_BATCH_TOKENS))
    assert 2 <= compiled["jit(score_suffixes)"] <= 2 * buckets
    assert 2 <= compiled["jit(prefill_suffixes)"] <= 2 * buckets
    logged = [place for place, event in enumerate(events) if event[0] == "logged"]
    for stage in STAGES:
        first, *_, last = (place for place in logged if events[place][1] == stage)
        assert not [event for event in events[first:last] if event[0] == "compiled"], "a later step compiled again"


def test_a_second_run_skips_what_is_finished(uninterrupted):
    before = digests(uninterrupted / "stages"), (uninterrupted / "log.jsonl").read_bytes()
    events_of_tensorboard = list((uninterrupted / "tensorboard").rglob("*"))
    done = run(uninterrupted, death="logged:text:0:0")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "finished before" in line] == [
        f"{stage}: finished before" for stage in STAGES
    ]
    assert (digests(uninterrupted / "stages"), (uninterrupted / "log.jsonl").read_bytes()) == before
    assert list((uninterrupted / "tensorboard").rglob("*")) == events_of_tensorboard


def test_the_student_learns_the_teachers_grade_where_nobody_judged(tmp_path):
    config = read_config(REPOSITORY / "configs/afrl_smoke.py", ('--config.stages=("sft", "distill")',))
    scale = clips.instruction().scale
    nobody = [dataclasses.replace(j, grade=None, explanation=None, rules=()) for j in clips.judgments(3, "train", 6, 4)]
    write_judgments(tmp_path / "pool", nobody, scale)
    config["instruction"] = {"task": "Grade it.", "labels": scale.labels}
    config["data"]["pool"] = {"path": str(tmp_path / "pool"), "unjudged": True}
    config["distill"]["mixture"] = {"pool": 1.0}
    config["evaluation"]["explained_pairs"] = 0
    recipe.run(read_settings(config), config, tmp_path / "run")
    teacher = np.load(tmp_path / "run/stages/teacher_labels.pool/logprobs.npy")
    assert teacher.shape == (24, len(scale))
    found = [record for record in records(tmp_path / "run") if record["stage"] == "distill"]
    assert len(found) == STEPS
    for record in found:
        assert record["first_token/accuracy"] == record["distill/agreement"]  # gold is what the teacher holds likeliest
        assert "sft/explanation" not in record and record["sft/label"] > 0
    assert found[-1]["distill/agreement"] > 0


def test_another_config_is_refused_with_the_keys_that_differ(uninterrupted):
    refused = run(uninterrupted, "--config.rl.steps=5", "--config.title=other")
    assert refused.returncode == 2
    assert "rl.steps: 4 then, 5 now" in refused.stderr
    assert "title: 'AFRL smoke run' then, 'other' now" in refused.stderr
    assert "seed" not in refused.stderr


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    """Step 0 is still finite and kept; it moves the weights so far that step 1 is not."""
    stages = ('--config.stages=("sft",)', "--config.sft.learning_rate=1e30", "--config.sft.save_every=1")
    stopped = run(tmp_path / "run", *stages)
    assert stopped.returncode == 1, stopped.stderr
    told = " ".join(stopped.stderr.split())
    checkpoint = tmp_path / "run/checkpoints/sft/1"
    assert "error: sft: loss" in told and f"at step 1; the last good checkpoint is {checkpoint}" in told
    assert "Traceback" not in told
    assert list(checkpoint.iterdir())
    assert [record["step"] for record in records(tmp_path / "run")] == [0]
    assert not (tmp_path / "run/stages/sft/done.json").exists()


CONFIG = DecoderConfig("qwen3", 64, 16, 3, 2, 1, 8, 24, qk_norm=True)
ENDS = ("_lora_down", "_lora_up")


@pytest.fixture
def bare(tmp_path):
    """A function: models' settings and stages -> a recipe in a folder, without data."""

    def make(stages: dict, student: ModelSettings | None = None) -> recipe.Recipe:
        made = recipe.Recipe.__new__(recipe.Recipe)
        made.settings = types.SimpleNamespace(
            seed=0, dtype="float32", remat="none", stage_names=tuple(stages), student=student, teacher=ModelSettings()
        )
        made.stages, made.mesh, made.held, made.run = stages, None, None, RunFolder(tmp_path / "run", {})
        made.format, made.inputs = types.SimpleNamespace(label_ids=(1, 2)), types.SimpleNamespace(shapes={})
        made.inputs.shapes["teacher"] = CONFIG
        return made

    return make


def test_of_a_stage_with_adapters_they_alone_are_trained_and_what_it_leaves_has_them_merged(bare, monkeypatch):
    """In place of training, 1 is added to the adapters' second factors, which start at 0."""
    stage = SFTStage(kind="sft", lora_rank=2, lora_targets=("query", "down"), optimizer_dtype="bfloat16")
    made, given = bare({"sft": stage}), {}
    start = made._start("teacher")
    first = {name: np.asarray(x) for name, x in start.items()}
    monkeypatch.setattr(made, "_start", lambda model: start)
    monkeypatch.setattr(made, "_objective", lambda *_: (SFT, None, lambda step: dict.fromkeys(TERMS, 1.0)))

    def fit(**arguments):
        given.update(arguments)
        state = arguments["state"]
        moved = {
            name: x + 1 if name.endswith("_up") and name not in first else x for name, x in state.parameters.items()
        }
        given["adapters"] = {name: np.asarray(x) for name, x in moved.items() if name not in first}
        return state.replace(parameters=moved)

    monkeypatch.setattr(recipe, "fit", fit)
    made._train("sft", stage, RunLog(made.run.path))
    assert {name.partition("_lora")[0] for name in given["adapters"]} == {"query", "down"}
    moments = jax.tree.leaves(given["state"].optimizer)
    large = [x for x in moments if x.ndim > 1]
    assert sum(x.size for x in large) == 2 * sum(x.size for x in given["adapters"].values())  # two moments of each
    assert {x.dtype.name for x in large} == {"bfloat16"}
    name, left = made.held
    assert name == "sft" and left.keys() == first.keys()
    for name, x in left.items():
        if name in ("query", "down"):
            down, up = (next(y for key, y in given["adapters"].items() if key.startswith(name + e)) for e in ENDS)
            added = np.stack([np.tensordot(a, b, 1) for a, b in zip(down, up, strict=True)])
            assert np.abs(added).max() > 0.1
            np.testing.assert_allclose(x, first[name] + added, atol=1e-5)
        else:
            np.testing.assert_array_equal(x, first[name])
    assert made.run.finished("sft")["steps"] == stage.steps


def test_a_cut_student_starts_from_layers_of_the_trained_teacher(bare):
    stages = {"sft": SFTStage(kind="sft"), "distill": DistillStage(kind="distill")}
    made = bare(stages, ModelSettings(cut=2))
    trained = {name: x + 1 for name, x in made._start("teacher").items()}
    made.held = ("sft", trained)
    student = made._start("student")
    assert student["query"].shape[0] == 2
    np.testing.assert_array_equal(student["query"], np.asarray(trained["query"])[[0, 2]])
    np.testing.assert_array_equal(student["embed"], trained["embed"])


def test_a_run_is_not_taken_up_on_other_data(tmp_path, monkeypatch):
    """Teacher's labels, for one, are kept in the order of the rows."""
    digests = {"train": "a", "dev": "b"}
    tokenizer = types.SimpleNamespace(save=lambda folder: folder.mkdir())
    inputs = types.SimpleNamespace(
        format=types.SimpleNamespace(tokenizer=tokenizer), mesh=None, judgments={}, digests=lambda: dict(digests)
    )
    monkeypatch.setattr(recipe, "open_inputs", lambda *_: inputs)
    config = read_config(REPOSITORY / "configs/afrl_smoke.py", [])
    for _ in range(2):
        recipe.Recipe(read_settings(config), config, tmp_path / "run")
    digests["train"] = "c"
    with pytest.raises(ValueError, match=r"run holds a run on other data, data\.train; use another --workdir"):
        recipe.Recipe(read_settings(config), config, tmp_path / "run")


def test_what_is_exported_is_what_the_last_stage_left_the_student_before_all():
    def evaluated(*stages: tuple[str, str, str]) -> dict[str, str]:
        kinds = {"sft": SFTStage, "rl": RLStage, "distill": DistillStage, "text": TextStage}
        made = recipe.Recipe.__new__(recipe.Recipe)
        made.stages = {name: kinds[kind](kind=kind, model=model) for name, kind, model in stages}
        return made._evaluated_stages()

    again = evaluated(("sft", "sft", "teacher"), ("rl", "rl", "teacher"), ("sft2", "sft", "teacher"))
    assert list(again.items()) == [("rl", "rl"), ("sft", "sft2")]
    early = evaluated(("small", "sft", "student"), ("text", "text", "student"), ("sft", "sft", "teacher"))
    assert list(early.items()) == [("sft", "sft"), ("student", "small")]
