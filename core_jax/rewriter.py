"""A rewriter as a folder and as an object: what training leaves, the gate measures, the store is filled from.

    <folder>/            Hugging Face causal model: config.json, model.safetensors, tokenizer, generation_config.json
    <folder>/rewriter.json   how to ask it: template, lengths, digests, golden contexts with the rewrites they got

Loading measures the golden rewrites again, in float32 what was measured in float32 at export, and refuses a folder that
does not find them as likely as it did, or whose weights have another digest.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from afrl_jax.schema import Document
from core_jax.ratio_reward import Rewrite
from core_jax.rewrite_format import RewriteFormat, Template
from core_jax.sampler import InProcess
from core_jax.schema import Context
from kernels import products
from lm_jax.config import DecoderConfig
from lm_jax.decoder import Decoder
from lm_jax.parameters import Parameters
from lm_jax.rows import rounded_width
from lm_jax.run_folder import replace_folder
from lm_jax.tokenizer import Tokenizer
from lm_jax.weights import read_weights, weights_digest, write_weights

NAME = "rewriter.json"
FORMAT_VERSION = 1
# Nats a token: float32 sums taken in another order differ by less than 1e-5, another model by more.
GOLDEN_TOLERANCE = 1e-3
TOP = 10  # next tokens whose entropy is measured
_LENGTHS = 32  # prompts and rewrites are padded to multiples, so that few shapes are ever compiled


class GoldenMismatch(ValueError):
    """A rewriter's folder does not find its golden rewrites as likely as it did when it was exported."""


@dataclasses.dataclass(frozen=True)
class TokenFigures:
    """Of N given rewrites, float64 [N]: mean -log p of its tokens, and mean entropy of the TOP most probable next
    tokens (renormalized), both in nats a token."""

    surprisal: np.ndarray
    entropy: np.ndarray


class Rewriter:
    """Rewrites contexts greedily; also measures any rewrites under its distribution.

    Attributes:
        version: digest of the exported weights, empty before.
    """

    def __init__(
        self,
        config: DecoderConfig,
        parameters: Parameters,
        format: RewriteFormat,
        *,
        max_new_tokens: int,
        version: str = "",
        dtype: str = "float32",
        rows: int = 16,
    ):
        self.config, self.parameters, self.format, self.dtype = config, parameters, format, dtype
        self.max_new_tokens, self.version, self._rows = max_new_tokens, version, rows

    @classmethod
    def load(
        cls, folder: str | Path, *, dtype: str = "float32", check: bool = True, mesh: Mesh | None = None
    ) -> Rewriter:
        """Read an exported folder; parameters are placed on `mesh`, which must be set where there is one.

        Raises:
            GoldenMismatch: it does not find its golden rewrites as likely as it did.
            ValueError: rewriter.json is missing or of another version, or template or weights are not those that it
                names.
        """
        folder = Path(folder)
        file = folder / NAME
        if not file.exists():
            raise ValueError(f"{folder} is no rewriter: it has no {NAME}")
        description = json.loads(file.read_text(encoding="utf-8"))
        if description.get("format_version") != FORMAT_VERSION:
            found = description.get("format_version")
            raise ValueError(f"{file}: format_version is {found!r}, this program reads {FORMAT_VERSION}")
        template = Template(**description["template"])
        if template.checksum != description["template_checksum"]:
            raise ValueError(f"{file}: the template does not have its checksum: prompts would not be those of training")
        if (digest := weights_digest(folder)) != description["weights_digest"]:
            raise ValueError(f"{file}: weights_digest is {description['weights_digest']}, the weights' is {digest}")
        format = RewriteFormat(
            Tokenizer.load(folder), template=template, max_watched_tokens=description["max_watched_tokens"]
        )
        config, parameters = read_weights(folder, mesh=mesh)
        rewriter = cls(
            config, parameters, format,
            max_new_tokens=description["max_new_tokens"], version=description["weights_digest"], dtype=dtype,
        )  # fmt: skip
        if check:
            rewriter.check_golden(description["golden"], folder)
        return rewriter

    def export(self, folder: Path, golden: Sequence[Context] = (), **facts: Any) -> dict[str, Any]:
        """Write the folder, whole or not at all; one that is there is replaced. `facts` are recorded as they are.

        Returns:
            The contents of rewriter.json.
        """
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        export_weights(partial, self.config, self.parameters, self.format.tokenizer)
        exact = Rewriter(
            self.config, self.parameters, self.format, max_new_tokens=self.max_new_tokens, rows=self._rows
        )  # in float32, whatever this one computes in
        rewrites = exact.rewrite_tokens(golden)
        figures = exact.measure(golden, rewrites)
        description = {
            "format_version": FORMAT_VERSION,
            "template": dataclasses.asdict(self.format.template),
            "template_checksum": self.format.template.checksum,
            "max_watched_tokens": self.format.max_watched_tokens,
            "max_new_tokens": self.max_new_tokens,
            "weights_digest": weights_digest(partial),
            "golden": [
                {"context": dataclasses.asdict(context), "tokens": tokens.tolist(), "surprisal": surprisal}
                for context, tokens, surprisal in zip(golden, rewrites, figures.surprisal.tolist(), strict=True)
            ],
            **facts,
        }
        text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
        (partial / NAME).write_text(text, encoding="utf-8")
        replace_folder(folder, partial)
        return description

    def rewrite(self, contexts: Sequence[Context]) -> list[Rewrite]:
        """The greedy rewrite of each context."""
        return [self.format.read(tokens) for tokens in self.rewrite_tokens(contexts)]

    def rewrite_tokens(self, contexts: Sequence[Context]) -> list[np.ndarray]:
        """The greedy rewrite of each context as tokens, with end of text where it ended."""
        prompts = self.format.encode_prompts(contexts)
        found: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
        for block in self._blocks(prompts):
            here = [prompts[place] for place in block]
            drawn = jax.device_get(
                self._sampler(len(here[-1])).draw(
                    self.parameters, here, [0] * len(here), jax.random.key(0), group=1, temperature=0.0
                )
            )
            for place, tokens, length in zip(block, drawn.tokens, drawn.lengths, strict=False):  # then padding
                found[place] = tokens[0, : length[0]]
        return found

    def measure(self, contexts: Sequence[Context], rewrites: Sequence[np.ndarray]) -> TokenFigures:
        """Surprisal and entropy of one given rewrite (tokens) a context."""
        prompts = self.format.encode_prompts(contexts)
        texts = [np.concatenate(both) for both in zip(prompts, rewrites, strict=True)]
        rows, targets = self._rows, _up(max(map(len, rewrites), default=1))
        found = np.zeros((2, len(prompts)))
        for block in self._blocks(texts):
            width = rounded_width(len(texts[block[-1]]))
            arrays = {name: np.zeros((rows, width), np.int32) for name in ("tokens", "groups")}
            arrays |= {name: np.zeros((rows, targets), np.int32) for name in ("at", "target", "on")}
            for row, place in enumerate(block):
                text, rewrite = texts[place], rewrites[place]
                arrays["tokens"][row, : len(text)], arrays["groups"][row, : len(text)] = text, 1
                arrays["at"][row, : len(rewrite)] = np.arange(len(prompts[place]) - 1, len(text) - 1)
                arrays["target"][row, : len(rewrite)], arrays["on"][row, : len(rewrite)] = rewrite, 1
            means = _token_figures(self.parameters, arrays, config=self.config, dtype=self.dtype)
            found[:, block] = np.asarray(means)[:, : len(block)]
        return TokenFigures(*found)

    def _blocks(self, texts: Sequence[np.ndarray]) -> Iterator[list[int]]:
        """Places of at most `rows` texts alike in length, the longest last: one long text pads its own block alone."""
        by_length = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        for start in range(0, len(texts), self._rows):
            yield by_length[start : start + self._rows]

    def check_golden(self, golden: Sequence[Mapping[str, Any]], source: str | Path) -> None:
        """Measure the golden rewrites again; bf16 compute is allowed its rounding.

        Raises:
            GoldenMismatch: names the context and what differs.
        """
        contexts = [_context(row["context"]) for row in golden]
        tokens = [np.array(row["tokens"], np.int32) for row in golden]
        expected = np.array([row["surprisal"] for row in golden])
        error = np.abs(self.measure(contexts, tokens).surprisal - expected)
        tolerance = GOLDEN_TOLERANCE if self.dtype == "float32" else 0.05
        if len(golden) and not error.max() <= tolerance:  # NaN is a mismatch as well
            worst = int(np.argmax(error))
            raise GoldenMismatch(
                f"{source}: golden context {worst} (query {contexts[worst].query!r}): its rewrite is off by "
                f"{error[worst]:.2g} nats a token, more than {tolerance}: weights, tokenizer or template were others"
            )

    def _sampler(self, longest_prompt: int) -> InProcess:
        return InProcess(
            self.format, self.config, max_new_tokens=self.max_new_tokens, prompt_tokens=rounded_width(longest_prompt),
            rows=self._rows, dtype=self.dtype,
        )  # fmt: skip


