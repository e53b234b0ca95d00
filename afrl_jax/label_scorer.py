"""The grade of many prompts from one prefill each: shared prefixes kept, batches of a token budget, few shapes.

What prompts share - instruction and query - is computed once and kept across calls, bounded in bytes. Documents are
packed by `batch_plan` and run as suffixes (`lm_jax.shared_prefix`). Of the head only the label rows are read; of a
batch only its label log-probs come to the host, in one transfer, while the next batch already runs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from afrl_jax.answer_format import PromptTokens
from afrl_jax.batch_plan import Batch, plan, shapes
from afrl_jax.bounded_cache import BoundedCache
from afrl_jax.label_step import in_dtype, prefill_suffixes, score_suffixes
from lm_jax.config import DecoderConfig
from lm_jax.parameters import Parameters
from lm_jax.rows import rounded_width
from lm_jax.shared_prefix import Block, Suffixes, empty_block
from sharding.distributed import batch_parts

CACHE_BYTES = 2**31
CPU_CACHE_BYTES = 2**28
BATCH_TOKENS = 4096
CPU_BATCH_TOKENS = 1024  # activations of more leave a CPU's caches
PREFILL_TOKENS = 256  # of a row whose keys and values are kept: each suffix gets a block of its own
PREFIX_STEP = 64  # prefixes are padded to a multiple

Key = tuple[bytes, bytes]  # salt and tokens of a prefix


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of the first `length` tokens of prompts."""

    block: Block
    length: int

    @property
    def size(self) -> int:
        return self.block.keys.shape[1]


@dataclasses.dataclass
class Counts:
    """What a scorer did since it was made."""

    prompts: int = 0
    tokens: int = 0  # of these prompts
    computed: int = 0  # what was left of them by shared and kept prefixes
    padding: int = 0  # computed besides
    batches: int = 0


