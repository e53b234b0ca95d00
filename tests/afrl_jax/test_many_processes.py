"""One run as 2 processes, one of which is killed, and again as 2, against the same run as one process."""

import json
import pathlib

import numpy as np
import pytest

from afrl_jax.scoring import RelevanceModel
from tests.many_processes import REPOSITORY, start_together

CHANGES = (
    '--config.stages=("sft","rl","distill")', "--config.mesh=fsdp=2,tensor=-1", "--config.rl.save_every=1",
    "--config.sft.steps=2", "--config.rl.steps=3", "--config.distill.steps=2", "--config.evaluation.explained_pairs=2",
)  # fmt: skip
STAGES = [("sft", 0), ("sft", 1), ("rl", 0), ("rl", 1), ("rl", 2), ("distill", 0), ("distill", 1)]
ONE_WRITES = ("config.json", "log.jsonl", "tensorboard", "report", "export", "tokenizer")


def run(workdir: pathlib.Path, logs: str, deaths: list[str]) -> list[tuple[int, str]]:
    """As many processes as deaths; see watched_run.py for what those are."""
    program = REPOSITORY / "tests/afrl_jax/watched_run.py"
    config = f"--config={REPOSITORY / 'configs/afrl_smoke.py'}"
    commands = [
        [program, workdir.with_suffix(f".{logs}.{index}"), death, config, f"--workdir={workdir}", *CHANGES]
        for index, death in enumerate(deaths)
    ]
    return start_together(commands, workdir.parent / logs)


def records(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process logs in all stages; evaluation and report are left out."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    [(status, said)] = run(workdir, "alone", ["finishing:distill"])
    assert status == -9, said
    return records(workdir)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The run's folder, how both starts ended, and the steps that the first left saved."""
    workdir = tmp_path_factory.mktemp("together") / "run"
    first = run(workdir, "first", ["never", "logged:rl:1:0"])
    saved = sorted(int(path.name) for path in (workdir / "checkpoints/rl").glob("*") if path.name.isdigit())
    return workdir, first, saved, run(workdir, "second", ["never", "never"])


def test_when_one_process_dies_the_other_stops_and_says_so(together):
    _, first, saved, _ = together
    (status, said), killed = first
    assert killed[0] == -9
    # 75 where an exchange with it failed; where nothing was exchanged, jax misses it and aborts
    assert status in (75, -6), said
    told = "process 0: the run cannot go on without the others; stopped; the same command continues"
    assert (told if status == 75 else "another task died") in said
    assert saved, "nothing was saved before"


def test_the_same_command_goes_on(together):
    workdir, _, saved, second = together
    assert [status for status, _ in second] == [0, 0], second[0][1] + second[1][1]
    assert f"rl: resumed at step {saved[-1]}" in second[0][1]
    assert "sft: finished before" in second[0][1]
    assert not list((workdir / "checkpoints").iterdir())


def test_the_losses_are_those_of_one_process(together, alone):
    found = records(together[0])
    assert [(record["stage"], record["step"]) for record in found] == STAGES
    for mine, theirs in zip(found, alone, strict=True):
        # Adam's first step is the gradient's sign, which rounding decides near zero: from then on norms differ more.
        later = {"grad_norm"} if mine is not found[0] else set()
        for name in mine.keys() - {"stage", "time", "seconds", "tokens_per_second"} - later:
            # float32 sums over 4 and 2 devices; the gap between sampler and train step is itself rounding
            tolerance = {"atol": 1e-4} if name == "sampler_logprob_gap" else {"rtol": 1e-4, "atol": 1e-5}
            np.testing.assert_allclose(mine[name], theirs[name], **tolerance, err_msg=f"{name} of {mine}")
    assert len({record["loss"] for record in found}) == len(STAGES)


def test_one_process_speaks_and_writes_and_all_save(together):
    workdir, _, _, second = together
    assert "rl: 3 steps in" in second[0][1] and "report: " in second[0][1]
    for line in ("steps in", "resumed", "finished before", "report"):
        assert line not in second[1][1]
    events = {folder.name: len(list(folder.iterdir())) for folder in (workdir / "tensorboard").iterdir()}
    assert events == {"sft": 1, "rl": 2, "distill": 1}  # of the two starts' primaries
    assert not [path for path in workdir.rglob("*") if "tmp" in path.name or "partial" in path.name]
    parts = sorted(path.name for path in (workdir / "stages/distill/arrays").rglob("ocdbt.process_*"))
    assert parts == ["ocdbt.process_0", "ocdbt.process_1"]
    assert all((workdir / name).exists() for name in ONE_WRITES)


def test_what_many_processes_export_loads_anywhere(together):
    model = RelevanceModel.load(together[0] / "export")  # it scores its golden pairs again
    assert model.predict([("chess", "Chess openings")]).shape == (1,)
