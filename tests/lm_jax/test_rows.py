import collections

import numpy as np
import pytest

from lm_jax.rows import Branch, Group, RowShape, empty_row, plan_rows, render_row, stack

SHAPE = RowShape(24, 10, 3, ("weight",), (("unit", ()), ("reward", (2,))))


def branch(first: int, inputs: int, targets: int, slot: bool = True) -> Branch:
    """Inputs first, first + 1, ...; targets 100 more than the inputs that predict them."""
    ids = np.arange(first, first + inputs)
    return Branch(
        ids,
        ids[inputs - targets :] + 100,
        np.arange(targets) % 2,
        {"weight": np.arange(targets) + 1.0},
        {"unit": float(first), "reward": np.array([first, -first])} if slot else None,
    )


GROUPS = [
    Group(np.array([1, 2, 3]), [branch(10, 4, 2), branch(20, 3, 1), branch(30, 5, 5)]),
    Group(np.zeros(0, int), [branch(40, 6, 3, slot=False)]),
    Group(np.array([4]), [branch(50, 2, 0)]),
]


def test_a_row_is_laid_out_as_the_decoder_reads_it():
    row = render_row(GROUPS, [(0, (2, 0)), (2, (0,))], RowShape(20, 9, 4, SHAPE.token_values, SHAPE.label_values))
    pad = [0] * 5
    np.testing.assert_array_equal(row["tokens"], [1, 2, 3, 30, 31, 32, 33, 34, 10, 11, 12, 13, 4, 50, 51, *pad])
    np.testing.assert_array_equal(row["positions"], [0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 5, 6, 0, 1, 2, *pad])
    np.testing.assert_array_equal(row["groups"], [1] * 12 + [2] * 3 + pad)
    np.testing.assert_array_equal(row["branches"], [0] * 3 + [1] * 5 + [2] * 4 + [0, 1, 1, *pad])
    np.testing.assert_array_equal(row["at"], [3, 4, 5, 6, 7, 10, 11, 0, 0])
    np.testing.assert_array_equal(row["target"], [130, 131, 132, 133, 134, 112, 113, 0, 0])
    np.testing.assert_array_equal(row["segment"], [0, 1, 0, 1, 0, 0, 1, -1, -1])
    np.testing.assert_array_equal(row["weight"], [1, 2, 3, 4, 5, 1, 2, 0, 0])
    # A slot stands where the first target is predicted, or at the last input where nothing is.
    np.testing.assert_array_equal(row["label_at"], [3, 10, 14, 0])
    np.testing.assert_array_equal(row["unit"], [30, 10, 50, 0])
    np.testing.assert_array_equal(row["reward"], [[30, -30], [10, -10], [50, -50], [0, 0]])
    assert {name: x.dtype for name, x in row.items() if x.dtype != np.int32} == {
        "weight": np.float32, "unit": np.float32, "reward": np.float32,
    }  # fmt: skip


def test_targets_may_stand_anywhere_and_the_slot_is_with_the_first():
    targets = np.array([7, 8, 9])
    asked = Branch(np.arange(10, 15), targets, np.zeros(3, int), {}, {"unit": 1.0}, at=np.array([3, 4, 0]))
    row = render_row([GROUPS[2], Group(np.array([1, 2]), [asked])], [(0, (0,)), (1, (0,))], SHAPE)
    np.testing.assert_array_equal(row["at"], [8, 9, 5, *[0] * 7])  # after 3 tokens of the first group and the trunk
    np.testing.assert_array_equal(row["tokens"][row["at"][:3]], [13, 14, 10])
    np.testing.assert_array_equal(row["target"][:3], targets)
    np.testing.assert_array_equal(row["label_at"], [2, 8, 0])


def test_a_row_of_padding_is_seen_by_nothing():
    row = empty_row(SHAPE)
    assert not row["groups"].any() and not row["unit"].any() and not row["weight"].any()
    assert (row["segment"] == -1).all()
    batch = stack([row, render_row(GROUPS, [(1, (0,))], SHAPE)])
    assert batch["reward"].shape == (2, 3, 2)
    np.testing.assert_array_equal(batch["tokens"][1, :6], np.arange(40, 46))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("together", [1, 2, 5])
def test_a_plan_places_every_branch_once_within_the_row(seed, together):
    rng = np.random.default_rng(seed)
    groups = []
    for trunk, inputs, branches in rng.integers((0, 1, 1), (5, 9, 7), (30, 3)).tolist():
        groups.append(Group(np.zeros(trunk, int), [branch(10, inputs, min(inputs, 3))] * branches))
    plan = plan_rows(groups, SHAPE, branches_together=together, seed=seed)
    placed = collections.Counter((index, b) for row in plan for index, chosen in row for b in chosen)
    assert placed == collections.Counter((i, b) for i, group in enumerate(groups) for b in range(len(group.branches)))
    assert max(len(chosen) for row in plan for _, chosen in row) <= together
    for row in plan:
        rendered = render_row(groups, row, SHAPE)  # raises where something does not fit
        used = sum(len(groups[i].trunk) + sum(len(groups[i].branches[b].inputs) for b in chosen) for i, chosen in row)
        assert (rendered["groups"] > 0).sum() == used
    assert plan == plan_rows(groups, SHAPE, branches_together=together, seed=seed)
    assert plan != plan_rows(groups, SHAPE, branches_together=together, seed=seed + 1)


def test_packing_wastes_little():
    groups = [Group(np.zeros(0, int), [branch(10, 1 + n % 12, 1, slot=False)]) for n in range(240)]
    plan = plan_rows(groups, RowShape(24, 24, 1), branches_together=1, seed=0)
    assert 240 * 6.5 / (24 * len(plan)) > 0.95


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (Group(np.zeros(20, int), [branch(1, 5, 1)]), "group 1 needs a row of 25 tokens, 1 targets and 1 label slots"),
        (Group(np.zeros(0, int), [branch(1, 11, 11)]), "needs a row of 11 tokens, 11 targets and 1 label slots; rows"),
    ],
)
def test_what_fits_no_row_is_named(group, message):
    with pytest.raises(ValueError, match=message):
        plan_rows([GROUPS[0], group], SHAPE, branches_together=2, seed=0)
