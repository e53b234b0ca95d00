"""Weekly redeploys on the smoke config: incidents, verdicts, versions, store, pages, and a second start."""

import dataclasses
import itertools
import json
import pathlib
import shutil

import numpy as np
import pytest

from core_jax import gate, weekly, weekly_report
from core_jax.evaluation import Evaluated
from core_jax.gate import GATE, GATES
from core_jax.incidents import INCIDENTS, LengthBiased
from core_jax.recipe import Recipe
from core_jax.registry import MOVES, Registry, golden_self_test
from core_jax.rewrite_format import RewriteFormat
from core_jax.rewriter import Rewriter
from core_jax.search.rewrite_store import RewriteStore, SQLite
from core_jax.settings import read_settings
from core_jax.weekly import KEY, REGISTRY, STORE, Weekly, read_secret
from lm_jax.config_file import read_config
from lm_jax.weights import read_weights

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
INCIDENT_WEEKS = {"week2": "constant_rewrite", "week3": "corrupted_checkpoint"}


@pytest.fixture(scope="module", autouse=True)
def what_is_drawn_counts_as_ended():
    """A rewriter of a few steps never ends what it says, and then there would be nothing to store."""
    read = RewriteFormat.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewriteFormat, "read", lambda self, ids: dataclasses.replace(read(self, ids), truncated=False))
        yield


@pytest.fixture(scope="module")
def config(relevance_folder):
    weeks = {"weeks": 3, "sessions": 8, "held_out": 24, "incident_steps": 3, "searches": 4, "resamples": 50}
    config = read_config(REPOSITORY / "configs/core_smoke.py", [f"--config.relevance={relevance_folder}"])
    return config | {"weekly": weeks | {"incidents": INCIDENT_WEEKS}}


def first_candidate_passes(patch):
    """Gates let one candidate through and no more: what follows from a verdict is what is tested."""
    asked, real = itertools.count(), gate.decide

    def decide(*arguments, **options):
        found = real(*arguments, **options)
        passed = tuple(finding._replace(passed=True, reason="") for finding in found.findings)
        too_few = "kept out" if next(asked) >= len(GATES) else ""
        return dataclasses.replace(found, findings=passed, too_few=too_few)

    patch.setattr(gate, "decide", decide)


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weekly") / "run"
    recipe = Recipe(read_settings(config), config, folder)
    recipe()
    with pytest.MonkeyPatch.context() as patch:
        first_candidate_passes(patch)
        Weekly(recipe)()
    return folder


@pytest.fixture(scope="module")
def weeks(workdir):
    return [json.loads((workdir / "stages" / f"week{n}" / "done.json").read_text()) for n in (1, 2, 3)]


def test_each_week_starts_from_what_was_promoted_last(workdir, weeks):
    registry = Registry(workdir / REGISTRY, golden_self_test)
    first = next(record["to"] for record in registry.history() if record["action"] == "promote")
    incumbents = [first, *(week["production"] for week in weeks[:-1])]
    assert [week["incumbent"] for week in weeks] == incumbents
    assert [week["incident"] for week in weeks] == ["", "constant_rewrite", "corrupted_checkpoint"]
    assert [week["decisions"]["gate"] for week in weeks] == ["promote", "block", "block"]
    assert [week["reasons"] for week in weeks] == [[], ["kept out"], ["kept out"]]
    assert weeks[0]["production"] == weeks[1]["production"] == weeks[2]["production"] == weeks[0]["candidate"]
    assert registry.production() == weeks[0]["candidate"] != first
    assert all(registry.verify(week["candidate"]) for week in weeks)
    assert len({week["candidate"] for week in weeks}) == 3
    assert registry.rollback(who="test", why="one command") == first
    registry.promote(weeks[0]["candidate"], who="test", why="and back")


