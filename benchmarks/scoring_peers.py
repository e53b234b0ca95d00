"""The other side of `benchmarks.score_vs_peers`: PyTorch programs that score the same prompts with the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from sentence_transformers import CrossEncoder

from afrl_jax.answer_format import AnswerFormat, PromptTokens
from afrl_jax.export import CLASSIFIER
from afrl_jax.schema import Document, Query

BATCH = 32  # pairs, of like length
Pairs = Sequence[tuple[Query, Document]]


class CrossEncoderPeer:
    """sentence-transformers' CrossEncoder of the exported classifier, given texts."""

    def __init__(self, folder: Path, format: AnswerFormat, dtype: str):
        self.format = format
        kwargs = {"dtype": getattr(torch, dtype)}
        self.encoder = CrossEncoder(str(folder / CLASSIFIER), device="cpu", model_kwargs=kwargs)

    def __call__(self, pairs: Pairs) -> np.ndarray:
        """Label logits [N, C]."""
        prefix, document, slot = self.format.prefix_text, self.format.document_text, self.format.template.slot
        texts = [(prefix(query), document(given) + slot) for query, given in pairs]
        return self.encoder.predict(texts, batch_size=BATCH, activation_fn=torch.nn.Identity()).astype(np.float64)


class TransformersPeer:
    """transformers, the head read at the label rows alone.

    Args:
        cached: prefill instruction and query once and share their keys and values between the documents of a query, the
            instruction's also between queries; or else pad whole prompts.
        precision: of `torch.set_float32_matmul_precision`.
    """

    def __init__(self, folder: Path, format: AnswerFormat, dtype: str, *, cached: bool, precision: str = "highest"):
        self.format, self.cached, self.precision = format, cached, precision
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.labels = self.model.get_output_embeddings().weight[list(format.label_ids)]
        self.head: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    def __call__(self, pairs: Pairs) -> np.ndarray:
        """Label logits [N, C]."""
        torch.set_float32_matmul_precision(self.precision)
        try:
            with torch.inference_mode():
                prompts = self.format.encode_prompts(pairs)
                return self._by_query(prompts) if self.cached else self._batches([p.tokens for p in prompts], None)
        finally:
            torch.set_float32_matmul_precision("highest")

    def _by_query(self, prompts: Sequence[PromptTokens]) -> np.ndarray:
        head = self.format.head_tokens
        if self.head is None:
            self.head = self._prefill(head, None)
        found = np.zeros((len(prompts), len(self.labels)))
        members: dict[bytes, list[int]] = {}
        for place, prompt in enumerate(prompts):
            members.setdefault(prompt.prefix.tobytes(), []).append(place)
        for places in members.values():
            kept = self._prefill(prompts[places[0]].prefix[len(head) :], self.head)
            found[places] = self._batches([prompts[place].document for place in places], kept)
        return found

    def _prefill(self, tokens: np.ndarray, before) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [1, K, S, H] a layer, of what came before and of these tokens."""
        cache = transformers.DynamicCache(before)
        self.model.model(torch.tensor(tokens[None], dtype=torch.long), past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _batches(self, texts: Sequence[np.ndarray], before) -> np.ndarray:
        """Logits [N, C] of token arrays, the longest first, right-padded."""
        found = np.zeros((len(texts), len(self.labels)))
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        shared = before[0][0].shape[2] if before else 0
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            lengths = torch.tensor([len(texts[row]) for row in rows])
            ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
            for place, row in enumerate(rows):
                ids[place, : lengths[place]] = torch.tensor(texts[row], dtype=torch.long)
            mask = (torch.arange(shared + ids.shape[1]) < shared + lengths[:, None]).long()
            cache = None
            if before:
                wide = [tuple(x.expand(len(rows), -1, -1, -1) for x in layer) for layer in before]
                cache = transformers.DynamicCache(wide)
            hidden = self.model.model(ids, attention_mask=mask, past_key_values=cache, use_cache=bool(before))[0]
            last = hidden[torch.arange(len(rows)), lengths - 1]
            found[rows] = (last @ self.labels.T).double().numpy()
        return found


def peers(folder: Path, format: AnswerFormat) -> dict[str, CrossEncoderPeer | TransformersPeer]:
    """Every peer by name; a name ends in what it computes with."""
    return {
        "sentence-transformers CrossEncoder, float32": CrossEncoderPeer(folder, format, "float32"),
        "sentence-transformers CrossEncoder, bfloat16": CrossEncoderPeer(folder, format, "bfloat16"),
        "transformers padded, bfloat16": TransformersPeer(folder, format, "bfloat16", cached=False),
        "transformers prefix cache, float32": TransformersPeer(folder, format, "float32", cached=True),
        "transformers prefix cache, medium, float32": TransformersPeer(
            folder, format, "float32", cached=True, precision="medium"
        ),
        "transformers prefix cache, bfloat16": TransformersPeer(folder, format, "bfloat16", cached=True),
    }
