"""Requests and responses as they travel.

Requests take what clients of Cohere, Jina, vLLM and SGLang send; what we know nothing of is ignored, as they do.
Responses have what these clients parse, and besides: `grade`, `grade_probs`, `calibrated` and `model_version`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import AliasChoices, BaseModel, Field

from afrl_jax.data.tables import as_text
from afrl_jax.schema import Document, Query
from afrl_jax.serve.refusals import Refused
from afrl_jax.serve.scorer import Graded
from afrl_jax.serve.settings import Settings

_FIELD_TYPES = ["string", "number", "boolean", "array", "null"]
FieldValue = Annotated[Any, pydantic.WithJsonSchema({"type": _FIELD_TYPES, "items": {"type": "string"}})]


class Body(BaseModel):
    """A request; a field that is null is as good as absent."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given


class DocumentFields(BaseModel, extra="allow"):
    """A document in parts. Any further field - text, a number or a list of these - is shown to the model as "name:
    value", in the order given."""

    title: str | None = None
    text: str | None = None
    __pydantic_extra__: dict[str, FieldValue]


DocumentBody = str | DocumentFields
Model = Annotated[str | None, Field(description="not looked at: one model is served, which the answer names")]
Context = Annotated[str, Field(description="what the searcher did before, where the model was trained with that")]


class RerankRequest(Body):
    """A query and its candidates."""

    model: Model = None
    query: str = Field(min_length=1, examples=["chess for kids"])
    context: Context = ""
    # The first wrong one is told: as many errors as documents could be more than the memory holds.
    documents: list[DocumentBody] = Field(
        min_length=1, fail_fast=True, examples=[["Sourdough at home", "Chess openings, explained to children"]]
    )
    top_n: int | None = Field(None, ge=0, description="how many of the best to answer; 0 or none: all")
    return_documents: bool = Field(True, description="whether to repeat each document's text in the answer")
    rank_fields: Annotated[list[str], Field(fail_fast=True)] | None = Field(
        None, description="of documents with fields, those to be shown to the model; each document has one at least"
    )
    max_tokens_per_doc: int | None = Field(None, ge=1, description="cut documents to so many tokens of their own")


class Usage(BaseModel):
    """Tokens of the prompts, shared prefixes counted for each pair."""

    prompt_tokens: int
    total_tokens: int


class Grade(BaseModel):
    """The grade of a pair."""

    grade: str = Field(description="the decided label of the scale")
    grade_probs: dict[str, float] = Field(description="probability of each label, least relevant first")


class Told(BaseModel):
    """What every answer tells of the model."""

    id: str
    model: str
    model_version: str = Field(description="digest of the weights; empty for a model that was not exported here")
    calibrated: bool = Field(description="whether scores and probabilities are those of a fitted calibration")
    usage: Usage


class RerankResult(Grade):
    """One candidate."""

    index: int = Field(description="its place in the request")
    relevance_score: float = Field(description="expected grade, from 0, the least relevant grade, to 1")
    document: dict[str, Any] | None = Field(None, description="its text, and its other fields")


class RerankResponse(Told):
    """Candidates, the most relevant first; equal ones keep their order."""

    object: Literal["list"] = "list"
    results: list[RerankResult]
    meta: dict[str, Any] = Field(description="what Cohere's clients count")


FIRST, SECOND = ("text_1", "data_1", "queries"), ("text_2", "data_2", "documents", "items")


class PairsRequest(Body):
    """Pairs of texts: one with one, one with many, or as many with as many."""

    model: Model = None
    text_1: str | Annotated[list[str], Field(fail_fast=True)] = Field(
        validation_alias=AliasChoices(*FIRST), examples=["chess for kids"]
    )
    text_2: DocumentBody | Annotated[list[DocumentBody], Field(fail_fast=True)] = Field(
        validation_alias=AliasChoices(*SECOND), examples=[["Chess openings", "Bread"]]
    )
    _names: tuple[str, str] = (FIRST[0], SECOND[0])

    @property
    def names(self) -> tuple[str, str]:
        """What the client called text_1 and text_2."""
        return self._names

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _with_names(cls, given: Any, validate: pydantic.ModelWrapValidatorHandler[PairsRequest]) -> PairsRequest:
        made = validate(given)
        first, second = (next(name for name in names if given.get(name) is not None) for names in (FIRST, SECOND))
        made._names = first, second
        return made


class ItemsRequest(Body):
    """A query and items; the answer is a probability for each label."""

    model: Model = None
    query: str = Field(min_length=1, examples=["chess for kids"])
    items: DocumentBody | Annotated[list[DocumentBody], Field(fail_fast=True)] = Field(
        examples=[["Chess openings", "Bread"]]
    )
    label_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = Field(
        None, min_length=1, description="which labels, by their tokens, in which order; all of the scale by default"
    )
    apply_softmax: bool = Field(False, description="whether the probabilities of the chosen labels are to sum to 1")
    item_first: Literal[False] = Field(False, description="the document comes last in our prompts, always")


