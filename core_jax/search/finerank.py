"""Finerank: the deployed relevance model, asked from the threads of a server."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from afrl_jax.schema import Query
from afrl_jax.scoring import RelevanceModel
from core_jax.relevance import Pair


class Finerank:
    """A `core_jax.relevance.Relevance`: calibrated expected grades, nothing cached, one call at a time.

    The same pairs in the same call get the same bits, which a cache filled by other calls could not promise.

    Attributes:
        version: the digest of the model's weights.
    """

    def __init__(self, model: RelevanceModel):
        self.version, self._model, self._turn = model.version, model, threading.Lock()

    def __call__(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Scores float64 [N] in [0, 1]."""
        asked = [(Query("", query), document) for query, document in pairs]
        with self._turn:  # two computations at once would share the same cores and both be late
            return self._model.predict(asked)
