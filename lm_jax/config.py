"""The decoder's shape: one dataclass, its presets, and the translation from and to a Hugging Face config.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lm_jax.typed_config import at_least


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A pre-norm decoder with rotary positions, grouped-query attention and a gated feed-forward (SwiGLU).

    `family` is the Hugging Face `model_type`: it names the export class and decides what the other fields may be.
    `qk_norm` and `qkv_bias` follow from it, since config.json does not say them.

    Raises:
        ValueError: names the field and what would be right.
    """

    family: str
    vocab_size: int
    embed: int
    layers: int
    query_heads: int
    kv_heads: int
    head_size: int
    ffn: int
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    tied_head: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    max_positions: int = 32_768
    initializer_range: float = 0.02

    def __post_init__(self):
        if self.family not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {self.family!r}; known are {', '.join(ARCHITECTURES)}")
        for name, family in FAMILY_OF.items():
            if getattr(self, name) != (self.family == family):
                raise ValueError(f"{name} must be {self.family == family} in the family {self.family!r}")
        sizes = ("vocab_size", "embed", "layers", "query_heads", "kv_heads", "head_size", "ffn", "max_positions")
        at_least(1, "", self, *sizes)
        for name in ("rope_theta", "norm_epsilon", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)} must be above 0")
        if self.query_heads % self.kv_heads:
            raise ValueError(f"{self.query_heads} query heads cannot share {self.kv_heads} key/value heads evenly")
        if self.head_size % 2:
            raise ValueError(f"rotary positions need an even head size, not {self.head_size}")

    @property
    def parameter_count(self) -> int:
        """Number of parameters; a tied head counts once."""
        attention = 2 * self.embed * self.head_size * (self.query_heads + self.kv_heads)
        norms = 2 * self.embed + (2 * self.head_size if self.qk_norm else 0)
        bias = self.head_size * (self.query_heads + 2 * self.kv_heads) if self.qkv_bias else 0
        layer = attention + 3 * self.embed * self.ffn + norms + bias
        return self.layers * layer + self.vocab_size * self.embed * (1 if self.tied_head else 2) + self.embed


ARCHITECTURES = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama"}
FAMILY_OF = {"qk_norm": "qwen3", "qkv_bias": "qwen2"}  # the one family that has each


def _qwen3(embed: int, layers: int, query_heads: int, ffn: int, tied: bool, kv_heads: int = 8) -> DecoderConfig:
    return DecoderConfig(
        family="qwen3", vocab_size=151_936, embed=embed, layers=layers, query_heads=query_heads, kv_heads=kv_heads,
        head_size=128, ffn=ffn, rope_theta=1e6, tied_head=tied, qk_norm=True, max_positions=40_960,
    )  # fmt: skip


def _qwen2_5(embed: int, layers: int, query_heads: int, kv_heads: int, ffn: int, tied: bool) -> DecoderConfig:
    return DecoderConfig(
        family="qwen2", vocab_size=151_936 if embed < 3584 else 152_064, embed=embed, layers=layers,
        query_heads=query_heads, kv_heads=kv_heads, head_size=embed // query_heads, ffn=ffn, rope_theta=1e6,
        tied_head=tied, qkv_bias=True,
    )  # fmt: skip


def _smollm2(embed: int, layers: int, query_heads: int, kv_heads: int, ffn: int, theta: float) -> DecoderConfig:
    return DecoderConfig(
        family="llama", vocab_size=49_152, embed=embed, layers=layers, query_heads=query_heads, kv_heads=kv_heads,
        head_size=64, ffn=ffn, rope_theta=theta, norm_epsilon=1e-5, max_positions=8192,
    )  # fmt: skip


# Shapes from the config.json that each model's authors publish.
PRESETS: dict[str, DecoderConfig] = {
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12_288, False),
    "qwen3-14b": _qwen3(5120, 40, 40, 17_408, False),
    "qwen3-32b": _qwen3(5120, 64, 64, 25_600, False),
    "qwen2.5-0.5b": _qwen2_5(896, 24, 14, 2, 4864, True),
    "qwen2.5-1.5b": _qwen2_5(1536, 28, 12, 2, 8960, True),
    "qwen2.5-7b": _qwen2_5(3584, 28, 28, 4, 18_944, False),
    "smollm2-135m": _smollm2(576, 30, 9, 3, 1536, 100_000.0),
    "smollm2-360m": _smollm2(960, 32, 15, 5, 2560, 100_000.0),
    "smollm2-1.7b": _smollm2(2048, 24, 32, 32, 8192, 130_000.0),
}


def preset(name: str, **changes: Any) -> DecoderConfig:
    """A preset by name, with fields replaced: `preset("qwen3-0.6b", layers=4)`."""
    if name not in PRESETS:
        raise ValueError(f"unknown model preset {name!r}; known are {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)


def from_hugging_face(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a parsed config.json; rope settings may stand at the top (transformers 4) or in `rope_parameters` (5).

    Raises:
        ValueError: an architecture or a feature (rope scaling, sliding window, biases) that the decoder does not have.
    """
    family = config.get("model_type")
    if family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"config.json: unknown architecture model_type={family!r}; known are {known}")
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}  # transformers reads it beside the other
    refused = {
        **{key: each for key, each in {"rope_parameters": rope, "rope_scaling": scaling}.items() if _scales(each)},
        "partial_rotary_factor": config.get("partial_rotary_factor", 1.0) != 1.0 and config["partial_rotary_factor"],
        "layer_types": set(config.get("layer_types") or ()) - {"full_attention"},
        "use_sliding_window": config.get("use_sliding_window"),
        "attention_bias": config.get("attention_bias"),
        "mlp_bias": config.get("mlp_bias"),
        "hidden_act": config.get("hidden_act", "silu") != "silu" and config["hidden_act"],
        "quantization_config": config.get("quantization_config"),
    }
    for key, value in refused.items():
        if value:
            raise ValueError(f"config.json: {key}={value!r} is not supported by this decoder")
    heads = config["num_attention_heads"]
    return DecoderConfig(
        family=family,
        vocab_size=config["vocab_size"],
        embed=config["hidden_size"],
        layers=config["num_hidden_layers"],
        query_heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        ffn=config["intermediate_size"],
        rope_theta=float(rope.get("rope_theta") or scaling.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        **{name: family == its for name, its in FAMILY_OF.items()},
        max_positions=config.get("max_position_embeddings", 32_768),
        initializer_range=config.get("initializer_range", 0.02),
    )


def _scales(rope: Mapping[str, Any]) -> bool:
    """Whether rope settings ask for more than a base frequency."""
    plain = rope.get("rope_type", rope.get("type", "default")) == "default"
    return not plain or rope.get("factor", 1.0) != 1.0 or rope.get("partial_rotary_factor", 1.0) != 1.0


def to_hugging_face(
    config: DecoderConfig, *, bos: int | None = None, eos: int | None = None, pad: int | None = None
) -> dict[str, Any]:
    """The config.json of a model of this shape, with rope settings in both spellings."""
    return {
        "architectures": [f"{ARCHITECTURES[config.family]}ForCausalLM"],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.query_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.ffn,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_head,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.initializer_range,
        "attention_bias": False,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "torch_dtype": "float32",
    }
