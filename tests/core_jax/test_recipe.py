"""The whole program on the smoke config: what it leaves, what it costs, and that being killed changes nothing."""

import collections
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from core_jax import grpo, phases
from core_jax.phases import NoPairs
from core_jax.recipe import Recipe
from core_jax.rewriter import Rewriter
from core_jax.schema import Context
from core_jax.session_reader import write_sessions
from core_jax.sessions import simulate
from core_jax.settings import read_settings
from lm_jax import run_log
from lm_jax.config_file import read_config
from lm_jax.parameters import abstract, initialize
from sharding.distributed import PREEMPTED

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
STAGES = ("start", "phase1", "phase2")
STEPS, CONTEXTS, REWRITES = 4, 6, 4
CLOCK = {"time", "seconds", "tokens_per_second"}  # the clock's, not the computation's


@pytest.fixture(scope="module")
def run(relevance_folder):
    """A function: one start of the program, see watched_run.py."""

    def start(workdir: pathlib.Path, *arguments: str, death: str = "never"):
        command = [sys.executable, REPOSITORY / "tests/core_jax/watched_run.py", workdir.with_suffix(".events"), death]
        command += [f"--config={REPOSITORY / 'configs/core_smoke.py'}", f"--workdir={workdir}"]
        command += [f"--config.relevance={relevance_folder}", "--config.phases.query_pairs=1"]
        command += ["--config.mpo.rehearsal=0.25", *arguments]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=workdir.parent)

    return start


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = run(workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def records(workdir: pathlib.Path) -> list[dict]:
    found = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in CLOCK} for record in found]


