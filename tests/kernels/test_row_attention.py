import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels.row_attention import pallas_tpu, row_attention
from kernels.row_attention.place import place_of

# B rows, T tokens, N and K heads, H head size: one of everything; rows and grouped heads; tiles, the last one not full.
SHAPES = [(1, 1, 1, 1, 4), (2, 5, 4, 2, 8), (1, 11, 2, 1, 4)]


@pytest.fixture(scope="module", autouse=True)
def small_tiles():
    """Tiles of 4 tokens of queries and 8 of keys at most, so that few tokens reach past a tile's edge."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in {"KEYS": 8, "ROWS": 8, "LEAST": 4}.items():
            patch.setattr(pallas_tpu, name, size)
        yield


@jax.jit
def values_and_gradients(q, k, v, groups, branches, d_mixed):
    mixed, backward = jax.vjp(lambda *x: row_attention(*x, groups, branches), q, k, v)
    return mixed, *backward(d_mixed)


def inputs(shape, groups, branches, seed=0):
    B, T, N, K, H = shape
    random = np.random.default_rng(seed)
    q, k, v, d_mixed = (random.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K, K, N))
    return 2 * q, k, v, np.array(groups, np.int32), np.array(branches, np.int32), d_mixed


def exact(q, k, v, groups, branches, d_mixed):
    """Values and gradients by torch in float64, with the mask as `lm_jax.decoder` states it."""
    B, T, N, H = q.shape
    theirs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (q, k, v)]
    keys, values = (x.repeat_interleave(N // k.shape[2], dim=2) for x in theirs[1:])
    may = np.zeros((B, T, T), bool)
    for b, t, s in np.ndindex(B, T, T):
        may[b, t, s] = s <= t and groups[b, t] == groups[b, s] and branches[b, s] in (0, branches[b, t])
    score = torch.einsum("btnh,bsnh->bnts", theirs[0], keys) * H**-0.5
    score = score.masked_fill(~torch.tensor(may)[:, None], -torch.inf)
    mixed = torch.einsum("bnts,bsnh->btnh", score.softmax(-1), values)
    mixed.backward(torch.tensor(d_mixed, dtype=torch.float64))
    return [mixed.detach().numpy(), *(x.grad.numpy() for x in theirs)]


@st.composite
def rows(draw):
    """Groups of a trunk and branches one after the other, each of any length, and padding where they end."""
    B, T, *_ = shape = SHAPES[2]
    groups, branches = np.zeros((B, T), int), np.zeros((B, T), int)
    for b in range(B):
        start = 0
        for group in range(1, draw(st.integers(0, 3)) + 1):
            for branch in range(draw(st.integers(1, 4))):
                end = min(T, start + draw(st.integers(0, 5)))
                groups[b, start:end], branches[b, start:end] = group, branch
                start = end
    return shape, groups.tolist(), branches.tolist()


@settings(max_examples=2)
@example((SHAPES[0], [[1]], [[0]]))
@example((SHAPES[1], [[0] * 5, [1, 1, 1, 2, 2]], [[0] * 5, [0, 1, 2, 0, 0]]))  # a row of padding
@example((SHAPES[2], [[1] * 11], [[0] * 4 + [1] * 4 + [2] * 3]))  # at the tiles' edges
@example((SHAPES[2], [[3, 3, 1, 1, 2, 2, 2, 1, 1, 3, 3]], [[0, 1, 0, 2, 0, 1, 1, 2, 0, 1, 0]]))  # mixed up
@given(rows())
def test_values_and_gradients(run, case):
    arrays = inputs(*case)
    found = run(values_and_gradients, *arrays)
    for ours, theirs in zip(found, exact(*arrays), strict=True):
        assert ours.dtype == np.float32
        # float32 softmax of scores up to 20; 4e-6 observed
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)


def test_large_scores_do_not_overflow(run):
    q, *rest = inputs(SHAPES[2], [[1] * 11], [[0] * 5 + [1] * 3 + [2] * 3])
    arrays = 40 * q, *rest  # scores up to 400, exp of which is no float32
    for ours, theirs in zip(run(values_and_gradients, *arrays), exact(*arrays), strict=True):
        # float32 rounds a score of 400 by 2e-5, and the gradients of keys have factors up to 200
        np.testing.assert_allclose(ours, theirs, atol=5e-3, rtol=0)


def test_bfloat16_operands_give_bfloat16_of_a_float32_softmax(run):
    arrays = inputs(SHAPES[2], [[1] * 11], [[0] * 5 + [1] * 3 + [2] * 3])
    rounded = [jnp.asarray(x, jnp.bfloat16) if x.dtype == np.float32 else x for x in arrays]
    found = run(values_and_gradients, *rounded)
    expected = exact(*(np.asarray(x, np.float32) if x.dtype == jnp.bfloat16 else x for x in rounded))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        # weights, their derivatives and results are rounded to bfloat16, 2^-9 each
        np.testing.assert_allclose(ours.astype(np.float32), theirs, atol=0.01 * np.abs(theirs).max(), rtol=0)


def test_two_cores_share_rows_and_heads_without_a_race(interpreted):
    arrays = inputs((1, 5, 1, 1, 4), [[1] * 5], [[0, 0, 1, 2, 2]])
    found = interpreted(jax.jit(lambda *x: row_attention(*x, implementation="pallas_tpu")), *arrays[:-1], cores=2)
    np.testing.assert_allclose(found, exact(*arrays)[0], atol=1e-5, rtol=0)


def test_tiles_of_other_branches_and_groups_are_left_out():
    """A trunk of two tiles, three branches of one, another group of two: by hand."""
    groups = np.repeat([[1, 2]], [20, 8], axis=1)
    branches = np.repeat([[0, 1, 2, 3, 0]], [8, 4, 4, 4, 8], axis=1)
    seen = pallas_tpu._seen_tiles(place_of(groups, branches), queries=4, keys=4)
    expected = ["1......", "11.....", "111....", "11.1...", "11..1..", ".....1.", ".....11"]
    assert ["".join(".1"[int(x)] for x in line) for line in seen[0]] == expected
    loaded = pallas_tpu._loaded(seen).reshape(7, 7)
    assert loaded[3].tolist() == [0, 1, 1, 3, 3, 3, 3]
    assert loaded[5].tolist() == [5] * 7
