"""What the service allows: sizes, times, places."""

from __future__ import annotations

import dataclasses


def _limit(default: float, meaning: str):
    return dataclasses.field(default=default, metadata={"meaning": meaning})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits of the service. Each is an argument of the command, under the same name and with the same words."""

    queue_pairs: int = _limit(2048, "pairs admitted and not yet scored, over all requests; beyond it, 429")
    batch_pairs: int = _limit(64, "pairs scored together; a longer request lets short ones pass, for a while")
    batch_wait_ms: float = _limit(4.0, "how long an idle service waits for company for the first request")
    deadline_seconds: float = _limit(30.0, "a request that takes longer is answered 504")
    max_documents: int = _limit(1000, "of a request")
    max_query_chars: int = _limit(4000, "of a query, and of its context")
    max_query_tokens: int = _limit(512, "of query and context together")
    warm_query_tokens: int = _limit(
        32, "queries of up to so many are compiled for before /ready; a longer one may hold up all while it is"
    )
    max_document_chars: int = _limit(50_000, "of a document; what the model sees is cut to its own limit of tokens")
    max_body_bytes: int = _limit(16 << 20, "of a request")
    max_explanations: int = _limit(4, "written at a time; they take turns with batches")
    max_explanation_tokens: int = _limit(256, "of an explanation")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0 and field.name != "batch_wait_ms":
                raise ValueError(f"{field.name} must be above 0; got {value}")
        if self.max_documents > self.queue_pairs:
            raise ValueError(
                f"max_documents is {self.max_documents}, but queue_pairs, the places of all requests, is only "
                f"{self.queue_pairs}: such a request could never be admitted"
            )
