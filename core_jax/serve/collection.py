"""What is searched: a table of documents, or the built-in world in some week."""

from __future__ import annotations

from pathlib import Path

from afrl_jax.data.judgment_rows import document_of
from afrl_jax.data.tables import Problems, read_rows
from afrl_jax.schema import Document
from core_jax.schema import Context
from core_jax.search.trial import session_documents
from core_jax.sessions import simulate

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


def clips_collection(week: int, seed: int = 0) -> tuple[list[Document], list[Context]]:
    """The documents of a week's held-out sessions, and some of their contexts to try."""
    truth = list(simulate(seed, "dev", week, SESSIONS))
    documents = {document.doc_id: document for each in truth for document in session_documents(each)}
    contexts = [each.session.context for each in truth if each.session.has_contrast and each.session.context.watched]
    return list(documents.values()), contexts[:EXAMPLES]
