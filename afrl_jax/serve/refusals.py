"""Errors as clients see them: a status, what is wrong, and which field.

    {"message": "...", "error": {"message": "...", "type": "invalid_request", "param": "documents[3]", "code": 422}}

`error` is what clients of vLLM and OpenAI read, `message` what Cohere's do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pydantic
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security.utils import get_authorization_scheme_param
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from afrl_jax.serve.keys import Keys

CLIENT_CLOSED_REQUEST = 499  # nobody reads it; the log and the metrics do
FORMS = ("str", "DocumentFields", "pairs", "items_of_query")  # that a value may have, as pydantic tells them
TYPES = {
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    422: "invalid_request",
    429: "overloaded",
    500: "scoring_failed",
    503: "not_ready",
    504: "deadline_exceeded",
}


class ErrorDetail(pydantic.BaseModel):
    """What is wrong, in words and for programs."""

    message: str
    type: str
    param: str | None = pydantic.Field(None, description="the field of the request that is wrong")
    code: int = pydantic.Field(description="the HTTP status")


class ErrorBody(pydantic.BaseModel):
    """The body of every error."""

    message: str
    error: ErrorDetail


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, *, param: str | None = None, retry_after: float | None = None):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        # Whole seconds, at least one: what the header can say.
        self.headers = {} if retry_after is None else {"retry-after": str(max(1, math.ceil(retry_after)))}

    @property
    def body(self) -> ErrorBody:
        """The error as it is sent."""
        kind = TYPES.get(self.status, "error")
        detail = ErrorDetail(message=self.message, type=kind, param=self.param, code=self.status)
        return ErrorBody(message=self.message, error=detail)


def key_needed() -> Refused:
    """The refusal of whoever shows no key, or none of ours."""
    refused = Refused(401, "an API key is needed, as `Authorization: Bearer KEY`", param="authorization")
    refused.headers["www-authenticate"] = "Bearer"
    return refused


UNFORESEEN = Refused(500, "the service failed on this request; its log has the reason")


def response(refused: Refused) -> JSONResponse:
    """The answer to a refused request."""
    return JSONResponse(refused.body.model_dump(), refused.status, refused.headers)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries of these errors."""
    return {status: {"model": ErrorBody, "description": TYPES[status].replace("_", " ")} for status in statuses}


def field_name(location: Sequence[str | int]) -> str:
    """("body", "documents", 3, "DocumentFields", "text") -> "documents[3].text": the names of forms are left out."""
    parts = [part for part in location[1:] if part not in FORMS and not str(part).startswith("list[")]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return name.removeprefix(".") or str(location[0])


def install(app: FastAPI) -> None:
    """Every error of `app` is answered in the one form, and never repeats what was sent."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # Of a value that may have several forms every form complains: the one that it has, deepest inside.
        deepest = max(error.errors(), key=lambda one: len(one["loc"]))
        if deepest["type"] == "json_invalid":
            return response(Refused(422, f"the body is not valid JSON: {deepest['ctx']['error']}", param="body"))
        name = field_name(deepest["loc"])
        return response(Refused(422, f"{name}: {deepest['msg']}", param=name))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        of_body = error.status_code in (400, 413)
        refused = Refused(error.status_code, str(error.detail), param="body" if of_body else None)
        refused.headers = dict(error.headers or {})
        return response(refused)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        return response(UNFORESEEN)


class KeyFirst:
    """ASGI middleware: where keys are asked for, the body of a request without one of them is not read."""

    def __init__(self, app: ASGIApp, keys: Keys):
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `KeyFirst`."""
        if self.keys and scope["type"] == "http" and scope["method"] == "POST":
            scheme, key = get_authorization_scheme_param(Headers(scope=scope).get("authorization"))
            if scheme.lower() != "bearer" or self.keys.client(key) is None:
                return await response(key_needed())(scope, receive, send)
        await self.app(scope, receive, send)


class BodyLimit:
    """ASGI middleware: reading a body longer than `max_bytes`, declared or not, is a 413."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `BodyLimit`."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        seen = 0
        declared = int(dict(scope["headers"]).get(b"content-length", 0))

        async def counted() -> Message:
            nonlocal seen
            message = await receive() if declared <= self.max_bytes else {"body": b""}
            seen += len(message.get("body", b""))
            if max(declared, seen) > self.max_bytes:
                raise HTTPException(413, f"the body is longer than {self.max_bytes} bytes, which are allowed")
            return message

        await self.app(scope, counted, send)
