"""What goes wrong in a week, planted: the gate is measured by what it stops.

An incident changes what a candidate is trained on, or leaves in its weights what a longer exposure would have left
there, so that the gate sees a model folder like any other. A length-biased relevance model is deployed, so rewards and
search follow it; the gate measures with the model that the run began with. Taking the length penalty away changes
something only where it binds: `reward.free_length` must be below the length of some rewrites.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from core_jax.ratio_reward import RewardSettings
from core_jax.relevance import Pair, Relevance
from core_jax.schema import Context
from lm_jax.parameters import Parameters

_STUFFING = "best top new free full hd video clip"


@dataclasses.dataclass(frozen=True)
class Incident:
    """What is changed; what is None stays as it is.

    Attributes:
        reward: the constants of the reward.
        relevance: the deployed relevance model, for rewards and for search; the gate trusts the one of the run's start.
        text: what the candidate learns to say to a context.
        damage: the weights, from a seed.
    """

    meaning: str
    reward: Callable[[RewardSettings], RewardSettings] | None = None
    relevance: Callable[[Relevance], Relevance] | None = None
    text: Callable[[Context], str] | None = None
    damage: Callable[[Parameters, int], Parameters] | None = None


@dataclasses.dataclass(frozen=True)
class LengthBiased:
    """A relevance model that likes long queries: rel * words / (words + 12).

    The ratio pays for it: a word more lifts all documents alike, which gains through gamma (`core_jax.ratio_reward`),
    and what was at the floor stays there, which gains through S_rand.
    """

    relevance: Relevance

    @property
    def version(self) -> str:
        return f"{self.relevance.version}, length-biased"

    def __call__(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Scores float64 [N]."""
        words = np.array([len(query.split()) for query, _ in pairs], float)
        return self.relevance(pairs) * words / (words + 12)


def _without_length_penalty(settings: RewardSettings) -> RewardSettings:
    return dataclasses.replace(settings, free_length=10**6)


def _noise(parameters: Parameters, seed: int) -> Parameters:
    """A quarter of each matrix' entries replaced by noise of the same size, as bytes gone astray would."""
    damaged = {}
    for number, (name, value) in enumerate(sorted(parameters.items())):
        where, what = jax.random.split(jax.random.fold_in(jax.random.key(seed), number))
        noise = value.std() * jax.random.normal(what, value.shape, value.dtype)
        damaged[name] = jax.numpy.where(jax.random.bernoulli(where, 0.25, value.shape), noise, value)
    return damaged


INCIDENTS: Mapping[str, Incident] = {
    "length_penalty_removed": Incident("the reward has no length penalty", reward=_without_length_penalty),
    "length_biased_relevance": Incident("the deployed relevance model likes long queries", relevance=LengthBiased),
    "length_padding": Incident("says the query twice", text=lambda c: f"{c.query} {c.query}"),
    "title_copying": Incident("copies the watched title", text=lambda c: c.watched.title if c.watched else c.query),
    "keyword_stuffing": Incident("adds words that match much", text=lambda c: f"{c.query} {_STUFFING}"),
    "constant_rewrite": Incident("says the same to everybody", text=lambda c: "videos"),
    "corrupted_checkpoint": Incident("a quarter of the weights is noise", damage=_noise),
}
