"""The application on a port of its own, over a small world, with a store that knows one context."""

import dataclasses
import threading
import time

import pytest
import uvicorn

from core_jax.relevance import BM25Relevance
from core_jax.search.engine import Engine
from core_jax.search.rawrank import LightRanker
from core_jax.search.recall import LexicalRecall
from core_jax.search.rewrite_store import RewriteStore, SQLite
from core_jax.search.stages import Stages
from core_jax.serve.app import make_app
from core_jax.serve.collection import clips_collection


@dataclasses.dataclass
class Running:
    url: str
    engine: Engine
    contexts: list
    rewrite: str


@pytest.fixture(scope="package")
def running(tmp_path_factory):
    documents, contexts = clips_collection(1)
    rewrite = f"{contexts[0].query} {contexts[0].watched.title}"
    store = RewriteStore(SQLite(tmp_path_factory.mktemp("store") / "rewrites.sqlite"), b"sixteen or more bytes")
    store.write("v1", [(contexts[0].key, rewrite)])
    stages = Stages(LexicalRecall(documents), LightRanker(documents), BM25Relevance(documents))
    engine = Engine(stages, store=store, version=lambda: "v1", deadline=5.0)
    about = {"model": "bm25", "model_version": "", "documents": len(documents)}
    server = uvicorn.Server(uvicorn.Config(make_app(engine, about, contexts), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Running(f"http://127.0.0.1:{port}", engine, contexts, rewrite)
    server.should_exit = True
    thread.join()
