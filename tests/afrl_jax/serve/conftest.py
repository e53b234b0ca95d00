"""A real server on a port of its own, with a tiny model behind it."""

import contextlib
import dataclasses
import threading
import time

import numpy as np
import pytest
import requests
import uvicorn

from afrl_jax.serve.app import make_app
from afrl_jax.serve.scorer import Scorer
from afrl_jax.serve.service import Service
from afrl_jax.serve.settings import Settings

SETTINGS = Settings(batch_pairs=4, max_explanation_tokens=12, max_documents=8, max_query_chars=100)


@dataclasses.dataclass
class Running:
    """A server: where it is, and what is inside."""

    url: str
    service: Service

    def post(self, path, body=None, key=None, **options):
        headers = options.pop("headers", {}) | ({"authorization": f"Bearer {key}"} if key else {})
        return requests.post(self.url + path, json=body, headers=headers, timeout=60, **options)

    def get(self, path, **options):
        return requests.get(self.url + path, timeout=60, **options)


@contextlib.contextmanager
def _serving(load, settings=SETTINGS, keys=(), wait=True):
    service = Service("tiny", settings, keys)
    config = uvicorn.Config(make_app(service, load), port=0, log_level="warning", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started or (wait and not service.ready):
            assert thread.is_alive() and service.failure is None, service.failure
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", service)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def serving():
    """A context manager: (load, settings, keys, wait) -> Running."""
    return _serving


@pytest.fixture(scope="package")
def running(tiny_model):
    """The server most tests ask, and the model it serves."""
    model = tiny_model("qwen3", version="f00d")
    with _serving(lambda: Scorer(model, SETTINGS.max_explanation_tokens)) as server:
        yield server, model


@pytest.fixture(scope="session")
def slow_scorer(tiny_model):
    """A scorer whose batches take a while, and that counts and fails on demand."""

    class SlowScorer(Scorer):
        seconds = 0.0
        broken = "chess"  # a document that has it cannot be scored

        def __init__(self):
            super().__init__(tiny_model("qwen3"), SETTINGS.max_explanation_tokens)
            self.batches = []

        def warm_up(self, pairs, query_tokens):
            pass

        def probabilities(self, prompts, salts):
            texts = [self.model.format.tokenizer.decode(prompt.document) for prompt in prompts]
            self.batches.append(len(texts))
            time.sleep(self.seconds)
            if any(self.broken in text for text in texts):
                raise RuntimeError("a bad document")
            lengths = np.array([len(text) for text in texts], float)
            return np.stack([1 / lengths, 0 * lengths, 1 - 1 / lengths], axis=1)

    return SlowScorer
