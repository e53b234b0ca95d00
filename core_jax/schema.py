"""The nouns of search after browse: context, shown document, search session.

Plain immutable records. The built-in world and the log readers produce them; the rewriter, its reward, the gate and the
search engine only read them. What the searcher truly wanted is not here: only the built-in world knows it, and only the
independent judge may look.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib

from afrl_jax.schema import Document

LONGEST_QUERY = 1000  # characters; searches refuse a longer one, so no rewrite is made for it


class Action(enum.StrEnum):
    """What the searcher did with a shown document."""

    CLICK = "click"  # strict: opened and stayed
    GLANCE = "glance"  # opened and left at once; neither wanted nor refused
    NONE = "none"  # seen and passed over


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """What a rewrite may depend on: the query as typed and the document watched before it (None: there was none)."""

    query: str
    watched: Document | None = None

    @property
    def key(self) -> str:
        """A digest of query and watched document's id, 32 hex digits: under it a rewrite is stored and found again."""
        watched = "" if self.watched is None else self.watched.doc_id
        return hashlib.sha256(f"{len(self.query)}:{self.query}{watched}".encode()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True, slots=True)
class Shown:
    """One shown document. `weight` counts in the reward's means: of a click its worth, of no action how surely it was
    seen; a finite number of at least 0."""

    document: Document
    action: Action
    weight: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class SearchSession:
    """One search after one browse.

    `shown` in the order of the result list, `random` documents drawn from the catalogue without regard to the query,
    `time` in seconds since 1970, `changed_query` whether the searcher gave up and typed another query.
    """

    session_id: str
    context: Context
    shown: tuple[Shown, ...]
    random: tuple[Document, ...]
    time: float
    changed_query: bool = False

    @property
    def clicked(self) -> tuple[Shown, ...]:
        """The strictly clicked documents."""
        return self._with(Action.CLICK)

    @property
    def skipped(self) -> tuple[Shown, ...]:
        """The documents that were seen and passed over."""
        return self._with(Action.NONE)

    @property
    def has_contrast(self) -> bool:
        """Whether clicks, skips and random documents all have weight: then the ratio reward is defined."""
        return bool(self.random) and all(sum(s.weight for s in part) > 0 for part in (self.clicked, self.skipped))

    def _with(self, action: Action) -> tuple[Shown, ...]:
        return tuple(shown for shown in self.shown if shown.action is action)
