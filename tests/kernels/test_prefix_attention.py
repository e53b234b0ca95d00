import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels.prefix_attention import pallas_tpu, prefix_attention, suffix_starts

# B rows, T tokens, N and K heads, H head size, P prefixes of S positions: one of everything; tiles of 4 with a rest,
# grouped heads; whole tiles, a prefix for each row.
SHAPES = [(1, 1, 1, 1, 4, 1, 1), (2, 9, 4, 2, 8, 1, 5), (3, 8, 2, 2, 4, 3, 8)]

of_each = jax.jit(prefix_attention)


@pytest.fixture(scope="module", autouse=True)
def small_tiles():
    """Tiles of 4 queries and 4 keys, so that few tokens reach past a tile's edge."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("QUERIES", "PREFIX", "SUBLANES"):
            patch.setattr(pallas_tpu, name, 4)
        yield


def inputs(shape, segments, lengths, prefix_of, seed=0):
    B, T, N, K, H, P, S = shape
    random = np.random.default_rng(seed)
    floats = [random.normal(size=size) for size in ((B, T, N, H), *[(B, T, K, H)] * 2, *[(P, S, K, H)] * 2)]
    q, k, v, prefix_k, prefix_v = (x.astype(np.float32) for x in floats)
    integers = (np.array(x, np.int32) for x in (segments, lengths, prefix_of))
    segments_BT, lengths_P, prefix_of_B = integers
    return 2 * q, k, v, segments_BT, prefix_k, prefix_v, lengths_P, prefix_of_B


def exact(q, k, v, segments, prefix_k, prefix_v, lengths, prefix_of):
    """In float64, token by token: one softmax over what it may see."""
    B, T, N, H = q.shape
    mixed = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        if segments[b, t] == 0:
            continue
        start = t
        while start > 0 and segments[b, start - 1] == segments[b, t]:
            start -= 1
        head, prefix, length = n // (N // k.shape[2]), prefix_of[b], lengths[prefix_of[b]]
        seen_k = np.concatenate([prefix_k[prefix, :length, head], k[b, start : t + 1, head]]).astype(np.float64)
        seen_v = np.concatenate([prefix_v[prefix, :length, head], v[b, start : t + 1, head]])
        weight = np.exp(seen_k @ q[b, t, n] * H**-0.5)
        mixed[b, t, n] = weight @ seen_v / weight.sum()
    return mixed


@st.composite
def cases(draw):
    """A shape and what a batch of it may look like: runs of segments with padding anywhere, prefixes of any length."""
    B, T, *_, P, S = shape = draw(st.sampled_from(SHAPES[1:]))
    segment = st.lists(st.integers(0, 2), min_size=T, max_size=T)
    segments = draw(st.lists(segment, min_size=B, max_size=B))
    lengths = draw(st.lists(st.integers(0, S), min_size=P, max_size=P))
    return shape, segments, lengths, draw(st.lists(st.integers(0, P - 1), min_size=B, max_size=B))


@settings(max_examples=6)
@example((SHAPES[0], [[1]], [0], [0]))  # one token that sees itself alone
@example((SHAPES[0], [[0]], [1], [0]))  # nothing but padding
@example((SHAPES[1], [[1] * 9, [0] * 9], [5], [0, 0]))  # a suffix that fills its row, an empty row
@example(
    (SHAPES[1], [[1] * 4 + [2] * 4 + [3], [1, 1, 1, 2, 2, 2, 2, 0, 0]], [4], [0, 0])
)  # at a tile's edge, around it
@example((SHAPES[2], [[1] * 8, [1, 0, 1, 0, 2, 2, 0, 3], [7] * 8], [0, 8, 3], [2, 0, 1]))
@given(cases())
def test_values(run, case):
    arrays = inputs(*case)
    found, expected = run(of_each, *arrays), exact(*arrays)
    assert found.dtype == np.float32
    # float32 softmax of scores up to 20 over at most 17 keys; 2e-6 observed
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert np.all(found[arrays[3] == 0] == 0)


def test_what_lies_behind_a_prefix_and_in_padding_is_never_read(run):
    segments, lengths = [[0, 1, 1, 0, 0, 2, 2, 2, 0], [0] * 9], [3]
    arrays = list(inputs(SHAPES[1], segments, lengths, [0, 0]))
    expected = exact(*arrays)
    padding = arrays[3] == 0
    for array in arrays[:3]:
        array[padding] = 1e4
    arrays[4][:, 3:], arrays[5][:, 3:] = 1e4, -1e4
    np.testing.assert_allclose(run(of_each, *arrays), expected, atol=1e-5, rtol=0)


def test_large_scores_do_not_overflow(run):
    arrays = inputs(SHAPES[1], [[1] * 9, [2] * 9], [5], [0, 0])
    factor = 40  # scores up to 400, exp of which is no float32
    found = run(of_each, factor * arrays[0], *arrays[1:])
    expected = exact(factor * arrays[0], *arrays[1:])
    # float32 rounds a score of 400 by 2e-5
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)


def test_bfloat16_operands_give_bfloat16_of_a_float32_softmax(run):
    arrays = inputs(SHAPES[1], [[1] * 9, [2] * 5 + [3] * 4], [5], [0, 0])
    rounded = [jnp.asarray(x, jnp.bfloat16) if x.dtype == np.float32 else x for x in arrays]
    found = run(of_each, *rounded)
    assert found.dtype == jnp.bfloat16
    expected = exact(*(np.asarray(x, np.float32) if x.dtype == jnp.bfloat16 else x for x in rounded))
    # weights and result are rounded to bfloat16, 2^-9 each, of values up to 3
    np.testing.assert_allclose(found.astype(np.float32), expected, atol=0.02, rtol=0)


def test_two_cores_share_heads_and_rows_without_a_race(interpreted):
    arrays = inputs((2, 5, 2, 2, 4, 1, 3), [[1] * 5, [1, 1, 2, 2, 0]], [3], [0, 0])
    found = interpreted(jax.jit(lambda *x: prefix_attention(*x, implementation="pallas_tpu")), *arrays, cores=2)
    np.testing.assert_allclose(found, exact(*arrays), atol=1e-5, rtol=0)


def test_where_suffixes_start():
    segments = np.array([[1, 1, 2, 0, 2, 2, 0], [0, 0, 5, 5, 5, 4, 4]])
    np.testing.assert_array_equal(suffix_starts(segments), [[0, 0, 2, 7, 4, 4, 7], [7, 7, 2, 2, 2, 5, 5]])
