"""What each address answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

import prometheus_client
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import Receive, Scope, Send

from afrl_jax.answer_format import parse_answer
from afrl_jax.serve import wire
from afrl_jax.serve.keys import ANYBODY, Client
from afrl_jax.serve.monitoring import log
from afrl_jax.serve.refusals import ErrorBody, Refused, documented, key_needed
from afrl_jax.serve.scorer import Graded
from afrl_jax.serve.service import Answer, Service

bearer = HTTPBearer(auto_error=False, description="an API key, where the service was started with keys")
scoring = APIRouter(tags=["scoring"], responses=documented(401, 413, 422, 429, 500, 503, 504))
about = APIRouter(tags=["about"])


def service_of(request: Request) -> Service:
    """The service of the application."""
    return request.app.state.service


def client_of(
    request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)] = None
) -> Client:
    """Who asks.

    Raises:
        Refused: 401, keys are asked for and this is none of them.
    """
    service = service_of(request)
    if not service.keys:
        return ANYBODY
    client = service.keys.client(given.credentials) if given else None
    if client is None:
        raise key_needed()
    return client


ServiceHere = Annotated[Service, Depends(service_of)]
ClientHere = Annotated[Client, Depends(client_of)]


def told(service: Service, request: Request, answer: Answer) -> dict[str, Any]:
    """The fields of `wire.Told`."""
    tokens = answer.tokens
    return {
        "id": request.state.record.request_id,
        "model": service.name,
        "model_version": service.scorer.model.version,
        "calibrated": service.scorer.calibrated,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


@scoring.post("/v1/rerank")
@scoring.post("/v2/rerank")
@scoring.post("/rerank")
async def rerank(
    body: wire.RerankRequest, request: Request, service: ServiceHere, client: ClientHere
) -> wire.RerankResponse:
    """Order candidates by relevance to a query: for clients of Cohere, Jina and vLLM."""
    query = wire.to_query(body.query, body.context, service.settings)
    documents = wire.to_documents(body.documents, service.settings, "documents", body.rank_fields)
    pairs = [(query, document) for document in documents]
    answer = await service.score(request, client, pairs, max_document_tokens=body.max_tokens_per_doc)
    graded = service.scorer.graded(answer.probabilities)
    order = sorted(range(len(graded)), key=lambda index: -graded[index].score)[: body.top_n or None]
    results = [
        {
            "index": index,
            "relevance_score": graded[index].score,
            "document": wire.shown(body.documents[index]) if body.return_documents else None,
            **wire.graded_fields(graded[index]),
        }
        for index in order
    ]
    meta = {"api_version": {"version": "2"}, "tokens": {"input_tokens": answer.tokens}}
    return wire.RerankResponse(**told(service, request, answer), results=results, meta=meta)


@scoring.post("/v1/score")
@scoring.post("/score")
async def score(
    body: wire.ScoreRequest, request: Request, service: ServiceHere, client: ClientHere
) -> wire.PairsResponse | wire.ItemsResponse:
    """Score pairs of texts, as vLLM does, or the labels of a query's items, as SGLang does."""
    if isinstance(body, wire.ItemsRequest):
        return await score_items(body, request, service, client)
    texts = [body.text_1] if isinstance(body.text_1, str) else body.text_1
    bodies = body.text_2 if isinstance(body.text_2, list) else [body.text_2]
    first, second = body.names
    documents = wire.to_documents(bodies, service.settings, second)
    if len(texts) not in (1, len(documents)):
        wrong = f"{first}: {len(texts)} of them for {len(documents)} of {second}; 1 or as many"
        raise Refused(422, wrong, param=first)
    queries = [wire.to_query(text, "", service.settings, first) for text in texts]
    pairs = list(zip(queries * (len(documents) // len(queries)), documents, strict=True))
    answer = await service.score(request, client, pairs, query_field=first)
    data = [
        {"index": index, "score": graded.score, **wire.graded_fields(graded)}
        for index, graded in enumerate(service.scorer.graded(answer.probabilities))
    ]
    return wire.PairsResponse(**told(service, request, answer), created=service.created, data=data)


async def score_items(
    body: wire.ItemsRequest, request: Request, service: Service, client: Client
) -> wire.ItemsResponse:
    """The probabilities of chosen labels."""
    format = service.scorer.model.format
    bodies = body.items if isinstance(body.items, list) else [body.items]
    documents = wire.to_documents(bodies, service.settings, "items")
    ids = list(format.label_ids) if body.label_token_ids is None else body.label_token_ids
    if unknown := set(ids) - set(format.label_ids):
        raise Refused(
            422,
            f"label_token_ids: {min(unknown)} is no label of this model, whose labels are {list(format.label_ids)}",
            param="label_token_ids",
        )
    query = wire.to_query(body.query, "", service.settings)
    answer = await service.score(request, client, [(query, document) for document in documents])
    columns = [format.label_ids.index(token) for token in ids]
    scores = answer.probabilities[:, columns]
    if body.apply_softmax:
        scores = scores / scores.sum(axis=1, keepdims=True)
    labels = [format.labels[column] for column in columns]
    return wire.ItemsResponse(**told(service, request, answer), labels=labels, scores=scores.tolist())


STREAM = {
    200: {
        "description": "with `explain`: the events grade, text (again and again), explanation, done; error ends early",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


@scoring.post("/v1/relevance", response_model=wire.RelevanceResponse, responses=STREAM)
async def relevance(body: wire.RelevanceRequest, request: Request, service: ServiceHere, client: ClientHere) -> Any:
    """The grade of one pair; with `explain` the reasoning follows as it is written."""
    query = wire.to_query(body.query, body.context, service.settings)
    document = wire.to_document(body.document, service.settings, "document")
    with contextlib.ExitStack() as held:
        if body.explain:
            held.enter_context(service.place_to_explain())
        answer = await service.score(request, client, [(query, document)])
        (graded,) = service.scorer.graded(answer.probabilities)
        fields = told(service, request, answer) | wire.graded_fields(graded)
        grade = wire.RelevanceResponse(**fields, score=graded.score)
        if not body.explain:
            return grade
        limit = min(body.max_tokens or service.settings.max_explanation_tokens, service.settings.max_explanation_tokens)
        written = service.explain(answer.prompts[0], graded.grade, limit, client.salt)
        return EventStream(events(service, request, grade, graded, written), held.pop_all())


class EventStream(StreamingResponse):
    """Server-sent events; what is held for them is let go when they end or the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], held: contextlib.ExitStack):
        # A proxy that gathers the answer would take the sense out of it.
        super().__init__(events, headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        self.held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `EventStream`."""
        with self.held:
            await super().__call__(scope, receive, send)


async def events(
    service: Service,
    request: Request,
    grade: wire.RelevanceResponse,
    graded: Graded,
    written: AsyncIterator[tuple[str, bool]],
) -> AsyncIterator[str]:
    """grade, then text as it is written, then the explanation taken apart, then done; or error."""
    yield event("grade", grade.model_dump())
    sent, text, ended = graded.grade, graded.grade, False
    try:
        async for text, ended in written:
            # A character whose bytes are not all there yet shows as U+FFFD: it waits for the next tokens.
            whole = text if ended else text.rstrip("\ufffd")
            if len(whole) > len(sent):
                yield event("text", {"text": whole[len(sent) :]})
                sent = whole
    except TimeoutError:
        late = Refused(504, f"not written within {service.settings.deadline_seconds:g} s")
        yield event("error", late.body.model_dump())
        return
    except Exception as error:
        log("explaining failed", request_id=request.state.record.request_id, error=repr(error))
        yield event("error", Refused(500, "the explanation failed; the grade stands").body.model_dump())
        return
    yield event("explanation", explanation(service, graded.grade, text) if ended else None)
    yield event("done", {"truncated": not ended})


def explanation(service: Service, grade: str, text: str) -> dict[str, Any] | None:
    """The parts of a well-formed answer, and whether its verdict is the grade and its rule may lead there; None of any
    other."""
    labels, instruction = service.scorer.labels, service.scorer.model.format.instruction
    parsed = parse_answer(text, labels)
    if parsed is None:
        return None
    reason, rule = parsed.explanation, instruction.rule(parsed.explanation.rule)
    led = parsed.verdict in rule.grades if rule else reason.rule == 0 or not instruction.rules
    parts: Sequence[tuple[str, str, str]] = list(zip(reason.need, reason.facts, reason.verdicts, strict=True))
    return {
        "constraints": [{"need": need, "fact": fact, "verdict": str(verdict)} for need, fact, verdict in parts],
        "rule": {"number": reason.rule, "text": rule.text if rule else None},
        "verdict": labels[parsed.verdict],
        "consistent": labels[parsed.verdict] == grade and led,
    }


def event(name: str, data: Any) -> str:
    """One server-sent event, its data JSON on one line."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


@about.get("/v1/models", responses=documented(401))
async def models(service: ServiceHere, client: ClientHere) -> dict[str, Any]:
    """The one model."""
    entry = {"id": service.name, "object": "model", "created": service.created, "owned_by": "afrl"}
    return {"object": "list", "data": [entry]}


@about.get("/info", responses=documented(401, 503))
async def info(service: ServiceHere, client: ClientHere) -> dict[str, Any]:
    """The model, its scale and rules, and what the service allows."""
    limits = {name: getattr(service.settings, name) for name in service.settings.__dataclass_fields__}
    return {"model": service.name, **service.scorer.describe(), "limits": limits}


@about.head("/health", include_in_schema=False)
@about.get("/health")
async def health() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


@about.head("/ready", include_in_schema=False)
@about.get("/ready", responses={503: {"model": ErrorBody, "description": "not ready"}})
async def ready(service: ServiceHere) -> dict[str, bool]:
    """The model is loaded, its golden pairs have their scores, its shapes are compiled, and it scores."""
    await service.check()
    return {"ready": True}


@about.get("/metrics", response_class=Response)
async def metrics(service: ServiceHere) -> Response:
    """Metrics for Prometheus."""
    text = await asyncio.to_thread(service.metrics.text)
    return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)