class LabelScorer:
    """Label log-probs of prompts. To be used from one thread at a time.

    Attributes:
        parameters: in the dtype of the computation.
        dtype: its name.
        kept: the prefixes kept across calls.
        counts: what was done so far.
    """

    def __init__(
        self,
        parameters: Parameters,
        config: DecoderConfig,
        label_ids: Sequence[int],
        *,
        head: np.ndarray | None = None,
        dtype: str = "float32",
        cache_bytes: int | None = None,
        batch_tokens: int | None = None,
    ):
        """Args:
        head: tokens that most prefixes begin with, the instruction: computed once, whatever the queries.
        cache_bytes: of prefixes kept; the least recently used make room. One call holds no more at a time either.
        batch_tokens: of a row at most, unless one prompt is longer.
        """
        self.config, self.dtype = config, dtype
        self.parameters = in_dtype(parameters, config, dtype)
        self._labels = self.parameters["embed" if config.tied_head else "head"][np.array(label_ids)]
        cpu = next(iter(self._labels.devices())).platform == "cpu"
        self._batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if cpu else BATCH_TOKENS)
        self._empty = self._nothing(PREFIX_STEP)
        self._head_tokens = np.zeros(0, np.int32) if head is None else head
        self._shapes: set[tuple] = set()
        default = CPU_CACHE_BYTES if cpu else CACHE_BYTES
        self.kept: BoundedCache[Prefix] = BoundedCache(default if cache_bytes is None else cache_bytes)
        self.counts = Counts()

    @property
    def compilations(self) -> int:
        """Different shapes that were computed: each was compiled once."""
        return len(self._shapes)

    def label_logprobs(
        self,
        prompts: Sequence[PromptTokens],
        *,
        salts: Sequence[bytes] | None = None,
        progress: Callable[..., Iterable] | None = None,
    ) -> np.ndarray:
        """Log-softmax over the label tokens, float32 [N, C], at the first answer position of each prompt.

        Args:
            salts: of each prompt. A kept prefix serves only the salt that it was computed for, so that nobody can tell
                from the time an answer takes what others have asked. The head is everybody's.
            progress: goes through the list of batches and may show how far it is.
        """
        found = np.zeros((len(prompts), self._labels.shape[0]), np.float32)
        keys = _keys(prompts, salts)
        window_of = self._windows(keys)
        windows = {number: list(some) for number, some in itertools.groupby(window_of, window_of.get)}
        documents = [prompt.document for prompt in prompts]
        kinds = [(window_of[key], padded(len(prompt.prefix))) for key, prompt in zip(keys, prompts, strict=True)]
        batches = self._plan(documents, keys, kinds, self._batch_tokens)
        prefixes: dict[Key, Prefix] = {}
        running: tuple[Batch, jax.Array] | None = None
        for batch in progress(batches) if progress else batches:
            if keys[batch.first] not in prefixes:
                prefixes = self._prefixes(windows[window_of[keys[batch.first]]])
            logprobs_BUC = self._run(batch, documents, [prefixes[keys[item]] for item in batch.items])
            if running:  # fetched while the batch just started runs
                _fetch(found, *running)
            running = batch, logprobs_BUC
        if running:
            _fetch(found, *running)
        self._count(prompts)
        return found

    def prefill(
        self, prompts: Sequence[PromptTokens], *, salts: Sequence[bytes] | None = None
    ) -> tuple[np.ndarray, list[Prefix]]:
        """Label log-probs [N, C], and the keys and values that gave them, all padded to one size: answers go on from
        there. There must be at least one prompt."""
        keys = _keys(prompts, salts)
        prefixes = self._prefixes(list(dict.fromkeys(keys)))
        size = max(_whole(padded(len(prompt.prefix)), rounded_width(len(prompt.document))) for prompt in prompts)
        self._count(prompts)
        return self._compute([p.document for p in prompts], [prefixes[key] for key in keys], [size] * len(prompts))

    def warm_up(self, *, document_tokens: int, query_tokens: int, prompts: int | None = None) -> None:
        """Compile every shape that `label_logprobs` can meet.

        Args:
            document_tokens, query_tokens: of a prompt at most, after the prefix and after the head.
            prompts: of a call at most; None for any number.
        """
        most = self._batch_tokens if prompts is None else min(self._batch_tokens, prompts * document_tokens)
        base, rows = self._head if len(self._head_tokens) else self._empty, self._devices()
        prefixes = [padded(base.length + query) for query in range(1, query_tokens + 1)]
        for size in dict.fromkeys(prefixes):
            for shape in shapes(rows, longest=query_tokens, budget=PREFILL_TOKENS):
                if shape.prefixes == 1:  # the head
                    self._run(shape, [], [base], size=size)
            prefix = self._computed(base, size)
            for shape in shapes(rows, longest=document_tokens, budget=most):
                jax.block_until_ready(self._run(shape, [], [prefix]))

    def warm_up_prefill(self, *, document_tokens: int, query_tokens: int) -> list[Prefix]:
        """Compile every shape that `prefill` of one such prompt can meet.

        Returns:
            One empty prefix of each size that it can give.
        """
        base, rows = self._head if len(self._head_tokens) else self._empty, self._devices()
        prefixes = [padded(base.length + query) for query in range(1, query_tokens + 1)]
        widths = {rounded_width(document) for document in range(1, document_tokens + 1)}
        found = {}
        for size in dict.fromkeys(prefixes):
            prefix = self._computed(base, size)
            for width in sorted(widths):
                (shape,) = plan([width], [0], [0], budget=PREFILL_TOKENS, rows=rows)
                _, blocks = self._run(_without_items(shape), [], [prefix], size=_whole(size, width))
                found[_whole(size, width)] = Prefix(jax.block_until_ready(blocks[0]), 0)
        return [found[size] for size in sorted(found)]

    def _computed(self, base: Prefix, size: int) -> Prefix:
        """A prefix of no tokens, padded to `size`, that was computed as real ones are: an array that comes from
        elsewhere is another kind to jit, and would have everything compiled twice."""
        (shape,) = plan([1], [0], [0], budget=PREFILL_TOKENS, rows=self._devices())
        return Prefix(self._run(_without_items(shape), [], [base], size=size)[1][0], 0)

    def _nothing(self, size: int) -> Prefix:
        """The prefix of no tokens, padded to `size`."""
        return Prefix(empty_block(self.config, size, self.dtype), 0)

    def _windows(self, keys: Iterable[Key]) -> dict[Key, int]:
        """The distinct keys in order, numbered so that those of one number fit the cache's bytes together."""
        windows: dict[Key, int] = {}
        window = held = 0
        for key in keys:
            if key not in windows:
                size = self._bytes(padded(len(_tokens(key))))
                if held and held + size > self.kept.capacity:
                    window, held = window + 1, 0
                windows[key], held = window, held + size
        return windows

    def _prefixes(self, keys: Sequence[Key]) -> dict[Key, Prefix]:
        """Every key's prefix, kept or computed."""
        found = {key: self.kept.get(key) for key in keys}
        missing = [key for key, prefix in found.items() if prefix is None]
        tokens = [_tokens(key) for key in missing]
        bases = [self._base(prefix) for prefix in tokens]
        rests = [prefix[base.length :] for prefix, base in zip(tokens, bases, strict=True)]
        _, computed = self._compute(rests, bases, [padded(len(prefix)) for prefix in tokens])
        for key, prefix in zip(missing, computed, strict=True):
            found[key] = prefix
            self.kept.put(key, prefix, self._bytes(prefix.size))
        return found

    def _base(self, tokens: np.ndarray) -> Prefix:
        """What is there of a prefix before it is computed: the head, if it begins with it and goes on, or nothing."""
        size = len(self._head_tokens)
        if 0 < size < len(tokens) and np.array_equal(tokens[:size], self._head_tokens):
            return self._head
        return self._empty

    @functools.cached_property
    def _head(self) -> Prefix:
        return self._compute([self._head_tokens], [self._empty], [padded(len(self._head_tokens))])[1][0]

    def _compute(
        self, tokens: Sequence[np.ndarray], prefixes: Sequence[Prefix], sizes: Sequence[int]
    ) -> tuple[np.ndarray, list[Prefix]]:
        """Label log-probs [N, C] after prefix and tokens of each, and the two as a prefix padded to its size."""
        logprobs = np.zeros((len(tokens), self._labels.shape[0]), np.float32)
        made: dict[int, Prefix] = {}
        kinds = [(prefix.size, size) for prefix, size in zip(prefixes, sizes, strict=True)]
        for batch in self._plan(tokens, prefixes, kinds, PREFILL_TOKENS):
            size = kinds[batch.first][1]
            logprobs_BUC, blocks = self._run(batch, tokens, [prefixes[item] for item in batch.items], size=size)
            _fetch(logprobs, batch, logprobs_BUC)
            for row, items in enumerate(batch.rows):
                for slot, item in enumerate(items):
                    length = prefixes[item].length + len(tokens[item])
                    made[item] = Prefix(blocks[row * batch.slots + slot], length)
        return logprobs, [made[item] for item in range(len(tokens))]

    def _plan(self, tokens: Sequence[np.ndarray], prefixes: Sequence, kinds: Sequence, budget: int) -> list[Batch]:
        number = {prefix: place for place, prefix in enumerate(dict.fromkeys(prefixes))}
        lengths = [len(part) for part in tokens]
        return plan(lengths, [number[prefix] for prefix in prefixes], kinds, budget=budget, rows=self._devices())

    def _run(self, batch: Batch, tokens: Sequence[np.ndarray], prefixes: Sequence[Prefix], *, size: int | None = None):
        """Start a batch: its label log-probs [B, U, C], and with `size` also the blocks. Nothing waits for them.

        `prefixes` are those of `batch.items`, or the one of a batch without items.
        """
        used = list(dict.fromkeys(prefixes))
        number_of = {prefix: number for number, prefix in enumerate(used)}
        numbers = iter([number_of[prefix] for prefix in prefixes])
        used += used[:1] * (batch.prefixes - len(used))
        shape = (len(batch.rows), batch.slots)
        tokens_BT = np.zeros((len(batch.rows), batch.tokens), np.int32)
        lengths_BU, prefix_of_BU = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for row, items in enumerate(batch.rows):
            start = 0
            for slot, item in enumerate(items):
                tokens_BT[row, start : start + len(tokens[item])] = tokens[item]
                lengths_BU[row, slot], prefix_of_BU[row, slot] = len(tokens[item]), next(numbers)
                start += len(tokens[item])
        prefix_lengths = np.array([prefix.length for prefix in used], np.int32)
        suffixes = Suffixes(tokens_BT, lengths_BU, prefix_of_BU, prefix_lengths)
        blocks = [prefix.block for prefix in used]
        self._shapes.add((batch.shape, used[0].size, size))
        self.counts.batches += 1
        self.counts.computed += int(lengths_BU.sum())
        self.counts.padding += tokens_BT.size - int(lengths_BU.sum())
        fixed = {"config": self.config, "width": batch.width}
        if size is None:
            return score_suffixes(self.parameters, self._labels, suffixes, blocks, **fixed)
        return prefill_suffixes(self.parameters, self._labels, suffixes, blocks, **fixed, size=size)

    def _count(self, prompts: Sequence[PromptTokens]) -> None:
        self.counts.prompts += len(prompts)
        self.counts.tokens += sum(len(prompt.prefix) + len(prompt.document) for prompt in prompts)

    def _bytes(self, size: int) -> int:
        config = self.config
        return 2 * config.layers * size * config.kv_heads * config.head_size * self._labels.dtype.itemsize

    def _devices(self) -> int:
        """How many share a batch, a row each: those of the mesh that is set."""
        mesh = jax.sharding.get_abstract_mesh()
        return batch_parts(None if mesh.empty else mesh)


def _without_items(batch: Batch) -> Batch:
    return dataclasses.replace(batch, rows=[[] for _ in batch.rows])


def _keys(prompts: Sequence[PromptTokens], salts: Sequence[bytes] | None) -> list[Key]:
    return [
        (salt, prompt.prefix.tobytes()) for prompt, salt in zip(prompts, salts or [b""] * len(prompts), strict=True)
    ]


def _tokens(key: Key) -> np.ndarray:
    return np.frombuffer(key[1], np.int32)


def padded(length: int) -> int:
    """The positions that a prefix is padded to."""
    return max(1, -(-length // PREFIX_STEP)) * PREFIX_STEP


def _whole(prefix: int, suffix: int) -> int:
    """The positions that a padded prefix and a padded suffix are padded to together."""
    return rounded_width(prefix + suffix)


def _fetch(found: np.ndarray, batch: Batch, logprobs_BUC: jax.Array) -> None:
    """Wait for a batch and put its rows where they belong."""
    fetched = np.asarray(logprobs_BUC)
    for row, items in zip(fetched, batch.rows, strict=True):
        found[items] = row[: len(items)]
