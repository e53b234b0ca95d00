"""The evolve stage of a recipe: what it judges with, and that a spent budget stops it and a larger one goes on."""

import json
import pathlib

import pytest

from afrl_jax import recipe
from afrl_jax.instructions.budget import BudgetExceeded
from afrl_jax.instructions.client import Completion
from afrl_jax.instructions.run import ChatSettings
from afrl_jax.recipe import Recipe
from afrl_jax.settings import read_settings
from lm_jax.config_file import read_config
from lm_jax.run_folder import ConfigChanged

CONFIGS = pathlib.Path(__file__).resolve().parents[3] / "configs"


class Model:
    """Answers no edit, until its calls are spent."""

    def __init__(self, calls):
        self.left, self.model, self.budget = calls, "m", self

    def describe(self):
        return f"{self.left} left"

    def complete(self, prompts, *, max_tokens, temperature=0.0, seed=0):
        if len(prompts) > self.left:
            raise BudgetExceeded("budget of calls: none are left")
        return [Completion("[]", False, 1, 1) for _ in prompts]


def config(calls):
    read = read_config(CONFIGS / "afrl_smoke.py", [])
    clips = {"format": "clips", "documents_per_query": 4, "queries": 6}
    read["data"] |= {
        "calibration": {**clips, "format": "clips_rulebooks", "split": "dev"},
        "dev_new": {**clips, "split": "dev", "keep": (0.0, 0.5)},
        "dev_replay": {**clips, "split": "dev", "keep": (0.5, 1.0)},
    }
    chat = {"base_url": "http://host/v1", "model": "m", "calls": calls}
    evolve = {"proposer": "language_model", "chat": chat, "dev_new": "dev_new", "dev_replay": "dev_replay", "rounds": 1,
              "clusters": 1, "edits": 1, "least_cluster": 1, "resamples": 20}  # fmt: skip
    read |= {"stages": ("sft",), "evolve": evolve, "sft": {**read["sft"], "steps": 1, "mixture": {"train": 1.0}}}
    read["evaluation"] |= {"explained_pairs": 0}
    return read


def test_a_spent_budget_stops_the_run_and_a_larger_one_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(ChatSettings, "client", lambda chat, folder: Model(chat.calls))
    workdir = tmp_path / "run"
    with pytest.raises(BudgetExceeded, match="none are left; run again with a larger budget"):
        Recipe(read_settings(config(0)), config(0), workdir)()
    assert not (workdir / "stages" / "evolve").exists()
    Recipe(read_settings(config(9)), config(9), workdir)()
    done = json.loads((workdir / "stages" / "evolve" / "done.json").read_text())
    assert done["rounds"] == 1 and (workdir / "evolution" / "report" / "report.html").exists()
    other = config(9)
    other["evolve"]["chat"]["model"] = "another"
    with pytest.raises(ConfigChanged, match=r"evolve\.chat\.model"):
        Recipe(read_settings(other), other, workdir)


def test_three_data_sets_are_three_that_nothing_else_reads():
    wrong = config(9)
    wrong["evolve"]["dev_replay"] = "train"
    with pytest.raises(ValueError, match=r"evolve: data\.train is trained on"):
        read_settings(wrong)
    wrong["evolve"]["dev_replay"] = "calibration"
    with pytest.raises(ValueError, match=r"evolve: data\.calibration is evaluation\.calibration"):
        read_settings(wrong)
    wrong["evolve"]["dev_replay"] = "dev_new"
    with pytest.raises(ValueError, match="dev_new, dev_replay and test are three data sets"):
        read_settings(wrong)


def test_what_the_judge_is_calibrated_on_is_said_by_the_config_and_has_no_instructions_of_its_own(
    tmp_path, monkeypatch
):
    read = config(9)
    read["data"]["held"] = {"format": "clips", "documents_per_query": 4, "queries": 3, "split": "test"}
    given = {}

    class Judged(RuntimeError):
        pass

    def judge(model, calibration):
        given["calibration"] = calibration
        raise Judged

    monkeypatch.setattr(recipe, "ModelJudge", judge)
    for name, pairs in (("", 0), ("held", 12)):
        read["evolve"]["calibration"] = name
        with pytest.raises(Judged):
            Recipe(read_settings(read), read, tmp_path / f"run_{name}")()
        assert len(given["calibration"]) == pairs  # evaluation.calibration has instructions of its own
    read["data"]["again"] = {**read["data"]["dev_replay"], "documents_per_query": 2}
    for name, told in (
        ("calibration", "data.calibration has pairs that were judged under instructions of their own"),
        ("again", r"\d queries of data.again are in data.dev_replay too"),
        ("train", "data.train is trained on"),
    ):
        read["evolve"]["calibration"] = name
        with pytest.raises(ValueError, match=f"evolve.calibration: {told}"):
            Recipe(read_settings(read), read, tmp_path / "run")
        assert not (tmp_path / "run").exists()
