"""Read a GGUF file: the decoder's shape, its tensors under their Hugging Face names, its tokenizer."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from gguf import GGUFReader, TokenType, dequantize

from lm_jax.config import ARCHITECTURES, DecoderConfig

HUGGING_FACE_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class GGUFFile(Mapping[str, np.ndarray]):
    """The tensors of a GGUF file by Hugging Face name; each is dequantized to float32 when it is asked for."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._reader = GGUFReader(self.path)
        self._tensors = {_hugging_face_name(tensor.name): tensor for tensor in self._reader.tensors}
        self.shapes = {name: tuple(int(n) for n in tensor.shape[::-1]) for name, tensor in self._tensors.items()}

    def metadata(self, key: str, default: Any = ...) -> Any:
        """The value of a metadata key.

        Raises:
            ValueError: the file has no such key and no default was given.
        """
        field = self._reader.get_field(key)
        if field is None and default is ...:
            raise ValueError(f"{self.path}: the metadata key {key!r} is missing")
        return default if field is None else field.contents()

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        array = dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes[name])
        if self.config.family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # Stored for rotating neighbours (0, 1), (2, 3), ..; ours rotates (0, H/2), (1, H/2 + 1), ..
            rows, inputs = array.shape
            pairs = array.reshape(rows // self.config.head_size, self.config.head_size // 2, 2, inputs)
            array = pairs.swapaxes(1, 2).reshape(rows, inputs)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @functools.cached_property
    def config(self) -> DecoderConfig:
        """The decoder's shape, from the metadata; the vocabulary's size from the embedding.

        Raises:
            ValueError: an unknown architecture, scaled rotary positions, or something missing.
        """
        family = self.metadata("general.architecture")
        if family not in ARCHITECTURES:
            raise ValueError(f"{self.path}: unknown architecture {family!r}; known are {', '.join(ARCHITECTURES)}")
        factor = self.metadata(f"{family}.rope.scaling.factor", 1.0)
        scaling = self.metadata(f"{family}.rope.scaling.type", "none" if factor == 1.0 else "linear")
        if scaling != "none":
            raise ValueError(f"{self.path}: {family}.rope.scaling.type={scaling!r} is not supported by this decoder")

        def value(key: str, default: Any = ...) -> Any:
            return self.metadata(f"{family}.{key}", default)

        if "model.embed_tokens.weight" not in self.shapes:
            raise ValueError(f"{self.path}: missing tensors: token_embd.weight")
        embed, heads = value("embedding_length"), value("attention.head_count")
        return DecoderConfig(
            family=family,
            vocab_size=self.shapes["model.embed_tokens.weight"][0],
            embed=embed,
            layers=value("block_count"),
            query_heads=heads,
            kv_heads=value("attention.head_count_kv", heads),
            head_size=value("attention.key_length", embed // heads),
            ffn=value("feed_forward_length"),
            rope_theta=float(value("rope.freq_base", 10_000.0)),
            # The file holds a float32: 1e-5 comes back as 9.99999974e-06.
            norm_epsilon=float(str(np.float32(value("attention.layer_norm_rms_epsilon")))),
            tied_head="lm_head.weight" not in self._tensors,
            qk_norm=family == "qwen3",
            qkv_bias=family == "qwen2",
            max_positions=value("context_length"),
        )

    def tokenizer(self) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
        """The fast tokenizer that the metadata describes, and the fields of its tokenizer_config.json.

        Raises:
            ValueError: a tokenizer that is not byte-level BPE, or that splits text in an unknown way.
        """
        model, split = self.metadata("tokenizer.ggml.model"), self.metadata("tokenizer.ggml.pre", "gpt-2")
        if model != "gpt2" or split not in PRE_TOKENIZERS:
            raise ValueError(
                f"{self.path}: unknown tokenizer model={model!r}, pre={split!r}; "
                f"known is model='gpt2' with pre one of {', '.join(PRE_TOKENIZERS)}"
            )
        tokens: list[str] = self.metadata("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ", 1)) for merge in self.metadata("tokenizer.ggml.merges")]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        tokenizer = byte_level_tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges), split)
        types = self.metadata("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))
        for kind, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
            tokenizer.add_tokens(
                [
                    tokenizers.AddedToken(token, normalized=False, special=special)
                    for token, token_type in zip(tokens, types, strict=True)
                    if token_type == kind
                ]
            )
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        ids = {ours: self.metadata(f"tokenizer.ggml.{theirs}_token_id", None) for ours, theirs in names.items()}
        settings = {f"{name}_token": tokens[index] for name, index in ids.items() if index is not None}
        if template := self.metadata("tokenizer.chat_template", None):
            settings["chat_template"] = template
        return tokenizer, settings


def byte_level_tokenizer(model: tokenizers.models.BPE, split: str) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer that first splits text as `split`, a key of PRE_TOKENIZERS, says."""
    tokenizer = tokenizers.Tokenizer(model)
    if split == "qwen2":
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(PRE_TOKENIZERS[split])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _byte_level(use_regex: bool) -> tokenizers.pre_tokenizers.PreTokenizer:
    return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


PRE_TOKENIZERS = {
    "gpt-2": [_byte_level(use_regex=True)],
    "smollm": [tokenizers.pre_tokenizers.Digits(individual_digits=True), _byte_level(use_regex=True)],
    "qwen2": [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(_QWEN2_SPLIT), behavior="isolated"),
        _byte_level(use_regex=False),
    ],
}


def _hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; an unknown name stays as it is."""
    stem, _, kind = name.rpartition(".")
    prefix = ""
    if stem.startswith("blk."):
        _, layer, stem = stem.split(".", 2)
        prefix = f"model.layers.{layer}."
    return f"{prefix}{HUGGING_FACE_NAMES[stem]}.{kind}" if stem in HUGGING_FACE_NAMES else name
