import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects

from lm_jax.config import DecoderConfig, to_hugging_face
from lm_jax.parameters import initialize, table
from lm_jax.source import locate
from lm_jax.weights import hugging_face_tensors, read_weights, write_safetensors, write_weights

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
TINY = DecoderConfig("qwen3", 61, 16, 2, 4, 2, 8, 24, qk_norm=True)


def assert_same(parameters, expected):
    assert parameters.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(parameters[name], array, err_msg=name)


def rewrite(folder, change):
    """Apply `change` to the dictionary of tensors of a single-file model folder."""
    file = folder / "model.safetensors"
    tensors = dict(safetensors.numpy.load_file(file))
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


@pytest.fixture
def folder(tmp_path):
    write_weights(tmp_path, TINY, initialize(TINY, seed=3))
    return tmp_path


def test_a_folder_that_transformers_wrote(twins, tmp_path):
    config, model, parameters = twins
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    read_config, read = read_weights(tmp_path)
    assert read_config == config
    assert_same(read, parameters)


def test_transformers_loads_what_we_write_with_no_key_missing_or_unexpected(twins, tmp_path):
    config, model, parameters = twins
    write_weights(tmp_path, config, parameters, shard_bytes=20_000, bos=None, eos=1, pad=2)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == 4 * config.parameter_count
    for shard in shards:
        with safetensors.safe_open(tmp_path / shard, "np") as file:
            assert file.metadata() == {"format": "pt"}
            assert sum(file.get_tensor(name).nbytes for name in file.keys()) <= 20_000  # noqa: SIM118 - no mapping
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info.values()), info
    assert (loaded.config.eos_token_id, loaded.generation_config.pad_token_id) == (1, 2)
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, atol=0, rtol=0)
    assert_same(read_weights(tmp_path)[1], parameters)


def test_a_smaller_export_leaves_nothing_of_the_larger_one(folder):
    parameters = initialize(TINY, seed=4)
    write_weights(folder, TINY, parameters, shard_bytes=4_000)
    write_weights(folder, TINY, parameters)
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]
    assert_same(read_weights(folder)[1], parameters)


def test_bfloat16_files_are_written_and_read_to_either_dtype(tmp_path):
    parameters = initialize(TINY, seed=5)
    write_weights(tmp_path, TINY, parameters, dtype=jnp.bfloat16)
    rounded = {name: np.asarray(array).astype(ml_dtypes.bfloat16) for name, array in parameters.items()}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert model.dtype == torch.bfloat16
    stored = model.model.embed_tokens.weight.detach().float().numpy()
    np.testing.assert_array_equal(stored, rounded["embed"].astype(np.float32))
    for dtype in (jnp.float32, jnp.bfloat16):
        read = read_weights(tmp_path, dtype=dtype)[1]
        assert all(array.dtype == dtype for array in read.values())
        assert_same(read, {name: array.astype(dtype) for name, array in rounded.items()})


def test_an_extra_head_can_stand_beside_the_decoder(tmp_path):
    parameters = initialize(TINY, seed=6)
    tensors = [*hugging_face_tensors(TINY, parameters), ("score.weight", np.ones((4, 16), np.float32))]
    write_safetensors(tmp_path, tensors, shard_bytes=10**9)
    settings = to_hugging_face(TINY, pad=0) | {"num_labels": 4}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert model.num_labels == 4


def test_harmless_extras_are_passed_over(folder):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    rewrite(folder, add)
    assert_same(read_weights(folder)[1], initialize(TINY, seed=3))


def drop(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def add(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)


def transpose(tensors):
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].T.copy()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (drop, r"missing tensors: model\.layers\.1\.mlp\.up_proj\.weight"),
        (add, r"unexpected tensors: model\.layers\.0\.self_attn\.q_proj\.bias"),
        (transpose, r"wrong shapes: model\.layers\.1\.mlp\.down_proj\.weight is \(24, 16\), expected \(16, 24\)"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(folder, change, told):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=told):
        read_weights(folder)


def test_an_unknown_architecture_is_named(folder):
    settings = json.loads((folder / "config.json").read_text()) | {"model_type": "gpt_neox"}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"gpt_neox.*qwen3"):
        read_weights(folder)