def _form(body: Any) -> str:
    return "items_of_query" if isinstance(body, dict) and body.get("query") is not None else "pairs"


ScoreRequest = Annotated[
    Annotated[PairsRequest, pydantic.Tag("pairs")] | Annotated[ItemsRequest, pydantic.Tag("items_of_query")],
    pydantic.Discriminator(_form),
]


class ScoreResult(Grade):
    """One pair."""

    index: int
    object: Literal["score"] = "score"
    score: float = Field(description="expected grade, from 0 to 1")


class PairsResponse(Told):
    """One result a pair, in the order of the request."""

    object: Literal["list"] = "list"
    created: int
    data: list[ScoreResult]


class ItemsResponse(Told):
    """One row an item, in the order of the request: the probability of each label."""

    object: Literal["scoring"] = "scoring"
    labels: list[str]
    scores: list[list[float]]


class RelevanceRequest(Body):
    """One pair."""

    model: Model = None
    query: str = Field(min_length=1, examples=["chess for kids"])
    context: Context = ""
    document: DocumentBody = Field(examples=["Chess openings, explained to children"])
    explain: bool = Field(False, description="stream the explanation after the grade, as server-sent events")
    max_tokens: int | None = Field(None, ge=1, description="of the explanation; the service has a limit of its own")


class RelevanceResponse(Told, Grade):
    """The grade of one pair."""

    object: Literal["relevance"] = "relevance"
    score: float = Field(description="expected grade, from 0 to 1")


def to_query(text: str, context: str, settings: Settings, name: str = "query") -> Query:
    """The query, if it can be shown to the model.

    Raises:
        Refused: 422, it is blank, or it or its context is too long, or no text.
    """
    if not text.strip():
        raise Refused(422, f"{name}: a query is empty", param=name)
    _check_text(name, text, settings.max_query_chars)
    _check_text("context", context, settings.max_query_chars)
    return Query("", text, context)


def to_documents(
    bodies: list[DocumentBody], settings: Settings, name: str, rank_fields: list[str] | None = None
) -> list[Document]:
    """The documents of a request, the i-th under the name `name[i]` in error messages.

    Raises:
        Refused: 422, there are none or too many, or as `to_document` says.
    """
    if not 1 <= len(bodies) <= settings.max_documents:
        raise Refused(422, f"{name}: {len(bodies)} of them; 1 to {settings.max_documents} are allowed", param=name)
    return [to_document(body, settings, f"{name}[{index}]", rank_fields) for index, body in enumerate(bodies)]


def to_document(body: DocumentBody, settings: Settings, name: str, rank_fields: list[str] | None = None) -> Document:
    """A document of a request, which has it under that name.

    Raises:
        Refused: 422, it is too long, nested, or no text, or has none of the `rank_fields`.
    """
    fields = {"text": body} if isinstance(body, str) else _fields(body, name)
    # All of it is repeated in the answer, also what is not shown to the model.
    written = body if isinstance(body, str) else "".join([*fields, *fields.values()])
    _check_text(name, written, settings.max_document_chars)
    if rank_fields is not None and not isinstance(body, str):
        fields = {field: value for field, value in fields.items() if field in rank_fields}
        if not fields:
            raise Refused(422, f"{name}: has none of the rank_fields", param=name)
    return Document("", fields.pop("title", ""), fields.pop("text", ""), fields)


def _check_text(name: str, text: str, limit: int) -> None:
    if len(text) > limit:
        raise Refused(422, f"{name}: {len(text)} characters; {limit} are allowed", param=name)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise Refused(422, f"{name}: has half of a surrogate pair, which is no text", param=name)


def shown(body: DocumentBody) -> dict[str, Any]:
    """A document as it is repeated in an answer: it has a `text` at least."""
    if isinstance(body, str):
        return {"text": body}
    given = body.model_dump(exclude_unset=True)
    return given | {"text": given.get("text") or given.get("title") or ""}


def graded_fields(graded: Graded) -> dict[str, Any]:
    """The fields of `Grade`."""
    return {"grade": graded.grade, "grade_probs": graded.grade_probs}


def _fields(body: DocumentFields, name: str) -> dict[str, str]:
    """Its fields as the readers of data would show them: as text, its id and null ones left out.

    Raises:
        Refused: 422, a field is nested.
    """
    given = {"title": body.title, "text": body.text} | (body.__pydantic_extra__ or {})
    fields = {field: as_text(value) for field, value in given.items() if value is not None and field != "doc_id"}
    for field, text in fields.items():
        if text is None:
            told = "must be text, a number or a list of these"
            raise Refused(422, f"{name}.{field}: {told}", param=f"{name}.{field}")
    return fields
