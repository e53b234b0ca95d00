import collections

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from afrl_jax.batch_plan import PREFIXES, plan, row_sizes, shapes, slots_of
from lm_jax.rows import rounded_width

ITEMS = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 40), st.sampled_from("ab")), min_size=1, max_size=120)


@settings(deadline=None)
@given(ITEMS, st.sampled_from([64, 256, 1024]), st.sampled_from([1, 2, 8]))
def test_every_item_has_one_place_and_fits(items, budget, rows):
    lengths, prefix_of, kinds = map(list, zip(*items, strict=True))
    batches = plan(lengths, prefix_of, kinds, budget=budget, rows=rows)
    places = collections.Counter(item for batch in batches for item in batch.items)
    assert places == dict.fromkeys(range(len(items)), 1)
    known = {shape.shape for shape in shapes(rows, longest=max(lengths), budget=budget)}
    for batch in batches:
        assert len(batch.rows) == rows and batch.first in batch.items
        assert len({kinds[i] for i in batch.items}) == 1
        assert len({prefix_of[i] for i in batch.items}) <= batch.prefixes
        assert max(lengths[i] for i in batch.items) <= batch.width
        for row in batch.rows:
            assert sum(lengths[i] for i in row) <= batch.tokens and len(row) <= batch.slots
        assert batch.shape in known, "warming up would miss it"


WIDTHS = [(1, 32), (32, 32), (33, 48), (48, 48), (49, 64), (65, 96), (97, 128), (129, 192), (1024, 1024), (1025, 1536)]


@pytest.mark.parametrize(("length", "width"), WIDTHS)
def test_widths_are_two_an_octave(length, width):
    assert rounded_width(length) == width


def test_rows_are_full_until_the_last():
    lengths = [30 + 7 * i % 61 for i in range(100)]
    batches = plan(lengths, [0] * 100, [0] * 100, budget=1024)
    assert sum(batch.tokens for batch in batches) < 1.08 * sum(lengths)
    assert all(batch.prefixes == 1 for batch in batches)
    assert [batch.tokens for batch in batches[:-1]] == [1024] * (len(batches) - 1)
    # Of a batch, attention sees lines that are at most a third longer than its tokens.
    assert all(batch.slots * batch.width <= 4 / 3 * batch.tokens + batch.width for batch in batches)


def test_one_short_item_pays_for_a_short_row():
    (batch,) = plan([20], [0], [0], budget=4096)
    assert batch.shape == (1, 64, 32, slots_of(64, 32), 1)
    (batch,) = plan([5000], [0], [0], budget=4096)
    assert batch.tokens == 8192 and batch.width == 6144
    assert row_sizes(1024) == [64, 128, 256, 512, 1024]


def test_long_and_short_items_do_not_share_a_row():
    batches = plan([250, *[20] * 40], [0] * 41, [0] * 41, budget=1024)
    assert [batch.items for batch in batches] == [[0], list(range(1, 41))]


def test_a_batch_holds_few_prefixes():
    batches = plan([10] * 200, list(range(100)) * 2, [0] * 200, budget=1024)
    for batch in batches:
        assert len({item % 100 for item in batch.items}) <= PREFIXES
    # Items of one prefix come together wherever they stand.
    assert sum(len({item % 100 for item in batch.items}) for batch in batches) <= 100 + len(batches)


def test_devices_share_a_small_batch():
    (batch,) = plan([40] * 8, [0] * 8, [0] * 8, budget=1024, rows=4)
    assert batch.tokens == 128 and list(map(len, batch.rows)) == [3, 3, 2, 0]  # whole items do not divide evenly