def digests(folder: pathlib.Path, pattern: str = "*") -> dict[str, str]:
    """The bytes of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob(pattern))
        if path.is_file()
    }


def metrics(workdir: pathlib.Path) -> dict[str, float]:
    """Those that do not speak of time or of how often the run was killed."""
    found = json.loads((workdir / "report" / "metrics.json").read_text())
    return {name: value for name, value in found.items() if "seconds" not in name and not name.endswith("syncs")}


def facts(workdir: pathlib.Path, stage: str) -> dict:
    return json.loads((workdir / "stages" / stage / "done.json").read_text())


def test_a_query_that_is_longer_than_a_rewrite_may_be_is_in_no_pair():
    config = read_config(REPOSITORY / "configs/core_smoke.py", ["--config.phases.query_pairs=1"])
    phase = types.SimpleNamespace(settings=read_settings(config))  # 12 new tokens, k = 1, one pair with the query
    texts, values = ["a", "b", "q"], np.array([0.0, 1.0, 2.0])
    assert [pair[:2] for pair in phases.Phase._pairs(phase, texts, values, 12)] == [(1, 0), (2, 0)]
    assert [pair[:2] for pair in phases.Phase._pairs(phase, texts, values, 13)] == [(1, 0)]


def test_a_run_killed_inside_and_between_phases_ends_with_the_same_bits(run, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    deaths = ("drawn:phase1:1", "scored:phase1", "finishing:phase1", "logged:phase2:2")
    for death in deaths:
        killed = run(workdir, death=death)
        assert killed.returncode == -9, f"{death}: {killed.returncode}\n{killed.stderr}"
    done = run(workdir)
    assert done.returncode == 0, done.stderr
    assert "phase2: resumed at step 2" in done.stderr
    assert digests(workdir / "export") == digests(uninterrupted / "export")
    assert records(workdir) == records(uninterrupted)
    assert metrics(workdir) == metrics(uninterrupted)
    for pattern in ("rewrites.jsonl", "reference.npy"):
        assert digests(workdir / "stages", pattern) == digests(uninterrupted / "stages", pattern) != {}
    assert facts(workdir, "phase1")["syncs"] == 2 and facts(uninterrupted, "phase1")["syncs"] == 1


def test_phases_cost_what_they_say(uninterrupted):
    for phase in STAGES[1:]:
        found = facts(uninterrupted, phase)
        assert found["sampled"] == CONTEXTS * REWRITES and found["contexts"] == CONTEXTS
        assert CONTEXTS < found["pairs"] <= 2 * CONTEXTS  # k and one against the query
        used = found["share_in_gradient"] * found["sampled"]
        assert found["pairs"] <= used <= (2 * 1 + 1) * CONTEXTS  # 2k, and that one where it is neither best nor worst
        assert (found["syncs"], found["reward_batches"]) == (1, 1)
        assert found["staleness/most_steps"] == STEPS - 1
        assert found["relevance_pairs"] > 0 and 0 <= found["distinct"] <= 1
        assert {"seconds/sampling", "seconds/scoring", "seconds/training"} <= found.keys()
    first, second = ((uninterrupted / "stages" / phase / "rewrites.jsonl").read_text() for phase in STAGES[1:])
    sessions = [[json.loads(line)["session_id"] for line in text.splitlines()] for text in (first, second)]
    assert len(sessions[0]) == len(sessions[1]) == CONTEXTS and not set(sessions[0]) & set(sessions[1])


def test_every_step_is_logged_once_under_the_names_of_trl(uninterrupted):
    found = records(uninterrupted)
    counts = {stage: 12 if stage == "start" else STEPS for stage in STAGES}  # fewer, and no rewrite would end
    steps = [(stage, step) for stage in STAGES for step in range(counts[stage])]
    assert [(r["stage"], r["step"]) for r in found if not r["stage"].endswith(".collect")] == steps
    assert [r["stage"] for r in found if r["stage"].endswith(".collect")] == ["phase1.collect", "phase2.collect"]
    trl = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "delta"}
    settings = read_settings(json.loads((uninterrupted / "config.json").read_text()))
    rates = dict.fromkeys(STAGES[1:], phases.learning_rate(settings.mpo, STEPS))
    rates["start"] = phases.learning_rate(settings.supervised, counts["start"])
    for record in found:
        if record["stage"] in STAGES:
            assert record["learning_rate"] == rates[record["stage"]](record["step"])
        if record["stage"] in STAGES[1:]:
            assert trl | {"mpo/dpo", "mpo/bco", "mpo/sft", "entropy", "loss", "grad_norm"} <= record.keys()
            assert all(math.isfinite(value) for key, value in record.items() if key != "stage")
            if record["step"] == 0:  # policy and reference agree
                assert abs(record["rewards/chosen"]) < 1e-5 and record["delta"] == 0
                assert record["mpo/dpo"] == pytest.approx(math.log(2), abs=1e-5)
            elif record["step"] == STEPS - 1:
                assert abs(record["rewards/margins"]) > 1e-5 and record["delta"] != 0


def test_the_run_folder_is_what_the_program_says(uninterrupted):
    assert {"config.json", "export", "log.jsonl", "report", "stages", "tensorboard"} <= {
        path.name for path in uninterrupted.iterdir()
    }
    report = uninterrupted / "report"
    found = metrics(uninterrupted)
    for stage in STAGES:
        for rate in ("improvement_rate", "identity", "copies_title", "truncated"):
            low, value, high = (found[f"{stage}/{rate}{end}"] for end in ("/low", "", "/high"))
            assert 0 <= low <= value <= high <= 1
        assert 0 <= found[f"{stage}/judge"] <= 1 and 0 < found[f"{stage}/distinct"] <= 1
    pictures = {path.stem for path in report.glob("*.png")}
    assert pictures == {path.stem for path in report.glob("*.csv")}
    assert {"reward", "judge", "degeneracy", "loss", "preferences", "accuracy"} == pictures
    page = (report / "report.html").read_text()
    assert all(f"{picture}.png" in page for picture in pictures) and "Phases" in page
    described = json.loads((uninterrupted / "export" / "rewriter.json").read_text())
    assert described["golden"] and described["relevance_version"]
    assert described["figures"]["improvement_rate"] == found["phase2/improvement_rate"]


def test_the_export_rewrites(uninterrupted):
    rewriter = Rewriter.load(uninterrupted / "export")
    (rewrite,) = rewriter.rewrite([Context("cycling with chapters")])
    assert rewrite.length <= 12
    golden = json.loads((uninterrupted / "export" / "rewriter.json").read_text())["golden"]
    assert all(np.isfinite(row["surprisal"]) for row in golden)


def test_phases_compile_nothing_twice(uninterrupted):
    compiled = collections.Counter(json.loads(uninterrupted.with_suffix(".events").read_text()))
    assert compiled["jit(pair_logprobs)"] == 1
    assert compiled["jit(update)"] == 2  # the start's, and one for all phases


def test_a_second_run_skips_what_is_finished_and_makes_again_what_is_gone(run, uninterrupted):
    before = digests(uninterrupted / "stages"), (uninterrupted / "log.jsonl").read_bytes()
    exported = digests(uninterrupted / "export")
    shutil.rmtree(uninterrupted / "export")
    done = run(uninterrupted, death="logged:start:0")
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "finished before" in line]
    assert told == [f"{stage}: finished before" for stage in STAGES]
    assert (digests(uninterrupted / "stages"), (uninterrupted / "log.jsonl").read_bytes()) == before
    assert digests(uninterrupted / "export") == exported


def test_a_relevance_model_exchanged_in_the_middle_of_a_run_is_told(run, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    began = workdir / "stages" / "relevance" / "done.json"
    version = json.loads(began.read_text())["version"]
    began.write_text(json.dumps({"version": "0" * 64}))
    shutil.rmtree(workdir / "stages" / "evaluate.phase2")
    done = run(workdir)
    assert done.returncode == 1
    assert f"holds version {version[:12]}, the run began with 000000000000" in done.stderr


def test_of_few_sessions_the_budget_is_that_of_the_phases_too():
    settings = read_settings(read_config(REPOSITORY / "configs/core_smoke.py", ["--config.phases.contexts=100"]))
    assert grpo.steps_of_budget(settings, 20) == 2 * 20 * 4 // (2 * 4)  # phases x sessions x rewrites


def recipe_of(relevance_folder, workdir: pathlib.Path, *arguments: str) -> Recipe:
    relevance = f"--config.relevance={relevance_folder}"
    config = read_config(REPOSITORY / "configs/core_smoke.py", [relevance, *arguments])
    return Recipe(read_settings(config), config, workdir)


def test_online_grpo_spends_the_same_rewards(relevance_folder, tmp_path):
    recipe_of(relevance_folder, tmp_path / "run", "--config.arm=grpo", "--config.supervised.steps=1")()
    found = [record for record in records(tmp_path / "run") if record["stage"] == "grpo"]
    assert len(found) * 2 * 4 == 2 * CONTEXTS * REWRITES  # steps x contexts x group = phases x contexts x rewrites
    for record in found:
        assert {"reward", "reward_std", "frac_reward_zero_std", "policy", "completions/mean_length"} <= record.keys()
        assert record["sampler_logprob_gap"] < 1e-4 and not any(key.startswith("first_token/") for key in record)
    assert facts(tmp_path / "run", "grpo")["steps"] == len(found)


def test_what_a_phase_cost_is_counted_and_its_reference_is_of_its_pairs_alone(relevance_folder, tmp_path, monkeypatch):
    made = recipe_of(relevance_folder, tmp_path / "run", "--config.supervised.mixture={}", "--config.phases.count=1")
    asked, updated = [], []
    real_score, real_step = phases.score_rewrites, phases.mpo.make_step

    def score_twice(sessions, rewrites, relevance, settings):
        def counting(pairs):
            asked.append(len(pairs))
            return relevance(pairs)

        counting.version = "counting"
        for _ in range(2):
            found = real_score(sessions, rewrites, counting, settings)
        return found

    def make_step(*arguments, **options):
        step = real_step(*arguments, **options)
        update = lambda *arguments: (updated.append(1), step.update(*arguments))[1]
        return step._replace(update=update)

    monkeypatch.setattr(phases, "score_rewrites", score_twice)
    monkeypatch.setattr(phases.mpo, "make_step", make_step)
    phase = phases.Phase(
        "phase1", made.settings, made.inputs, made._sessions_of(0), relevance=made.relevance, sampler=made.sampler,
        run=made.run, log=run_log.RunLog(made.run.path), seed=1,
    )  # fmt: skip
    start = initialize(made.inputs.shape, 0, made.inputs.mesh)
    phase(start)
    found = facts(tmp_path / "run", "phase1")
    assert found["reward_batches"] == len(asked) >= 2 and found["relevance_pairs"] == sum(asked) > 0
    assert found["steps"] == len(updated) == STEPS and found["staleness/most_steps"] == len(updated) - 1

    collected = phase.collect(start)
    phase._with_reference(start, collected)
    (prompt, chosen, rejected), *others = collected.pairs
    swapped = dataclasses.replace(collected, pairs=[(prompt, rejected, chosen), *others])
    with pytest.raises(ValueError, match=r"reference\.npy holds log-probs of other pairs"):
        phase._with_reference(start, swapped)


def test_with_adapters_a_phase_changes_their_targets_by_matrices_of_their_rank(relevance_folder, tmp_path):
    adapters = ("--config.mpo.lora_rank=2", "--config.mpo.lora_targets=('query', 'value')")
    made = recipe_of(relevance_folder, tmp_path / "run", *adapters, "--config.phases.count=1")
    made()
    before, after = (made.run.arrays(stage, abstract(made.inputs.shape)) for stage in ("start", "phase1"))
    for name, x in before.items():
        change = np.asarray(after[name]) - np.asarray(x)
        if name not in ("query", "value"):
            assert not change.any(), name
            continue
        for layer in change:
            assert np.linalg.matrix_rank(layer.reshape(layer.shape[0], -1), tol=1e-6) == 2, name


def test_a_phase_that_finds_no_pairs_says_why(relevance_folder, tmp_path):
    """A rewrite of one token has no room to end."""
    arguments = ("--config.rewriter.max_new_tokens=1", "--config.supervised.mixture={}", "--config.proxy=bm25")
    with pytest.raises(NoPairs, match=r"phase1: no pair of 24 rewrites reaches phases\.margin 1e-06: none ended"):
        recipe_of(relevance_folder, tmp_path / "run", *arguments)()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.relevance=nowhere", "nowhere"),
        (
            "--config.mpo.row_tokens=32",
            r"mpo\.row_tokens: 32 is too small, \d+ are needed: the prompt of session '",
        ),
        (
            "--config.rewriter.shape.max_positions=64",
            r"rewriter: the longest prompt and a rewrite have \d+ tokens, its m",
        ),
        ("--config.data.train.weeks=1", r"data\.train: .*weeks"),
        ("--config.evaluation.sessions=train", r"evaluation\.sessions: 'train' are those that are trained on"),
        ("--config.data.train.format=csv", r"data\.train: format: 'csv' is unknown; it is one of clips, log"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(relevance_folder, tmp_path, argument, message):
    with pytest.raises((ValueError, OSError), match=message):
        recipe_of(relevance_folder, tmp_path / "run", argument)
    assert not (tmp_path / "run").exists()


def test_a_log_of_other_sessions_is_another_run_and_what_is_measured_is_not_learned(relevance_folder, tmp_path, capsys):
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "held_out", "people")}
    lived = [each.session for each in simulate(0, "train", 0, 30, shown=6)]
    write_sessions(files["train"], lived[:20])
    write_sessions(files["held_out"], lived[20:])
    said = ["chess for kids", "chess openings for beginners in german, no ads and with chapters please, of this year"]
    files["people"].write_text("".join(json.dumps({"utterance": "chess", "rewrite": each}) + "\n" for each in said))
    config = read_config(REPOSITORY / "configs/core_smoke.py", [f"--config.relevance={relevance_folder}"])
    config |= {
        "data": {name: {"format": "log", "path": str(files[name])} for name in ("train", "held_out")},
        "rewrites": {"people": {"format": "table", "path": str(files["people"])}},
    }
    config["supervised"]["mixture"] = {"people": 1.0}

    def recipe() -> Recipe:
        return Recipe(read_settings(config), config, tmp_path / "run")

    first = recipe()
    assert first.inputs.too_long == {"people": 1} and len(first.inputs.supervised["people"]) == 1
    told = capsys.readouterr().err
    assert "rewrites.people: 1 of 2 have more than 12 tokens" in told
    assert "data.held_out: sessions are older than the last of data.train" in told
    assert first.run.path.exists()
    recipe()
    for name, key in (("train", "data"), ("held_out", "data"), ("people", "rewrites")):
        before = files[name].read_text()
        files[name].write_text(before.replace('"query": "', '"query": "new ').replace("chess for", "shogi for"))
        with pytest.raises(ValueError, match=rf"run holds a run on other data, {key}\.{name}; use another --workdir"):
            recipe()
        files[name].write_text(before)
    write_sessions(files["held_out"], lived[10:])
    with pytest.raises(ValueError, match=r"data\.held_out: \d+ sessions are in data\.train too, such as 'train-0-0-1"):
        recipe()


def test_told_to_stop_the_run_that_makes_the_relevance_model_saves_and_stops_too(tmp_path):
    made = tmp_path / "smoke"
    command = [sys.executable, "-m", "core_jax.main", f"--config={REPOSITORY / 'configs/core_smoke.py'}"]
    command += [f"--workdir={tmp_path / 'core'}", f"--config.relevance={made / 'export'}"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    while not (made / "log.jsonl").exists():
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.1)
    running.terminate()
    _, said = running.communicate(timeout=120)
    assert running.returncode == PREEMPTED, said
    assert any((made / "checkpoints").iterdir()), "the step that ran is saved"
    assert not (made / "export").exists()
    commands = [path.read_bytes() for path in pathlib.Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(str(made).encode() in each for each in commands), "nobody goes on without the parent"
