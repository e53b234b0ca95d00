"""What is searched: a table of documents, or the built-in world in some week."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from afrl_jax.data.judgment_rows import document_of
from afrl_jax.data.tables import Problems, read_rows
from afrl_jax.schema import Document
from core_jax.schema import Context
from core_jax.search.trial import session_documents
from core_jax.sessions import simulate
from core_jax.settings import Settings, read_settings

SESSIONS = 200  # of the week, as many as core_jax.weekly judges by default
EXAMPLES = 30


def read_collection(path: Path) -> list[Document]:
    """The documents of a table.

    Raises:
        afrl_jax.data.tables.DataError: bad rows, by file, line and field; an id that comes twice; no row at all.
    """
    documents: dict[str, Document] = {}
    problems = Problems()
    for row in read_rows(path, problems):
        with problems.catch():
            document = document_of(row)
            if document.doc_id in documents:
                raise row.error("doc_id", f"{document.doc_id!r} is the id of an earlier row")
            documents[document.doc_id] = document
    problems.raise_if_any()
    return list(documents.values())


def settings_of(run: Path) -> Settings:
    """The settings of a run of core_jax.main.

    Raises:
        ValueError: the folder is of no such run, or its config is wrong.
    """
    file = run / "config.json"
    if not file.exists():
        raise ValueError(f"--run: {run} is no workdir of core_jax.main: it has no config.json")
    return read_settings(json.loads(file.read_text(encoding="utf-8")))


def world_of(run: Path) -> dict[str, Any]:
    """The weeks that a run lived through, as `clips_collection` takes them; errors as those of `settings_of`."""
    settings = settings_of(run)
    like = settings.data[settings.sessions]
    same = {name: like[name] for name in ("shown", "random_documents", "near_documents", "start") if name in like}
    return {"seed": settings.seed, "drift": settings.weekly.drift, "sessions": settings.weekly.held_out, **same}


def clips_collection(
    week: int, seed: int = 0, sessions: int = SESSIONS, **like: Any
) -> tuple[list[Document], list[Context]]:
    """The documents of a week's held-out sessions, which are `like` those of `simulate`, and some contexts to try."""
    truth = list(simulate(seed, "dev", week, sessions, **like))
    documents = {document.doc_id: document for each in truth for document in session_documents(each)}
    contexts = [each.session.context for each in truth if each.session.has_contrast and each.session.context.watched]
    return list(documents.values()), contexts[:EXAMPLES]