def test_what_ended_is_stored_for_its_version_and_what_was_cut_off_is_not(workdir, config, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    weekly = Weekly(Recipe(read_settings(config), config, tmp_path / "run"))
    following = weekly.following[3]
    keys = [context.key for context in following.contexts]
    said = [f"german chess {place}" for place in range(len(keys))]
    cut = np.arange(len(keys)) == 0
    weekly._write_store("new", following, Evaluated(["q"] * len(keys), said, {"truncated": cut}))
    store = RewriteStore(SQLite(tmp_path / "run" / STORE), read_secret(tmp_path / "run" / KEY))
    found = {key: store.read(key, "new").text for key in keys}
    assert len(found) > 1 and found == dict(zip(keys, [None, *said[1:]], strict=True))
    assert {store.read(key, "other").text for key in keys} == {None}


def test_a_config_may_name_another_store_and_words_that_no_rewrite_may_hold(workdir, config, tmp_path):
    folder = shutil.copytree(workdir, tmp_path / "run")
    words = tmp_path / "words"
    words.write_text("chess 2\n")
    elsewhere = {"store": str(tmp_path / "elsewhere.sqlite"), "unsafe": str(words)}
    config = config | {"weekly": config["weekly"] | elsewhere}
    (folder / "config.json").write_text(json.dumps(config))
    weekly = Weekly(Recipe(read_settings(config), config, folder))
    keys = [context.key for context in weekly.following[3].contexts]
    said = [f"german chess  {place}" for place in range(len(keys))]
    weekly._write_store("new", weekly.following[3], Evaluated(keys, said, {"truncated": np.zeros(len(keys))}))
    store = RewriteStore(SQLite(tmp_path / "elsewhere.sqlite"), read_secret(folder / KEY))
    found = [store.read(key, "new").text for key in keys]
    assert found == [text if place != 2 else None for place, text in enumerate(said)] and len(found) > 3


def test_the_store_holds_rewrites_of_the_version_in_production_only(workdir, weeks, config):
    recipe = Recipe(read_settings(config), config, workdir)
    contexts = Weekly(recipe).following[3].contexts
    store = RewriteStore(SQLite(workdir / STORE), read_secret(workdir / KEY))
    production = weeks[-1]["production"]
    rewrites = Rewriter.load(Registry(workdir / REGISTRY, golden_self_test).path(production)).rewrite(contexts)
    found = [store.read(context.key, production).text for context in contexts]
    assert found == [rewrite.text if rewrite.usable else None for rewrite in rewrites] and any(found)
    assert (workdir / KEY).stat().st_mode & 0o777 == 0o600


def test_what_was_cut_off_or_says_nothing_is_not_stored():
    of = Evaluated(["q"] * 4, ["a", "b", "", ""], {"truncated": np.array([1.0, 0.0, 0.0, 1.0])})
    assert weekly._usable(of) == [None, "b", None, None]


def test_pages_say_what_was_decided_and_how_to_go_back(workdir, weeks):
    for week in weeks:
        page = (workdir / "weeks" / str(week["week"]) / "report.html").read_text()
        assert f"Week {week['week']}: {week['decisions']['gate']}" in page and "rollback" in page
        assert all(criterion.metric in page for criterion in GATE.criteria)
        assert "What it would have done to search" in page and "reward_only" in page
        assert (workdir / "weeks" / str(week["week"]) / "metrics.png").exists()
    page = (workdir / "weeks" / "report.html").read_text()
    assert "constant_rewrite" in page and "Gates as detectors" in page


def test_figures_of_a_week_follow_from_what_is_on_disk(workdir, weeks):
    metrics = json.loads((workdir / "weeks" / "metrics.json").read_text())
    assert metrics["gate/false_block_rate"] == 0 and metrics["gate/detection_rate"] == 1
    assert set(weeks[0]["figures"]) >= {"log_ratio/difference", "truncated/candidate", "surprisal/low"}


def test_a_second_start_does_nothing_again(workdir, config, weeks):
    audit = (workdir / REGISTRY / "audit.jsonl").read_bytes()
    recipe = Recipe(read_settings(config), config, workdir)
    Weekly(recipe)()
    assert (workdir / REGISTRY / "audit.jsonl").read_bytes() == audit


class Killed(BaseException):
    """What no handler of errors catches."""


# Where the starts of a run die, one after the other: right after the n-th call of what makes something last.
DEATHS = [
    (Registry, "publish", 1),  # the first version is published, not in production
    (Registry, "promote", 1),
    (Registry, "publish", 2),  # the candidate
    (Registry, "promote", 1),
    (RewriteStore, "write", 1),
    (weekly, "write_gate_report", 1),
]


def before_any_week(workdir, folder):
    shutil.copytree(workdir, folder)
    for made in (REGISTRY, "weeks", STORE, *(f"stages/{path.name}" for path in (workdir / "stages").glob("week*"))):
        path = folder / made
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def start_and_die(config, folder, owner, name, dies_after):
    with pytest.MonkeyPatch.context() as patch:
        first_candidate_passes(patch)
        calls, real = itertools.count(1), getattr(owner, name)

        def call(*arguments, **options):
            found = real(*arguments, **options)
            if next(calls) == dies_after:
                raise Killed
            return found

        patch.setattr(owner, name, call)
        with pytest.raises(Killed):
            Weekly(Recipe(read_settings(config), config, folder))()
    assert not (folder / "stages/week1/done.json").exists()


def first_week(config, folder):
    """The facts of the first week, started again; its candidate passes."""
    with pytest.MonkeyPatch.context() as patch:
        first_candidate_passes(patch)
        weekly = Weekly(Recipe(read_settings(config), config, folder))
        weekly.numbers = weekly.numbers[:1]
        weekly()
    return json.loads((folder / "stages/week1/done.json").read_text())


def moves_of(folder):
    records = Registry(folder / REGISTRY, golden_self_test).history()
    return [(record["action"], record["to"]) for record in records if record["action"] in MOVES]


def test_a_promotion_rolled_back_before_its_week_ended_is_not_made_again(workdir, config, tmp_path):
    folder = before_any_week(workdir, tmp_path / "run")
    start_and_die(config, folder, Registry, "promote", 2)
    registry = Registry(folder / REGISTRY, golden_self_test)
    candidate = registry.production()
    first = registry.rollback(who="on call", why="clicks fell")
    found = first_week(config, folder)
    assert found["rolled_back"] and (found["incumbent"], found["candidate"]) == (first, candidate)
    assert found["production"] == first == registry.production()
    assert moves_of(folder) == [("promote", first), ("promote", candidate), ("rollback", first)]
    assert "promote, rolled back" in (folder / "weeks" / "1" / "report.html").read_text()
    assert "promote, rolled back" in (folder / "weeks" / "report.html").read_text()


def test_a_week_whose_incumbent_is_in_production_no_longer_begins_anew(workdir, config, tmp_path):
    folder = before_any_week(workdir, tmp_path / "run")
    start_and_die(config, folder, Registry, "publish", 2)
    registry = Registry(folder / REGISTRY, golden_self_test)
    first = registry.production()
    by_hand = next(record["to"] for record in reversed(registry.history()) if record["action"] == "publish")
    registry.promote(by_hand, who="on call", why="it cannot wait")
    found = first_week(config, folder)
    assert found["incumbent"] == by_hand != first and not found["rolled_back"]
    assert found["production"] == found["candidate"] == registry.production() != by_hand
    assert moves_of(folder) == [("promote", first), ("promote", by_hand), ("promote", found["candidate"])]


def test_candidates_learn_from_the_incumbent_and_the_incident_while_the_gate_trusts_the_first_relevance(
    workdir, config, tmp_path
):
    incidents = {"week1": "length_biased_relevance", "week2": "length_penalty_removed"}
    config = config | {"weekly": config["weekly"] | {"incidents": incidents, "searches": 0}}
    folder = before_any_week(workdir, tmp_path / "run")
    (folder / "config.json").write_text(json.dumps(config))
    phases, evaluated, decided = [], [], []

    class Phase:  # learns a little of nothing
        def __init__(self, name, settings, inputs, sessions, *, relevance, **rest):
            self.asked = {"name": name, "reward": settings.reward, "relevance": relevance}

        def __call__(self, start):
            phases.append(self.asked | {"start": start})
            return start | {"embed": start["embed"] * 1.001}

    def evaluate(rewriter, following, relevance, reward):
        found = real_evaluate(rewriter, following, relevance, reward)
        evaluated.append((relevance, found.values["s_pos"]))
        return found

    def decide(incumbent, candidate, of_gate, **options):
        decided.append((of_gate, candidate.values["positive"]))
        return real_decide(incumbent, candidate, of_gate, **options)

    with pytest.MonkeyPatch.context() as patch:
        first_candidate_passes(patch)
        real_evaluate, real_decide = weekly.evaluate, gate.decide
        for owner, spy in ((weekly, Phase), (weekly, evaluate), (gate, decide)):
            patch.setattr(owner, spy.__name__, spy)
        recipe = Recipe(read_settings(config), config, folder)
        two = Weekly(recipe)
        two.numbers = two.numbers[:2]
        two()
    facts = [json.loads((folder / f"stages/week{number}/done.json").read_text()) for number in (1, 2)]
    assert facts[0]["incumbent"] != facts[1]["incumbent"] == facts[0]["candidate"]
    for week, learned in zip(facts, phases, strict=True):
        start = read_weights(two.registry.path(week["incumbent"]))[1]
        assert all(np.array_equal(learned["start"][name], value) for name, value in start.items())
    usual = recipe.settings.reward
    assert isinstance(phases[0]["relevance"], LengthBiased) and phases[0]["reward"] == usual
    assert phases[1]["relevance"] is recipe.deployed
    assert phases[1]["reward"] == INCIDENTS["length_penalty_removed"].reward(usual) != usual
    by_trusted = [values for relevance, values in evaluated if relevance is recipe.deployed]
    by_biased = [values for relevance, values in evaluated if isinstance(relevance, LengthBiased)]
    of = [positive for of_gate, positive in decided if of_gate is GATE]
    assert len(of) == 2 and all(any(np.array_equal(each, values) for values in by_trusted) for each in of)
    assert not any(np.array_equal(of[0], values) for values in by_biased)
    # The gate that trusts the reward asks what rewarded.
    trusting = [positive for of_gate, positive in decided if of_gate is gate.REWARD_ONLY]
    assert any(np.array_equal(trusting[0], values) for values in by_biased)
    assert any(np.array_equal(trusting[1], values) for values in by_trusted)


def test_a_week_that_is_killed_wherever_it_leaves_something_ends_the_same(workdir, weeks, config, tmp_path):
    folder = before_any_week(workdir, tmp_path / "run")
    for owner, name, dies_after in [*DEATHS, (Weekly, "_week", 1)]:
        start_and_die(config, folder, owner, name, dies_after)
    with pytest.MonkeyPatch.context() as patch:
        first_candidate_passes(patch)
        Weekly(Recipe(read_settings(config), config, folder))()

    assert [json.loads((folder / f"stages/week{n}/done.json").read_text()) for n in (1, 2, 3)] == weeks
    moves = [
        [(record["action"], record["to"]) for record in Registry(run / REGISTRY, golden_self_test).history()
         if record["action"] in ("promote", "rollback")]
        for run in (folder, workdir)
    ]  # fmt: skip
    assert [action for action, _ in moves[0]] == ["promote", "promote"]
    assert moves[0] == moves[1][:2]  # another test went back there, and on again
    for candidates in (run / "candidates" for run in (folder, workdir)):
        assert not candidates.exists() or not list(candidates.iterdir())


def test_incidents_must_be_known_and_in_their_weeks(config):
    for incidents, message in (({"week1": "typo"}, "week1"), ({"week9": "title_copying"}, "weekly.incidents: 'week9'")):
        wrong = config | {"weekly": config["weekly"] | {"incidents": incidents}}
        with pytest.raises(ValueError, match=message):
            read_settings(wrong)


def week(number, incident, decision, judge=0.5):
    return {
        "week": number, "incident": incident, "decisions": dict.fromkeys(GATES, decision),
        "reasons": ["length: too long"] if decision == "block" else [],
        "figures": {"log_ratio/difference": 0.1}, "judge": {"incumbent": judge, "candidate": judge + 0.1},
        "search": 0.04 if number == 1 else None, "improvement_rate": 0.6,
    }  # fmt: skip


def test_the_page_of_all_weeks_counts_as_the_detector_does(tmp_path):
    rows = [week(1, "", "promote"), week(2, "title_copying", "promote"), week(3, "title_copying", "block")]
    rows += [week(4, "", "block"), week(5, "", "hold"), week(6, "", "hold")]
    metrics = weekly_report.write(tmp_path, rows)
    assert metrics["gate/false_block_rate"] == metrics["gate/promotion_rate"] == 0.25
    assert metrics["gate/detection_rate"] == metrics["gate/let_through_rate"] == 0.5
    assert metrics["gate/mean_delay_weeks"] == 1 and metrics["gate/never_detected"] == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("<td>+0.040</td>") == 1  # search nDCG, of the week that tried searching
    assert "copies the watched title" in page and '<a href="3/report.html">3</a>' in page
    assert dataclasses.is_dataclass(weekly_report.detectors(rows)["gate"])


def test_a_week_begins_with_what_the_registry_has_in_production(workdir, weeks, config, tmp_path):
    """Somebody rolls back between two weeks."""
    folder = shutil.copytree(workdir, tmp_path / "run", symlinks=True)
    for path in (folder / "stages").glob("week[23]*"):
        shutil.rmtree(path)
    first = Registry(folder / REGISTRY, golden_self_test).rollback(who="test", why="not what we want")
    Weekly(Recipe(read_settings(config), config, folder))()
    second = json.loads((folder / "stages/week2/done.json").read_text())
    assert second["incumbent"] == first != weeks[1]["incumbent"]


def test_what_no_week_could_do_is_refused_before_any_work(config):
    for changes, message in (
        ({"arm": "grpo"}, "weekly.weeks: weeks learn in phases"),
        ({"weekly": {"store": "redis+tls://h:1/0"}}, r"weekly\.store: redis\+tls://h:1/0: a store is redis://"),
        ({"evaluation": {"resamples": 0}}, "evaluation.resamples: 0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            read_settings(config | changes)


def test_prompts_of_an_incident_must_fit_its_rows(config, tmp_path):
    small = config | {"supervised": {**config["supervised"], "row_tokens": 24, "mixture": {}}}
    recipe = Recipe(read_settings(small), small, tmp_path / "run")
    with pytest.raises(ValueError, match=r"supervised\.row_tokens: 24 is too small for weekly\.incidents"):
        Weekly(recipe)
    assert not (tmp_path / "run").exists()  # what is put right may have another config
