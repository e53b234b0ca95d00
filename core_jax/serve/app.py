"""The application: a search with the contributions of every stage, and the page."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pydantic
from fastapi import FastAPI, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

from afrl_jax.schema import Document
from afrl_jax.serve import refusals
from afrl_jax.serve.app import CONTENT_SECURITY
from afrl_jax.serve.app import PAGE as SHARED_STYLE
from core_jax.schema import LONGEST_QUERY, Context
from core_jax.search.engine import Engine
from core_jax.search.stages import LAUNCH_A, LAUNCH_B, ORIGINAL, Result

PAGE = pathlib.Path(__file__).parent / "page"
CONSUMPTIONS = {"original": ORIGINAL, "finerank": LAUNCH_A, "all": LAUNCH_B}


class Watched(pydantic.BaseModel):
    """The document watched before the query."""

    doc_id: str = pydantic.Field(min_length=1, max_length=200)
    title: str = pydantic.Field("", max_length=1000)
    text: str = pydantic.Field("", max_length=50_000)
    fields: dict[str, str] = {}


class SearchRequest(pydantic.BaseModel):
    """A search; `consume` says which stages take the rewrite, `rewrite` is taken instead of the one in the store."""

    query: str = pydantic.Field(min_length=1, max_length=LONGEST_QUERY)
    watched: Watched | None = None
    size: int = pydantic.Field(10, ge=1, le=100)
    consume: Literal["original", "finerank", "all"] = "all"
    rewrite: str | None = pydantic.Field(None, min_length=1, max_length=1000)


class ResultBody(pydantic.BaseModel):
    """One result; see `core_jax.search.stages.Result`."""

    doc_id: str
    title: str
    text: str
    fields: dict[str, str]
    score: float
    relevance: float
    rewrite_relevance: float | None
    factor: float
    light: float
    rewrite_light: float
    recall_rank: int | None
    rewrite_recall_rank: int | None
    original_rank: int | None


class SearchResponse(pydantic.BaseModel):
    """`results` with the rewrite, if there is one to consume, and `original`, the path without."""

    query: str
    rewrite: str | None = pydantic.Field(description="what was consumed")
    reason: str = pydantic.Field(description="why it was, or why there is none")
    results: list[ResultBody]
    original: list[ResultBody]
    milliseconds: dict[str, float] = pydantic.Field(description="by stage, and in total")


def make_app(engine: Engine, about: Mapping[str, Any], examples: Sequence[Context] = ()) -> FastAPI:
    """The application of an engine.

    Args:
        about: what /info says beside the rewriter's version, a value of each a string or a number.
        examples: contexts that the page offers.
    """
    app = FastAPI(title="Search after browse", version="1")
    app.add_middleware(refusals.BodyLimit, max_bytes=1 << 20)
    refusals.install(app)

    @app.post("/search", responses=refusals.documented(413, 422, 500))
    def search(body: SearchRequest) -> SearchResponse:
        """Search: the original path, and what a rewrite makes of it."""
        watched = body.watched and Document(**body.watched.model_dump())
        found = engine.search(
            Context(body.query, watched), size=body.size, rewrite=body.rewrite, consumption=CONSUMPTIONS[body.consume]
        )
        return SearchResponse(
            query=body.query,
            rewrite=found.rewrite,
            reason=found.reason,
            results=[_body(result) for result in found.results],
            original=[_body(result) for result in found.original],
            milliseconds=found.milliseconds,
        )

    @app.get("/info")
    def info() -> dict[str, Any]:
        """What is served."""
        return {**about, "rewriter_version": engine.version() or ""}

    @app.get("/examples")
    def offered() -> list[dict[str, Any]]:
        """Contexts to try."""
        return [dataclasses.asdict(context) for context in examples]

    @app.get("/health")
    def health() -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return FileResponse(PAGE / "index.html", headers={"content-security-policy": CONTENT_SECURITY})

    app.mount("/page", StaticFiles(directory=PAGE))
    app.mount("/style", StaticFiles(directory=SHARED_STYLE))
    return app


def _body(result: Result) -> ResultBody:
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    document = fields.pop("document")
    shown = {"doc_id": document.doc_id, "title": document.title, "text": document.text}
    return ResultBody(**shown, fields=dict(document.fields), **fields)