def export_weights(folder: Path, config: DecoderConfig, parameters: Parameters, tokenizer: Tokenizer) -> None:
    """A Hugging Face folder that any server samples from as training assumes.

    transformers' own default keeps the 50 most probable tokens and decodes greedily: generation_config.json says
    otherwise.
    """
    ids = {name: getattr(tokenizer, name) for name in ("bos", "eos", "pad")}
    write_weights(folder, config, parameters, **ids)
    tokenizer.save(folder)
    file = folder / "generation_config.json"
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    file.write_text(json.dumps(json.loads(file.read_text()) | sampling, indent=2) + "\n")


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _token_figures(parameters: Parameters, batch, *, config: DecoderConfig, dtype: str) -> jax.Array:
    """[2, B]: mean surprisal and mean entropy of the TOP next tokens over each row's targets; 0 where it has none."""
    decoder = Decoder(config, parameters, dtype=dtype)
    positions = jnp.broadcast_to(jnp.arange(batch["tokens"].shape[1]), batch["tokens"].shape)
    hidden_BTD = decoder(batch["tokens"], positions, batch["groups"])

    def row(inputs):
        hidden_TD, at_M, target_M, on_M = inputs
        head_VD = decoder.output_embedding
        logits_MV = products.einsum("md,vd->mv", hidden_TD[at_M], head_VD)
        logprob_MV = jax.nn.log_softmax(logits_MV, axis=-1)
        chosen_M = jnp.take_along_axis(logprob_MV, target_M[:, None], axis=1)[:, 0]
        top_MK = jax.nn.log_softmax(jax.lax.top_k(logprob_MV, TOP)[0], axis=-1)
        entropy_M = -jnp.sum(jnp.exp(top_MK) * top_MK, axis=-1)
        count = jnp.maximum(on_M.sum(), 1)
        return jnp.stack([-jnp.sum(on_M * chosen_M), jnp.sum(on_M * entropy_M)]) / count

    return jax.lax.map(row, (hidden_BTD, batch["at"], batch["target"], batch["on"])).T


def _up(length: int) -> int:
    return -(-length // _LENGTHS) * _LENGTHS


def _context(fields: Mapping[str, Any]) -> Context:
    watched = fields["watched"]
    return Context(fields["query"], None if watched is None else Document(**watched))
