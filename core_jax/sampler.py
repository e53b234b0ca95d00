"""Where rewrites are drawn: in this process, or by an OpenAI-compatible server that reloads an exported folder.

Both keep one protocol. `sync` hands over the policy, once a phase; `sample` draws from what was handed over last.
Rewrites are drawn at temperature 1 over the whole vocabulary, as the losses assume.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from core_jax.rewrite_format import RewriteFormat
from core_jax.schema import Context
from lm_jax import run_log
from lm_jax.config import DecoderConfig
from lm_jax.parameters import Parameters
from lm_jax.sample import Samples, sample
from sharding.distributed import place_batch

Rewrites = list[list[np.ndarray]]  # for each context its rewrites: tokens, with end of text where there is one


class Sampler(Protocol):
    """Draws rewrites from the policy it was synchronized with last."""

    def sync(self, parameters: Parameters, name: str) -> None:
        """Take over the policy; `name` is that of the phase."""

    def sample(self, contexts: Sequence[Context], numbers: Sequence[int], seed: int, group: int) -> Rewrites:
        """`group` rewrites of each context; its number and the seed decide which, as far as the sampler can."""


class InProcess:
    """Samples with `lm_jax.sample`: every rewrite follows from (parameters, seed, the context's number, sample).

    Args:
        prompt_tokens: every prompt is padded to so many.
        rows: contexts at once.
    """

    def __init__(
        self,
        format: RewriteFormat,
        config: DecoderConfig,
        *,
        max_new_tokens: int,
        prompt_tokens: int,
        rows: int,
        dtype: str = "float32",
        mesh: Mesh | None = None,
    ):
        self._format, self._config, self._mesh = format, config, mesh
        self._prompt_tokens, self._rows = prompt_tokens, rows
        self._fixed = {"config": config, "max_new_tokens": max_new_tokens, "eos": format.tokenizer.eos, "dtype": dtype}
        self._parameters: Parameters = {}

    def sync(self, parameters: Parameters, name: str) -> None:
        """Take over the policy, until a train step takes its arrays: sampling is over by then."""
        self._parameters = parameters

    def sample(self, contexts: Sequence[Context], numbers: Sequence[int], seed: int, group: int) -> Rewrites:
        """`group` rewrites of each context."""
        prompts = self._format.encode_prompts(contexts)
        rewrites: Rewrites = []
        for start in range(0, len(prompts), self._rows):
            here = slice(start, start + self._rows)
            drawn = jax.device_get(
                self.draw(self._parameters, prompts[here], numbers[here], jax.random.key(seed), group=group)
            )
            for place in range(len(prompts[here])):
                answers = zip(drawn.tokens[place], drawn.lengths[place], strict=True)
                rewrites.append([tokens[:length] for tokens, length in answers])
        return rewrites

    def draw(
        self,
        parameters: Parameters,
        prompts: Sequence[np.ndarray],
        numbers: Sequence[int],
        key: jax.Array,
        *,
        group: int,
        temperature: float = 1.0,
    ) -> Samples:
        """`group` answers to each of at most `rows` prompts, still on the device; missing rows are padded."""
        tokens = np.zeros((self._rows, self._prompt_tokens), np.int32)
        lengths = np.ones(self._rows, np.int32)
        identities = np.zeros(self._rows, np.uint32)
        for place, prompt in enumerate(prompts):
            tokens[place, : len(prompt)], lengths[place] = prompt, len(prompt)
        identities[: len(prompts)] = numbers
        inputs = place_batch((tokens, lengths, identities), self._mesh)
        return sample(parameters, *inputs, key, group=group, temperature=temperature, **self._fixed)


class _Refused(ConnectionError):
    """The server does not take such a request."""


class Server:
    """Samples through `/v1/completions` of a server that speaks OpenAI's protocol (vLLM, `transformers serve`, ...).

    At `sync` the policy is exported as a Hugging Face folder; then `reload` makes the server use it. Without `reload`
    every request names the folder as its model, which servers that load models by name understand. A request draws one
    rewrite (not every server knows `n`), `parallel` run at a time, each with a seed of its own. Servers heed seeds more
    or less, so two runs may differ; a resumed run does not, it reads what was drawn.

    A prompt travels as token ids, which are what the losses are taken of. A server that refuses ids with status 400 or
    422 (`transformers serve`) gets text from then on, which is told: it may put a token of its own before it, and reads
    what looks like a special token in a query as one.

    Args:
        url: up to and without "/v1".
        folder: exports go to folder/<name of the phase>; `transformers serve` must see the same path.
        export: (parameters, folder) -> None, writes the folder.
        reload: a command run by the shell, {folder} in it replaced by the quoted path, for servers that hold one model;
            it returns when no answer comes from the model before any more, and the server is then waited for.
        model: what requests name as their model where `reload` is given.
        patience: seconds until a server that does not answer, or says not now (429, 502 to 504), is an error.

    Raises:
        ConnectionError: the server does not answer, or refuses; names the address and what it said.
    """

    def __init__(
        self,
        format: RewriteFormat,
        url: str,
        folder: Path,
        export: Callable[[Parameters, Path], None],
        *,
        max_new_tokens: int,
        reload: str = "",
        model: str = "rewriter",
        parallel: int = 8,
        patience: float = 600.0,
    ):
        self._format, self._url, self._folder, self._export = format, url.rstrip("/"), folder, export
        self._max_new_tokens, self._reload, self._named = max_new_tokens, reload, model
        self._parallel, self._patience, self._model = parallel, patience, ""
        self._takes_ids = True  # until it refuses them

    def sync(self, parameters: Parameters, name: str) -> None:
        """Export the policy and have the server load it."""
        folder = (self._folder / name).absolute()
        self._export(parameters, folder)
        self._model = str(folder)
        if self._reload:
            command = self._reload.replace("{folder}", shlex.quote(str(folder)))
            if status := subprocess.run(command, shell=True).returncode:
                raise ConnectionError(f"sampler.reload: {command!r} ended with status {status}")
            self._model = self._named
        self._wait()

    def sample(self, contexts: Sequence[Context], numbers: Sequence[int], seed: int, group: int) -> Rewrites:
        """`group` rewrites of each context."""
        prompts = self._format.encode_prompts(contexts)

        def one(place: int) -> np.ndarray:
            of_context, draw = divmod(place, group)
            of_draw = np.random.SeedSequence((seed, numbers[of_context], draw)).generate_state(1)[0] >> 1
            return self._complete(prompts[of_context], int(of_draw))

        with ThreadPoolExecutor(self._parallel) as pool:
            drawn = list(pool.map(one, range(len(contexts) * group)))
        return [drawn[start : start + group] for start in range(0, len(drawn), group)]

    def _complete(self, prompt: np.ndarray, seed: int) -> np.ndarray:
        asked = {
            "model": self._model,
            "max_tokens": self._max_new_tokens,
            "temperature": 1.0,
            "top_p": 1.0,
            "seed": seed,
        }
        answer = None
        if self._takes_ids:
            with contextlib.suppress(_Refused):
                answer = self._post("/v1/completions", asked | {"prompt": prompt.tolist()})
        if answer is None:
            answer = self._post("/v1/completions", asked | {"prompt": self._format.tokenizer.decode(prompt)})
            if self._takes_ids:  # it is the ids that were refused
                self._takes_ids = False
                run_log.say(f"{self._url} takes no token ids: prompts are sent as text, which it may read otherwise")
        try:
            choice = answer["choices"][0]
            text, ended = str(choice["text"]), choice["finish_reason"] == "stop"
        except (KeyError, IndexError, TypeError) as error:
            raise ConnectionError(f"{self._url}/v1/completions: an answer without {error}: {answer!r:.200}") from error
        tokens = self._format.encode_rewrite(text, ended=ended)
        return tokens[: self._max_new_tokens]

    def _wait(self) -> None:
        """Until the server answers anything: some have no list of models to give and are ready all the same."""
        deadline = time.monotonic() + self._patience
        while True:
            try:
                urllib.request.urlopen(f"{self._url}/v1/models", timeout=10.0).close()
                return
            except OSError as error:
                if isinstance(error, urllib.error.HTTPError) and not _not_now(error):
                    return
                if time.monotonic() > deadline:
                    raise ConnectionError(f"{self._url}/v1/models: {error}") from error
                time.sleep(1.0)

    def _post(self, path: str, body: Any) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        deadline = time.monotonic() + self._patience
        while True:
            try:
                with urllib.request.urlopen(request, timeout=self._patience) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                if not _not_now(error) or time.monotonic() > deadline:
                    kind = _Refused if error.code in (400, 422) else ConnectionError
                    raise kind(f"{self._url}{path}: {error}: {error.read(500).decode(errors='replace')}") from error
                time.sleep(1.0)
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise ConnectionError(f"{self._url}{path}: {error}") from error


def _not_now(error: urllib.error.HTTPError) -> bool:
    """Whether the same request may be answered later: the server loads, is too busy, or a proxy did not reach it."""
    return error.code in (429, 502, 503, 504)
