"""A small world of judged pairs and the ideal reader of it."""

import pytest

from afrl_jax.data import clips_rulebooks
from afrl_jax.instructions.ideal_reader import IdealReader
from afrl_jax.instructions.identify import Table


@pytest.fixture(scope="session")
def decided():
    """Sets of decided pairs by name."""
    return {
        "dev_new": clips_rulebooks.decided_groups(0, "dev", 90, 6, rule_balance=0.7),
        "dev_replay": clips_rulebooks.decided_groups(1, "dev", 60, 6, rule_balance=0.7),
        "test": clips_rulebooks.decided_groups(2, "test", 90, 6, rule_balance=0.7),
    }


@pytest.fixture(scope="session")
def sets(decided):
    return {name: [one.judgment for one in some] for name, some in decided.items()}


@pytest.fixture(scope="session")
def ideal(decided):
    return IdealReader(one for some in decided.values() for one in some)


@pytest.fixture(scope="session")
def table(sets):
    return Table(sets["dev_new"])
