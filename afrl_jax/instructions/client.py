"""Language models that follow a prompt: one small protocol, a client of OpenAI-compatible servers, a model in process.

The client keeps every answer on disk under the digest of what was asked, so a rerun costs nothing and is exact. The key
comes from the environment and goes into one request header: errors, cache files and logs never hold it.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import random
import time
import urllib.parse
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import httpx2
import jax
import numpy as np

from afrl_jax.instructions.budget import Budget, Spent
from lm_jax.config import DecoderConfig
from lm_jax.parameters import Parameters
from lm_jax.run_folder import write_atomically
from lm_jax.sample import sample
from lm_jax.tokenizer import Tokenizer
from lm_jax.weights import read_weights

_TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_OF_THE_PROMPT = (400, 413, 422)  # it is too long, or of a kind that the server will not answer
_ALL_REFUSED = 10  # prompts refused from the first on: it is not they that are wrong
_LARGEST_ANSWER = 8 << 20  # bytes
_TEMPLATE_TOKENS = 64  # that a chat template may add to a prompt, for the reservation
_LONGEST_WAIT = 60.0  # seconds between two attempts, whatever a server asks for


class Completion(NamedTuple):
    """An answer: its text, whether it was cut off at `max_tokens`, and what it took; or why this prompt gets none."""

    text: str
    truncated: bool
    prompt_tokens: int
    completion_tokens: int
    refused: str = ""


class LanguageModel(Protocol):
    """Anything that answers prompts."""

    def complete(
        self, prompts: Sequence[str], *, max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[Completion]:
        """One answer to each prompt, in their order; the same arguments give the same answers."""


class LanguageModelError(RuntimeError):
    """A call failed for good: what was asked for is wrong, or every attempt failed."""


class _Attempt(Exception):
    """One attempt failed; unless it is `final`, another may do better. `known` is what it cost, where that is known;
    `of_prompt`: other prompts may well be answered."""

    def __init__(
        self,
        message: str,
        *,
        wait: float | None = None,
        known: Spent | None = None,
        final: bool = False,
        of_prompt: bool = False,
    ):
        super().__init__(message)
        self.wait, self.known, self.final, self.of_prompt = wait, known, final, of_prompt


class ChatClient:
    """Client of an OpenAI-compatible `/chat/completions`.

    Args:
        base_url: such as "https://host/v1"; it must hold no user name or password.
        key_variable: the environment variable with the key; where it is unset no key is sent.
        timeout: seconds for a whole attempt, from connecting to the last byte.
        attempts: at most so many a call; between them `first_wait` seconds, doubled each time and shortened by up to
            half at random, or what the server's Retry-After asks for, at most a minute.
        concurrency: calls under way at once.
        cache: folder of the answers.

    Raises:
        ValueError: a base_url that is not http(s), or that holds credentials.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        cache: Path,
        budget: Budget,
        key_variable: str = "OPENAI_API_KEY",
        timeout: float = 120.0,
        attempts: int = 5,
        first_wait: float = 1.0,
        concurrency: int = 4,
        sleep: Callable[[float], None] = time.sleep,
    ):
        address = urllib.parse.urlsplit(base_url)
        if address.username or address.password or address.query:
            raise ValueError(f"base_url: no credentials and no parameters here; the key comes from {key_variable}")
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"base_url: {base_url!r} is no http(s) address such as https://host/v1")
        self.model, self.budget = model, budget
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._cache, self._key_variable = cache, key_variable
        self._timeout, self._attempts, self._first_wait = timeout, attempts, first_wait
        self._concurrency, self._sleep = concurrency, sleep

    def complete(
        self, prompts: Sequence[str], *, max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[Completion]:
        """See `LanguageModel`. A prompt that the server will not answer gets a completion that is `refused`.

        Raises:
            LanguageModelError: names the status or what happened at the last attempt, where that is no matter of one
                prompt: all of them are refused, or the first ten. Answers that came stay cached.
            BudgetExceeded: before the call that could cost more than what is left.
        """
        # Equal prompts are one call.
        bodies = {prompt: self._body(prompt, max_tokens, temperature, seed) for prompt in prompts}
        with (
            httpx2.Client(timeout=self._timeout, follow_redirects=False) as http,
            concurrent.futures.ThreadPoolExecutor(self._concurrency) as pool,
        ):
            waiting = {prompt: pool.submit(self._answer, http, body) for prompt, body in bodies.items()}
            found: dict[str, Completion] = {}
            try:
                for prompt in bodies:
                    found[prompt] = waiting[prompt].result()
                    if len(found) == min(len(bodies), _ALL_REFUSED) and all(one.refused for one in found.values()):
                        raise LanguageModelError(found[prompt].refused)
                return [found[prompt] for prompt in prompts]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def most(self, prompts: Sequence[str], *, max_tokens: int, temperature: float = 0.0, seed: int = 0) -> Spent:
        """The most that `complete` can spend on these, if no attempt fails; what is in the cache is free."""
        new = [
            prompt
            for prompt in dict.fromkeys(prompts)
            if _read_cached(self._file(body := self._body(prompt, max_tokens, temperature, seed)), body) is None
        ]
        asked, answered = sum(map(_most_tokens, new)), len(new) * max_tokens
        return Spent(len(new), asked + answered, self.budget.limits.cost(asked, answered))

    def _body(self, prompt: str, max_tokens: int, temperature: float, seed: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "stream": False,
        }

    def _file(self, body: Mapping[str, Any]) -> Path:
        return self._cache / f"{hashlib.sha256(_asked(body).encode()).hexdigest()}.json"

    def _answer(self, http: httpx2.Client, body: Mapping[str, Any]) -> Completion:
        asked, file = _asked(body), self._file(body)
        if (kept := _read_cached(file, body)) is not None:
            return kept
        most = _most_tokens(body["messages"][0]["content"])
        for attempt in range(self._attempts):
            reserved = self.budget.reserve(most, body["max_tokens"])
            try:
                completion = self._attempt(http, asked, most, body["max_tokens"])
            except _Attempt as failed:
                self.budget.settle(reserved, failed.known)
                if failed.final or attempt + 1 == self._attempts:
                    message = f"{self._url}: {failed} (attempt {attempt + 1} of {self._attempts})"
                    if failed.of_prompt:
                        return Completion("", False, 0, 0, message)
                    raise LanguageModelError(message) from None
                backoff = self._first_wait * 2**attempt * random.uniform(0.5, 1.0)
                self._sleep(min(failed.wait or backoff, _LONGEST_WAIT))
            except BaseException:
                self.budget.settle(reserved)
                raise
            else:
                tokens = completion.prompt_tokens, completion.completion_tokens
                self.budget.settle(reserved, Spent(1, sum(tokens), self.budget.limits.cost(*tokens)))
                self._cache.mkdir(parents=True, exist_ok=True)
                record = {"asked": dict(body), "answer": completion._asdict()}
                write_atomically(file, self._without_key(json.dumps(record, ensure_ascii=False, indent=1)) + "\n")
                return completion
        raise AssertionError("a client makes at least one attempt")

    def _attempt(self, http: httpx2.Client, asked: str, most: int, max_tokens: int) -> Completion:
        key = os.environ.get(self._key_variable, "")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        began = time.monotonic()
        nothing = Spent(1)
        try:
            with http.stream("POST", self._url, content=asked.encode(), headers=headers) as response:
                parts, size = [], 0
                for part in response.iter_bytes():
                    parts.append(part)
                    size += len(part)
                    if time.monotonic() - began > self._timeout:
                        raise _Attempt(f"no whole answer within {self._timeout:g} s")
                    if size > _LARGEST_ANSWER:
                        raise _Attempt(f"an answer of more than {_LARGEST_ANSWER} bytes")
        # `from None` everywhere: the exceptions of the library hold the request, and that holds the key.
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise _Attempt(f"not reachable ({type(error).__name__})", known=nothing) from None
        except httpx2.TimeoutException:
            raise _Attempt(f"no answer within {self._timeout:g} s") from None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _Attempt(f"the connection broke ({type(error).__name__})") from None
        text = self._without_key(b"".join(parts).decode("utf-8", "replace"))
        if response.status_code != 200:
            wait, final = _seconds(response.headers.get("retry-after")), response.status_code not in _TRY_AGAIN
            raise _Attempt(
                f"status {response.status_code}: {_short(text)}",
                wait=wait,
                known=nothing,
                final=final,
                of_prompt=response.status_code in _OF_THE_PROMPT,
            )
        return _completion(text, most, max_tokens)

    def _without_key(self, text: str) -> str:
        """A server may send back what it was sent."""
        key = os.environ.get(self._key_variable, "")
        return text.replace(key, "***") if key else text


def _asked(body: Mapping[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, ensure_ascii=False)


def _most_tokens(prompt: str) -> int:
    """A byte-level token has at least one byte: no prompt is longer than this."""
    return len(prompt.encode()) + _TEMPLATE_TOKENS


def _completion(text: str, most: int, max_tokens: int) -> Completion:
    try:
        answer = json.loads(text)
        choice = answer["choices"][0]
        content = choice["message"]["content"]
        usage = answer.get("usage") or {}
        told = usage.get("prompt_tokens"), usage.get("completion_tokens")
        counts = tuple(int(most if n is None else n) for n, most in zip(told, (most, max_tokens), strict=True))
    except (ValueError, TypeError, LookupError, AttributeError):
        raise _Attempt(f"malformed answer: {_short(text)}") from None
    if not isinstance(content, str):
        raise _Attempt(f"malformed answer, its content is no text: {_short(text)}", of_prompt=True)
    return Completion(content, choice.get("finish_reason") == "length", *counts)


def _read_cached(file: Path, body: Mapping[str, Any]) -> Completion | None:
    """The kept answer; a file that is damaged or speaks of something else is as good as none."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return Completion(**record["answer"]) if record["asked"] == body else None
    except (OSError, ValueError, TypeError, LookupError):
        return None


def _seconds(header: str | None) -> float | None:
    try:
        return max(0.0, float(header))
    except (TypeError, ValueError):  # absent, or a date
        return None


def _short(text: str) -> str:
    return " ".join(text.split())[:300]


class LocalModel:
    """The project's own decoder as a language model, in process.

    Args:
        template: what surrounds a prompt, with "{prompt}" in its place; instruction-tuned models need theirs.
        rows: prompts computed together. Answers do not depend on it.
    """

    def __init__(
        self,
        config: DecoderConfig,
        parameters: Parameters,
        tokenizer: Tokenizer,
        *,
        template: str = "{prompt}",
        rows: int = 8,
        dtype: str = "float32",
    ):
        self._config, self._parameters, self._tokenizer = config, parameters, tokenizer
        self._template, self._rows, self._dtype = template, rows, dtype

    @classmethod
    def load(cls, source: str | Path, **options: Any) -> LocalModel:
        """The model of a folder, a hub id or a .gguf file, with its chat template; `options` as of the class.

        Raises:
            FileNotFoundError, ConnectionError: see `lm_jax.source.locate`.
        """
        tokenizer = Tokenizer.load(source)
        return cls(*read_weights(source), tokenizer, template=tokenizer.chat("{prompt}"), **options)

    def complete(
        self, prompts: Sequence[str], *, max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[Completion]:
        """See `LanguageModel`; a prompt's answer is drawn from (seed, prompt), whatever stands beside it."""
        eos = self._tokenizer.eos
        texts = [self._template.replace("{prompt}", prompt) for prompt in prompts]
        encoded = [np.array(ids, np.int32) for ids in self._tokenizer.encode_chat(texts)]
        found: list[Completion] = []
        for start in range(0, len(encoded), self._rows):
            some = encoded[start : start + self._rows]
            width = -(-max(map(len, some)) // 64) * 64
            tokens, lengths = np.zeros((self._rows, width), np.int32), np.ones(self._rows, np.int32)
            rows = np.zeros(self._rows, np.uint32)
            for place, ids in enumerate(some):
                tokens[place, : len(ids)], lengths[place] = ids, len(ids)
                rows[place] = zlib.crc32(texts[start + place].encode())
            drawn = jax.device_get(
                sample(
                    self._parameters, tokens, lengths, rows, jax.random.key(seed),
                    config=self._config, group=1, max_new_tokens=max_tokens, eos=-1 if eos is None else eos,
                    temperature=temperature, dtype=self._dtype,
                )
            )  # fmt: skip
            for place, ids in enumerate(some):
                length = int(drawn.lengths[place, 0])
                answer = [token for token in drawn.tokens[place, 0, :length].tolist() if token != eos]
                truncated = bool(drawn.truncated[place, 0])
                found.append(Completion(self._tokenizer.decode(answer), truncated, len(ids), length))
        return found
