"""Clusters of disagreements: planted causes are found, with their condition and their members."""

import dataclasses

import numpy as np
import pytest

from afrl_jax.data import clips, clips_rulebooks
from afrl_jax.data.conditions import ELSE, Case, parse
from afrl_jax.instructions.identify import Cause, Table, identify
from afrl_jax.instructions.probe import Graded, Probe


@pytest.fixture
def probed(sets, tmp_path):
    """Predictions on dev_new of a judge that gives these grades with this surety."""

    def make(grades, surety=0.97, judgments=None):
        rest = (1 - surety) / 3
        graded = Graded(rest + (surety - rest) * np.eye(4)[grades])
        judge = type("Fixed", (), {"grade": lambda self, pairs, instruction: graded})()
        judged = sets["dev_new"] if judgments is None else judgments
        folder = tmp_path / f"{hash(tuple(grades))} {surety}"
        return Probe(judge, {"dev_new": judged}, folder)("dev_new", clips.instruction())

    return make


def gold(judgments):
    return np.array([judgment.grade for judgment in judgments])


def test_a_judge_without_errors_has_no_clusters(sets, table, probed):
    assert identify(sets["dev_new"], probed(gold(sets["dev_new"])), clips.instruction(), table) == []


@pytest.mark.parametrize("condition", ["language violated", "kind trailer not asked", "several violated"])
def test_a_planted_blind_spot_is_one_cluster(sets, table, probed, condition):
    judgments = sets["dev_new"]
    grades, hit = gold(judgments), np.array([parse(condition)(Case.of(j)) for j in judgments])
    blind = hit & (grades == np.bincount(grades[hit]).argmax())
    assert blind.sum() >= 3
    told = np.where(blind, 3 - (grades == 3), grades)
    (cluster, *_) = identify(judgments, probed(told), clips.instruction(), table)
    assert cluster.grade == grades[blind][0] and cluster.cause is Cause.MISSING
    assert set(cluster.members) <= set(np.flatnonzero(blind)) and len(cluster.members) >= 0.5 * blind.sum()
    rule = parse(cluster.condition)
    assert all(rule(Case.of(judgments[i])) for i in cluster.members)
    repaired = sum(rule(Case.of(j)) and t != j.grade == cluster.grade for j, t in zip(judgments, told, strict=True))
    spoilt = sum(rule(Case.of(j)) and t == j.grade != cluster.grade for j, t in zip(judgments, told, strict=True))
    assert cluster.net == repaired - spoilt - (" and " in cluster.condition)


def test_small_clusters_are_left_out(sets, table, probed):
    grades = gold(sets["dev_new"])
    told = grades.copy()
    told[:2] = (told[:2] + 1) % 4
    assert identify(sets["dev_new"], probed(told), clips.instruction(), table, least=3) == []
    many = (grades + 1) % 4
    assert len(identify(sets["dev_new"], probed(many), clips.instruction(), table, most=2)) == 2


def test_causes(sets, table, probed):
    judgments = sets["dev_new"]
    grades, hit = gold(judgments), np.array([parse("language violated")(Case.of(j)) for j in judgments])
    told = np.where(hit & (grades == 1), 2, grades)
    said = clips_rulebooks.numbered(clips.instruction(), [("language violated", 1), (ELSE, 3)])
    (unapplied, *_) = identify(judgments, probed(told), said, table)
    assert unapplied.cause is Cause.UNAPPLIED and unapplied.rivals == ()
    wrong = clips_rulebooks.numbered(clips.instruction(), [("language violated", 2), (ELSE, 3)])
    (missing, *_) = identify(judgments, probed(told), wrong, table)
    assert missing.cause is Cause.MISSING and missing.rivals == ("language violated: 2",)
    (torn, *_) = identify(judgments, probed(told, surety=0.3), clips.instruction(), table)
    assert torn.cause is Cause.AMBIGUOUS


def test_contradicting_gold_is_noise_and_asks_for_no_rule(sets, probed):
    judgments = list(sets["dev_new"][:60])
    judgments += [dataclasses.replace(j, grade=(j.grade + 1) % 4) for j in judgments[:4]]
    first = probed(gold(sets["dev_new"][:60]).tolist() + gold(judgments[:4]).tolist(), judgments=judgments)
    clusters = identify(judgments, first, clips.instruction(), Table(judgments))
    assert [cluster.cause for cluster in clusters] == [Cause.NOISE] and clusters[0].members == (60, 61, 62, 63)
