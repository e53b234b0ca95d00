import tracemalloc

import numpy as np

from lm_jax import bootstrap
from lm_jax.bootstrap import Resamples


def test_blocks_change_nothing(monkeypatch):
    counts = np.random.default_rng(3).multinomial(50, np.full(50, 1 / 50), size=40).astype(float)
    sums = np.random.default_rng(0).normal(size=(50, 2))
    for block in (1, 130, 1 << 22):
        monkeypatch.setattr(bootstrap, "BLOCK", block)
        drawn = Resamples(50, seed=3, resamples=40)
        np.testing.assert_allclose(drawn @ sums, counts @ sums, rtol=1e-12)
        np.testing.assert_allclose(drawn @ sums[:, 0], counts @ sums[:, 0], rtol=1e-12)


def test_many_queries_take_a_byte_a_count():
    tracemalloc.start()
    np.testing.assert_array_equal(Resamples(50_000, seed=0, resamples=300) @ np.ones(50_000), 50_000)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 50_000 * 300 + 2 * 9 * bootstrap.BLOCK
