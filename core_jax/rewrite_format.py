"""The prompt of the rewriter and how its answer is read.

    Rewrite the search so that it says all that is wanted.     one line; then what was watched, then the query
    Watched: cycling interview                                 left out where there was nothing
    language: german
    Query: with chapters
    Rewrite: _                                                 the rewrite and end of text follow

The two parts (up to the query; the query and the slot) are tokenized apart and joined as ids, as in the answer-first
format. Truncation shortens the watched document alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import numpy as np

from afrl_jax.answer_format import one_line, render_document
from core_jax.ratio_reward import Rewrite
from core_jax.schema import Context
from lm_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Template:
    """The fixed strings of a prompt. Travels with a rewriter, in rewriter.json, under its checksum."""

    task: str = "Rewrite the search so that it says all that is wanted."
    watched: str = "\nWatched: "
    query: str = "\nQuery: "
    slot: str = "\nRewrite:"

    @property
    def checksum(self) -> str:
        """First 16 hex digits of the SHA-256 of the template's canonical JSON."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]


class RewriteFormat:
    """Template and tokenizer together: contexts to tokens, and tokens to rewrites.

    Args:
        max_watched_tokens: the watched document is cut to so many tokens.

    Raises:
        ValueError: the tokenizer has no end-of-text token.
    """

    def __init__(self, tokenizer: Tokenizer, *, template: Template | None = None, max_watched_tokens: int = 128):
        if tokenizer.eos is None:
            raise ValueError("the tokenizer has no end-of-text token, which ends rewrites")
        self.tokenizer, self.template = tokenizer, template or Template()
        self.max_watched_tokens = max_watched_tokens

    def texts(self, context: Context) -> tuple[str, str]:
        """(task and watched document, query and slot), before truncation."""
        watched = "" if context.watched is None else self.template.watched + render_document(context.watched)
        return self.template.task + watched, self.template.query + one_line(context.query) + self.template.slot

    def encode_prompts(self, contexts: Sequence[Context]) -> list[np.ndarray]:
        """int32 tokens of each prompt, the last of which predicts the rewrite's first."""
        parts = [part for context in contexts for part in self.texts(context)]
        encoded = self.tokenizer.encode_batch(parts)
        head = len(self.tokenizer.encode(self.template.task))
        return [
            np.array([*first[: head + self.max_watched_tokens], *second], np.int32)
            for first, second in zip(encoded[::2], encoded[1::2], strict=True)
        ]

    def encode_rewrite(self, text: str, *, ended: bool = True) -> np.ndarray:
        """int32 tokens of a rewrite after the slot, with end of text unless it was cut off."""
        tokens = self.tokenizer.encode(" " + one_line(text))
        return np.array([*tokens, self.tokenizer.eos] if ended else tokens, np.int32)

    def read(self, tokens: np.ndarray) -> Rewrite:
        """Generated tokens, end of text included where there is one, as a rewrite.

        One with a special token before its end is no text, and counts as cut off.
        """
        ended = len(tokens) > 0 and tokens[-1] == self.tokenizer.eos
        said = (tokens[:-1] if ended else tokens).tolist()
        text = one_line(self.tokenizer.decode(said))
        return Rewrite(text, len(said), truncated=not ended or not self.tokenizer.special.isdisjoint(said))

    def length(self, text: str) -> int:
        """Tokens of a text as the reward counts them."""
        return len(self.encode_rewrite(text, ended=False))

    def plain_texts(self, context: Context, rewrite: str) -> list[str]:
        """Prompt and rewrite as text, to train a tokenizer on."""
        return [*self.texts(context), " " + one_line(rewrite)]
