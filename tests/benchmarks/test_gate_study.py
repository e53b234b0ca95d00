"""The study's own check of the registry's log."""

import pytest

from benchmarks.gate_study import QUICK_WEEKS, SCHEDULE, WEEKS, check_history
from core_jax.incidents import INCIDENTS
from core_jax.registry import Registry
from core_jax.weekly import REGISTRY


def test_every_incident_is_planted_and_some_in_the_short_run():
    assert {*SCHEDULE.values()} == {*INCIDENTS} and max(SCHEDULE) < WEEKS
    assert any(week <= QUICK_WEEKS for week in SCHEDULE)


def test_a_promotion_that_a_kill_cut_short_counts_once(tmp_path):
    registry = Registry(tmp_path / REGISTRY, lambda folder: None)
    versions = []
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        versions.append(registry.publish(tmp_path / name, who="t", why="w"))
    first, second, third = versions

    def promote_killed_and_again(version):
        before = registry.production()
        registry.promote(version, who="t", why="w")
        link = tmp_path / REGISTRY / "production"
        link.unlink()
        if before:
            link.symlink_to(f"versions/{before}")
        registry.promote(version, who="t", why="w")

    for version in versions:
        promote_killed_and_again(version)
    assert sum(record["action"] == "promote" for record in registry.history()) == 6
    weeks = [
        {"candidate": candidate, "decisions": {"gate": said}}
        for candidate, said in ((second, "promote"), ("x", "hold"), ("y", "block"), (third, "promote"))
    ]
    check_history(tmp_path, weeks)
    with pytest.raises(AssertionError, match="are not the gate's"):
        check_history(tmp_path, weeks[:-1])
