"""Queries and documents of clips read back from their texts alone: a labeller that never saw how a pair was made."""

from __future__ import annotations

import functools

from afrl_jax.data.clips_catalogue import FEATURES, Clip
from afrl_jax.data.clips_queries import GENERIC_NOUNS, OPENERS, TYPOS, phrases, values
from afrl_jax.data.clips_rules import ATTRIBUTES, Constraint, Intent
from afrl_jax.schema import Document

_SPELLING = {typo: word for word, typo in TYPOS.items()}
_LONGEST_PHRASE = 5  # words


@functools.cache
def _meanings() -> dict[str, Constraint]:
    return {
        words: Constraint(name, value)
        for name in ATTRIBUTES
        for value in values(name)
        for _, words in phrases(Constraint(name, value))
    }


def read_query(text: str) -> Intent:
    """The intent that the words say, misspellings undone, the longest phrase first.

    Raises:
        ValueError: a word that means nothing, or an attribute said twice.
    """
    words = [_SPELLING.get(word, word) for word in text.split()]
    opener = next((opener for opener in OPENERS if text.startswith(opener + " ")), "")
    words = words[len(opener.split()) :]
    found: dict[str, Constraint] = {}
    while words:
        for size in range(min(_LONGEST_PHRASE, len(words)), 0, -1):
            if constraint := _meanings().get(" ".join(words[:size])):
                if constraint.attribute in found:
                    raise ValueError(f"{text!r} speaks twice of {constraint.attribute}")
                found[constraint.attribute] = constraint
                break
        else:
            size = 1
            if words[0] not in GENERIC_NOUNS:
                raise ValueError(f"{words[0]!r} in {text!r} means nothing")
        words = words[size:]
    return Intent(tuple(found[name] for name in ATTRIBUTES if name in found))


def read_document(document: Document) -> Clip:
    """The clip that the document shows; KeyError where it shows no topic or kind."""
    fields = dict(document.fields)
    number = {name: int(fields[name]) if name in fields else None for name in ("minutes", "year", "season", "episode")}
    has = fields.get("has")
    return Clip(
        title=document.title,
        topic=fields["topic"].split(", ")[0],
        kind=fields["kind"],
        creator=fields.get("by"),
        language=fields.get("language"),
        level=fields.get("level"),
        audience=fields.get("for"),
        features=None if has is None else tuple(name for name in has.split(", ") if name in FEATURES),
        series=fields.get("series"),
        **number,
    )
