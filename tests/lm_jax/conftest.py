"""Small random decoders, each as a transformers model and as our parameters."""

import os
import pathlib

import jax.numpy as jnp
import pytest
import torch
import transformers

from lm_jax.config import DecoderConfig, to_hugging_face
from lm_jax.parameters import table

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]

# Together they cover: grouped and ungrouped heads, tied and untied heads, q/k norms, biases, head sizes that are not
# embed / query_heads, several rotary bases (small ones, so that short rows turn far).
SHAPES = {
    "qwen3": DecoderConfig("qwen3", 97, 32, 3, 4, 2, 16, 48, rope_theta=500.0, qk_norm=True),
    "qwen3_untied": DecoderConfig("qwen3", 89, 24, 2, 6, 3, 8, 40, rope_theta=1e6, tied_head=False, qk_norm=True),
    "qwen2": DecoderConfig("qwen2", 97, 32, 2, 4, 2, 8, 48, rope_theta=300.0, qkv_bias=True),
    "qwen2_untied": DecoderConfig("qwen2", 83, 32, 2, 4, 1, 8, 64, tied_head=False, qkv_bias=True),
    "llama": DecoderConfig("llama", 97, 36, 3, 9, 3, 4, 48, rope_theta=100.0, norm_epsilon=1e-5),
    "llama_untied": DecoderConfig("llama", 101, 32, 2, 4, 4, 12, 40, norm_epsilon=1e-5, tied_head=False),
}


def transformers_model(config: DecoderConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """The ...ForCausalLM of this shape with random weights large enough that every one of them matters."""
    settings = to_hugging_face(config)
    for key in ("architectures", "rope_theta", "torch_dtype"):
        del settings[key]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def parameters_of(config: DecoderConfig, model: transformers.PreTrainedModel) -> dict:
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    return {
        name: jnp.stack(
            [row.from_hugging_face(state[row.hugging_face.format(layer=layer)]) for layer in range(config.layers)]
        )
        if row.stacked
        else jnp.asarray(row.from_hugging_face(state[row.hugging_face]))
        for name, row in table(config).items()
    }


@pytest.fixture(params=SHAPES)
def shape(request) -> DecoderConfig:
    return SHAPES[request.param]


@pytest.fixture
def twins(shape):
    """(config, transformers model, the same weights as our parameters)."""
    model = transformers_model(shape)
    return shape, model, parameters_of(shape, model)


@pytest.fixture
def qwen3_twins():
    config = SHAPES["qwen3"]
    model = transformers_model(config)
    return config, model, parameters_of(config, model)


@pytest.fixture
def smollm2_gguf() -> pathlib.Path:
    default = REPOSITORY / "weights" / "smollm2-135m-instruct-q4_1.gguf"
    path = pathlib.Path(os.environ.get("AFRL_SMOLLM2_GGUF", default))
    if not path.exists():
        pytest.skip(f"{path} is absent: `make smollm2` fetches it")
    return path


@pytest.fixture
def qwen3_tokenizer() -> pathlib.Path:
    data = pathlib.Path(os.environ.get("AFRL_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (data / "qwen3_tokenizer" / "tokenizer.json").exists():
        pytest.skip(f"{data / 'qwen3_tokenizer'} is absent; AFRL_SHARED_DATA names the folder that holds it")
    return data / "qwen3_tokenizer"
