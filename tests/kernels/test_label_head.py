import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.label_head import label_head, pallas_tpu, reference

EPSILON = 1e-5


@pytest.fixture(scope="module", autouse=True)
def small_tiles():
    """Tiles of 8 rows and 16 vocabulary entries, so that few numbers reach past a tile's edge."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_tpu, "TILES", ((8, 16),))
        patch.setattr(reference, "TILE", 16)
        yield


@functools.partial(jax.jit, static_argnames=("label_ids", "labels_only"))
def head_of(*arrays, label_ids, labels_only=False):
    return label_head(*arrays, label_ids, epsilon=EPSILON, labels_only=labels_only)


def inputs(B, T, Q, D, V, seed=0):
    random = np.random.default_rng(seed)
    residual, norm, head = random.normal(size=(B, T, D)), random.normal(1, 0.1, D), random.normal(size=(V, D))
    at = random.integers(0, T, (B, Q), dtype=np.int32)
    return residual.astype(np.float32), at, norm.astype(np.float32), head.astype(np.float32)


def exact(residual, at, norm, head, label_ids, labels_only=False):
    """In float64, by the definition."""
    x = np.take_along_axis(residual, at[..., None], axis=1).astype(np.float64)
    x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPSILON) * norm
    weights = np.exp(x @ head.astype(np.float64).T)
    labels, everything = weights[..., list(label_ids)], weights.sum(-1)
    if labels_only:
        return np.log(labels / labels.sum(-1, keepdims=True)), np.full(at.shape, -np.inf)
    outside = np.delete(weights, list(label_ids), axis=-1).sum(-1)
    with np.errstate(divide="ignore"):
        return np.log(labels / everything[..., None]), np.log(outside / everything)


def assert_close(found, expected):
    assert [x.dtype for x in found] == [np.float32, np.float32]
    for ours, theirs in zip(found, expected, strict=True):
        # float32 sums of up to 24 products, logits up to 15; 4e-6 observed
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


@settings(max_examples=4)
@given(
    rows=st.sampled_from([(1, 1, 1), (7, 2, 1), (4, 3, 2), (3, 1, 3)]),  # B, T, Q: 1, 7, 8 and 9 positions
    vocabulary=st.sampled_from([5, 15, 16, 17, 40]),
    data=st.data(),
)
def test_values(run, rows, vocabulary, data):
    ids = st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=5, unique=True)
    label_ids = tuple(data.draw(ids))
    arrays = inputs(*rows, 24, vocabulary)
    found = run(functools.partial(head_of, label_ids=label_ids), *arrays)
    assert_close(found, exact(*arrays, label_ids))


def test_a_vocabulary_of_labels_alone_leaves_nothing_outside(run):
    arrays = inputs(3, 4, 3, 8, 3)
    logprob, outside = run(functools.partial(head_of, label_ids=(2, 0, 1)), *arrays)
    assert_close((logprob, outside), exact(*arrays, (2, 0, 1)))
    assert np.all(outside == -np.inf)


@pytest.mark.parametrize(("rows", "label_ids"), [((1, 1, 1), (4,)), ((3, 4, 3), (16, 3, 0))])
def test_labels_only_is_a_softmax_over_the_labels(run, rows, label_ids):
    arrays = inputs(*rows, 24, 17)
    found = run(functools.partial(head_of, label_ids=label_ids, labels_only=True), *arrays)
    assert_close(found, exact(*arrays, label_ids, labels_only=True))


def test_what_is_outside_is_exact_where_almost_all_mass_is_on_the_labels(run):
    """1 - sum(p) would be 0 or negative here."""
    residual, at, norm, head = inputs(3, 1, 1, 24, 40)
    head[7] = 3 * residual[0, 0]
    residual[:] = residual[0]
    logprob, outside = run(functools.partial(head_of, label_ids=(7,)), residual, at, norm, head)
    expected = exact(residual, at, norm, head, (7,))
    assert np.all(expected[1] < -40)
    np.testing.assert_allclose(outside, expected[1], rtol=1e-5)
    np.testing.assert_allclose(logprob, 0, atol=1e-6)


def test_bfloat16_operands_are_multiplied_exactly_and_summed_in_float32(run):
    residual, at, norm, head = inputs(4, 3, 2, 24, 40)
    residual, head = (jnp.asarray(x, jnp.bfloat16) for x in (residual, head))
    found = run(functools.partial(head_of, label_ids=(1, 5)), residual, at, norm, head)
    expected = exact(np.asarray(residual, np.float32), at, norm, np.asarray(head, np.float32), (1, 5))
    assert found[0].dtype == found[1].dtype == np.float32
    for ours, theirs in zip(found, expected, strict=True):
        # the normed rows are rounded to bfloat16, 2^-9 each, before 24 products of size 1
        np.testing.assert_allclose(ours, theirs, atol=0.03, rtol=0)


def test_two_cores_share_the_rows_without_a_race(interpreted):
    arrays = inputs(4, 3, 4, 8, 12)
    kernel = functools.partial(label_head, label_ids=(3, 1), epsilon=EPSILON, implementation="pallas_tpu")
    assert_close(interpreted(jax.jit(kernel), *arrays, cores=2), exact(*arrays, (3, 1)))


@pytest.mark.parametrize("label_ids", [(), (1, 1), (-1, 2), (2, 17)])
def test_label_ids_that_are_no_labels_are_refused(label_ids):
    with pytest.raises(ValueError, match=r"different token ids in \[0, 17\)"):
        label_head(*inputs(1, 1, 1, 8, 17), label_ids, epsilon=EPSILON)