def test_a_config_without_a_needed_key_is_named(folder):
    settings = json.loads((folder / "config.json").read_text())
    del settings["intermediate_size"]
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"config\.json.*intermediate_size"):
        read_weights(folder)


def test_a_cut_file_an_integer_tensor_and_missing_files_are_named(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ValueError, match="cut short"):
        read_weights(folder)
    for cut in (b"", content[:20], b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"):
        (folder / "model.safetensors").write_bytes(cut)
        with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file, or was cut short"):
            read_weights(folder)
    (folder / "model.safetensors").write_bytes(content)
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": np.ones(16, np.int32)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight has dtype I32"):
        read_weights(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        read_weights(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read_weights(folder)


def test_sources_that_do_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        read_weights(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf"):
        read_weights("absent.gguf")
    with pytest.raises(ConnectionError, match=r"nobody/absent.*hub"):
        read_weights("nobody/absent")


def test_a_hub_id_is_fetched_with_the_patterns_asked_for(folder, monkeypatch):
    asked = {}

    def snapshot_download(name, allow_patterns, ignore_patterns):
        asked[name] = allow_patterns, ignore_patterns
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert locate("someone/model", ("*.json",)) == folder
    assert asked == {"someone/model": (["*.json"], ["*/*"])}
    assert_same(read_weights("someone/model")[1], initialize(TINY, seed=3))
    allowed, ignored = asked["someone/model"]
    files = ["config.json", "model-00001-of-00002.safetensors", "model.bin", "sequence_classifier/model.safetensors"]
    fetched = filter_repo_objects(files, allow_patterns=allowed, ignore_patterns=ignored)
    assert list(fetched) == files[:2]  # the hub's * goes through folders


def run_python(code: str, *arguments: str) -> str:
    """Standard output of a fresh Python; it fails with the error stream."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_weights_stream_into_the_shards_of_a_mesh(folder):
    out = run_python(
        """
        import sys, jax, numpy as np
        jax.config.update("jax_num_cpu_devices", 8)
        from lm_jax import parameters, weights
        from sharding.mesh import make_mesh
        mesh = make_mesh("fsdp=4,tensor=2")
        config, read = weights.read_weights(sys.argv[1], mesh=mesh)
        assert {k: v.sharding for k, v in read.items()} == parameters.shardings(config, mesh)
        assert read["gate"].addressable_shards[0].data.shape == (2, 4, 12)
        plain = weights.read_weights(sys.argv[1])[1]
        assert all((np.asarray(read[k]) == np.asarray(plain[k])).all() for k in plain)
        weights.write_weights(sys.argv[1] + "/again", config, read)
        print("same")
        """,
        str(folder),
    )
    assert out == "same\n"
    assert_same(read_weights(folder / "again")[1], initialize(TINY, seed=3))


def test_reading_holds_no_second_copy_in_host_memory(tmp_path):
    """Anonymous memory (the mapped file is not) grows by the parameters and at most two stacked parameters more."""
    config = DecoderConfig("llama", 1024, 512, 16, 8, 8, 64, 1024, tied_head=False)
    parameters = {name: np.zeros(row.shape, np.float32) for name, row in table(config).items()}
    write_weights(tmp_path, config, {name: jnp.asarray(array) for name, array in parameters.items()})
    total = sum(array.nbytes for array in parameters.values())
    largest = max(array.nbytes for array in parameters.values())
    out = run_python(
        """
        import sys, threading, re, jax
        from lm_jax.weights import read_weights
        jax.block_until_ready(jax.numpy.ones(3) + 1)

        def anonymous():
            return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

        start, peak, done = anonymous(), 0, threading.Event()

        def watch():
            global peak
            while not done.wait(0.0005):
                peak = max(peak, anonymous())

        thread = threading.Thread(target=watch)
        thread.start()
        parameters = jax.block_until_ready(read_weights(sys.argv[1])[1])
        done.set()
        thread.join()
        print(peak - start)
        """,
        str(tmp_path),
    )
    assert total > 100e6
    assert 0.9 * total < int(out) < total + 2 * largest + 10e6
