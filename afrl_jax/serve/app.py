"""The application: start, errors, middleware and routes put together."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

from afrl_jax.serve import refusals, routes
from afrl_jax.serve.monitoring import Monitored, log
from afrl_jax.serve.scorer import Scorer
from afrl_jax.serve.service import Service

PAGE = pathlib.Path(__file__).parent / "page"
# The page loads nothing from anywhere else, and nothing may be put into it.
CONTENT_SECURITY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def make_app(service: Service, load: Callable[[], Scorer], *, on_failure: Callable[[], None] = lambda: None) -> FastAPI:
    """The application of a service.

    Args:
        load: reads the model, in another thread, while /health already answers. Whatever it raises is kept in
            `service.failure`.
        on_failure: is called then: there is nothing to wait for.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception():
                log("stopped", error=repr(task.exception()))
                on_failure()

        running = asyncio.create_task(service.start(load))
        running.add_done_callback(ended)
        yield
        running.cancel()
        service.close()
        log("shut down")

    app = FastAPI(
        title="Relevance, graded",
        description="Grades how well documents answer a query, and explains a grade on request.",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # the viewers that come with the library are fetched from the network
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(refusals.BodyLimit, max_bytes=service.settings.max_body_bytes)
    app.add_middleware(refusals.KeyFirst, keys=service.keys)
    served = [route.path for router in (routes.scoring, routes.about) for route in router.routes]
    paths = [*served, "/", "/docs", app.openapi_url, "/page/*"]
    app.add_middleware(Monitored, metrics=service.metrics, paths=paths)
    refusals.install(app)
    app.include_router(routes.scoring)
    app.include_router(routes.about)

    def page(file: str) -> Callable[[Request], Response]:
        return lambda request: FileResponse(PAGE / file, headers={"content-security-policy": CONTENT_SECURITY})

    app.add_route("/", page("index.html"))
    app.add_route("/docs", page("docs.html"))

    app.mount("/page", _Page(directory=PAGE))
    return app


class _Page(StaticFiles):
    """The page's files, under the page's rules."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        answer = super().file_response(*arguments, **options)
        answer.headers["content-security-policy"] = CONTENT_SECURITY
        return answer
