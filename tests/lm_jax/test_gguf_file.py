import pathlib

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lm_jax.config import DecoderConfig
from lm_jax.decoder import Decoder
from lm_jax.parameters import initialize
from lm_jax.weights import read_weights, write_weights

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def assert_same(parameters, expected):
    assert parameters.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(parameters[name], array, err_msg=name)


def gguf_file(path, config: DecoderConfig, model, quantization=gguf.GGMLQuantizationType.F32) -> None:
    """What llama.cpp's converter writes: its tensor names, and for Llama its order of q and k rows."""
    writer = gguf.GGUFWriter(path, config.family)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.embed)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.query_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{token}" for token in range(config.vocab_size)])
    architecture = {"qwen3": gguf.MODEL_ARCH.QWEN3, "qwen2": gguf.MODEL_ARCH.QWEN2, "llama": gguf.MODEL_ARCH.LLAMA}
    names = gguf.get_tensor_name_map(architecture[config.family], config.layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tied_head:
            continue
        array = tensor.numpy()
        if config.family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = array.reshape(-1, 2, config.head_size // 2, config.embed)
            array = halves.swapaxes(1, 2).reshape(array.shape)
        kind = quantization if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(theirs, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_holds_the_same_model_as_transformers(twins, tmp_path):
    config, model, parameters = twins
    gguf_file(tmp_path / "model.gguf", config, model)
    read_config, read = read_weights(tmp_path / "model.gguf")
    assert read_config == config
    assert_same(read, parameters)


def test_quantized_gguf_is_dequantized(tmp_path):
    config = DecoderConfig("llama", 64, 64, 1, 4, 2, 16, 96, max_positions=64)
    parameters = initialize(config, seed=1)
    write_weights(tmp_path, config, parameters)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    gguf_file(tmp_path / "model.gguf", config, model, gguf.GGMLQuantizationType.Q8_0)
    read = read_weights(tmp_path / "model.gguf")[1]
    for name, array in parameters.items():
        # eight bits a weight and a float16 scale for 32 of them: half a step, and the rounding of the scale
        tolerance = float(jnp.abs(array).max()) * (1 / 254 + 2**-11)
        np.testing.assert_allclose(read[name], array, atol=tolerance, err_msg=name)


def test_gguf_without_a_needed_tensor_is_told(qwen3_twins, tmp_path):
    config, model, _ = qwen3_twins
    del model.model.layers[1].self_attn.q_norm.weight
    gguf_file(tmp_path / "model.gguf", config, model)
    with pytest.raises(ValueError, match=r"missing tensors: model\.layers\.1\.self_attn\.q_norm\.weight"):
        read_weights(tmp_path / "model.gguf")
    del model.model.embed_tokens.weight
    gguf_file(tmp_path / "model.gguf", config, model)
    with pytest.raises(ValueError, match=r"token_embd\.weight"):
        read_weights(tmp_path / "model.gguf")


def test_gguf_of_an_unknown_architecture_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="mamba"):
        read_weights(tmp_path / "model.gguf")


def test_a_scaled_rope_without_a_type_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen3")
    writer.add_rope_scaling_factor(4.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"qwen3\.rope\.scaling\.type='linear' is not supported"):
        read_weights(tmp_path / "model.gguf")


def test_every_argmax_over_real_text_agrees_with_transformers_own_gguf_loader(smollm2_gguf):
    """SmolLM2-135M over 2,000 tokens of English, the repository's licence."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    licence = (REPOSITORY / "LICENSE").read_text()
    tokens = np.asarray(tokenizer.encode(licence)[:2000])[None]
    assert tokens.shape == (1, 2000)
    config, parameters = read_weights(smollm2_gguf)

    @jax.jit
    def logits(parameters, tokens):
        decoder = Decoder(config, parameters)
        positions = jnp.arange(tokens.shape[1])[None]
        return decoder(tokens, positions, jnp.ones_like(tokens)) @ decoder.output_embedding.T

    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    ours = np.asarray(logits(parameters, tokens))
    assert (ours.argmax(-1) == expected.argmax(-1)).all()
    np.testing.assert_allclose(ours, expected, atol=2e-3, rtol=0)  # 30 layers of float32; 5e-4 observed
