"""Real logs and real rewrites: files to sessions and to supervised examples; bad rows are named, never dropped.

Sessions are a table (.jsonl, .jsonl.gz or .parquet), one row a search:

    {"session_id": "s1", "time": 1700000000, "query": "with chapters",
     "watched": {"doc_id": "d0", "title": "cycling interview", "language": "german"},          absent: there was nothing
     "shown": [{"doc_id": "d1", "title": "...", "text": "...", "action": "click", "weight": 1.0}, ...],
     "random": [{"doc_id": "d7", "title": "..."}, ...], "changed_query": false}

A document has `title` and, where it likes, `text` and any other field, which is shown too. `action` is "click" (opened
and stayed), "glance" (opened and left) or "none" (seen and passed over); what was not looked at is not listed. `weight`
is 1 by default; a product's own "weight" or "action" needs another name. Documents of `random` are drawn from the
catalogue without regard to the query; better some of them from what is near the watched document, as the reward then
sees what a rewrite drops (`benchmarks/reward_audit.py`).

Rewrites are a table {"utterance", "rewrite"[, "history": [...]]}: what was said before takes the place of the watched
document. `cast_rewrites` and `zh_utterance_rewrite` are such tables.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from afrl_jax.data.judgment_rows import document_of, document_row
from afrl_jax.data.tables import Problems, Row, read_rows
from afrl_jax.schema import Document
from core_jax.schema import Action, Context, SearchSession, Shown

HISTORY = 3  # of what was said before, so many turns are kept


@dataclasses.dataclass(frozen=True, slots=True)
class RewriteExample:
    """A context and how a person (or, later in the session, the searcher) put it: what a supervised start learns."""

    context: Context
    rewrite: str


def read_sessions(path: str | Path) -> list[SearchSession]:
    """The sessions of a table, in file order.

    Raises:
        DataError: every problem of the file, each with file, line and field.
    """
    problems, sessions, lines = Problems(), [], {}
    for row in read_rows(Path(path), problems):
        with problems.catch():
            session = _session(row)
            if (first := lines.setdefault(session.session_id, row.line)) != row.line:
                raise row.error("session_id", f"{session.session_id!r} is the id of line {first} already")
            sessions.append(session)
    problems.raise_if_any()
    return sessions


def read_rewrites(path: str | Path) -> list[RewriteExample]:
    """The examples of a table, in file order; raises `DataError` with every problem."""
    problems, examples = Problems(), []
    for row in read_rows(Path(path), problems):
        with problems.catch():
            history = row.value("history", ())
            if not isinstance(history, list | tuple) or not all(isinstance(turn, str) for turn in history):
                raise row.error("history", f"must be a list of strings, got {history!r}")
            said = [turn for turn in history if turn.strip()][-HISTORY:]
            watched = Document("", said[-1], "\n".join(said[:-1])) if said else None
            context = Context(row.filled_text("utterance"), watched)
            examples.append(RewriteExample(context, row.filled_text("rewrite")))
    problems.raise_if_any()
    return examples


def write_sessions(path: str | Path, sessions: Iterable[SearchSession]) -> None:
    """Write sessions as .jsonl that `read_sessions` reads back exactly."""
    with Path(path).open("w", encoding="utf-8") as file:
        for session in sessions:
            file.write(json.dumps(session_row(session), ensure_ascii=False) + "\n")


def session_row(session: SearchSession) -> dict[str, Any]:
    """The row that reads back as this session."""
    watched = session.context.watched
    return {
        "session_id": session.session_id,
        "time": session.time,
        "query": session.context.query,
        "watched": None if watched is None else document_row(watched),
        "shown": [
            {**document_row(shown.document), "action": shown.action, "weight": shown.weight} for shown in session.shown
        ],
        "random": [document_row(document) for document in session.random],
        "changed_query": session.changed_query,
    }


def _session(row: Row) -> SearchSession:
    watched = row.value("watched", None)
    changed = row.value("changed_query", False)
    if not isinstance(changed, bool):
        raise row.error("changed_query", f"must be true or false, got {changed!r}")
    return SearchSession(
        row.identifier("session_id"),
        Context(row.filled_text("query"), None if watched is None else _document(_inside(row, "watched", watched))),
        tuple(_shown(inner) for inner in _rows_inside(row, "shown")),
        tuple(_document(inner) for inner in _rows_inside(row, "random")),
        row.weight("time", default=0.0),
        changed,
    )


def _rows_inside(row: Row, field: str) -> list[Row]:
    items = row.value(field, ())
    if not isinstance(items, list | tuple):
        raise row.error(field, f"must be a list of documents, got {items!r:.80}")
    return [_inside(row, f"{field}[{place}]", item) for place, item in enumerate(items)]


def _inside(row: Row, field: str, values: Any) -> Row:
    """A document inside a row, whose errors name the row's line and the field on the way to it."""
    if not isinstance(values, Mapping):
        raise row.error(field, f"must be a document {{doc_id, title, ...}}, got {values!r:.80}")
    names = {name: f"{field}.{name}" for name in (*values, "doc_id", "title", "text", "action", "weight")}
    return Row(row.path, row.line, values, names)


def _shown(row: Row) -> Shown:
    action = row.text("action")
    if action not in set(Action):
        raise row.error("action", f"{action!r} is unknown; it is one of {', '.join(Action)}")
    kept = {name: value for name, value in row.values.items() if name not in ("action", "weight")}
    return Shown(_document(dataclasses.replace(row, values=kept)), Action(action), row.weight("weight", default=1.0))


def _document(row: Row) -> Document:
    row.identifier("doc_id")  # documents are told apart by their ids: not optional here
    return document_of(row)
