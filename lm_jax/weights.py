"""Read weights from Hugging Face safetensors or GGUF into sharded arrays; write a Hugging Face folder."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding

from lm_jax.config import DecoderConfig, from_hugging_face, to_hugging_face
from lm_jax.gguf_file import GGUFFile
from lm_jax.parameters import Parameter, Parameters, shardings, table
from lm_jax.source import locate

INDEX = "model.safetensors.index.json"
PATTERNS = ("config.json", "generation_config.json", INDEX, "*.safetensors", "tokenizer*.json")
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class SafetensorsFolder(Mapping[str, np.ndarray]):
    """The tensors of a folder's safetensors files, as views into memory-mapped files: nothing is read before use."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        index = folder / INDEX
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = ["model.safetensors"]
        self._entries: dict[str, tuple[mmap.mmap, type, tuple[int, ...], int]] = {}
        for path in (folder / name for name in names):
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing")
            try:
                with path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                size = int.from_bytes(mapped[:8], "little")  # layout: github.com/huggingface/safetensors#format
                header = json.loads(mapped[8 : 8 + size])
            except ValueError as error:  # an empty file, a header cut short, a pointer of git-lfs
                raise ValueError(f"{path} is no safetensors file, or was cut short: {error}") from error
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                if entry["dtype"] not in DTYPES:
                    raise ValueError(f"{path}: {name} has dtype {entry['dtype']}; known are {', '.join(DTYPES)}")
                start, end = entry["data_offsets"]
                if 8 + size + end > len(mapped):
                    raise ValueError(f"{path}: {name} ends after the end of the file, which is cut short")
                self._entries[name] = mapped, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + size + start
        self.shapes = {name: entry[2] for name, entry in self._entries.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        mapped, dtype, shape, offset = self._entries[name]
        return np.frombuffer(mapped, dtype, count=math.prod(shape), offset=offset).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def read_weights(
    source: str | Path, *, mesh: Mesh | None = None, dtype: Any = jnp.float32
) -> tuple[DecoderConfig, Parameters]:
    """Read a pretrained decoder.

    Tensors go straight into device arrays of the mesh: a process reads the slices its devices hold, and host memory
    holds those of one (stacked) parameter at a time.

    Args:
        source: a folder in Hugging Face layout, a hub id, or a .gguf file.
        mesh: where the parameters live (`parameters.shardings`); by default the first device.
        dtype: of all parameters.

    Raises:
        ValueError: an unknown architecture, or tensors that are missing, unexpected or of a wrong shape, by name.
        FileNotFoundError, ConnectionError: see `source.locate`.
    """
    path = locate(source, PATTERNS)
    if path.is_file():
        tensors: SafetensorsFolder | GGUFFile = GGUFFile(path)
        config = tensors.config
    else:
        config = read_config(path)
        tensors = SafetensorsFolder(path)
    _check(config, tensors.shapes, path)
    single = SingleDeviceSharding(jax.local_devices()[0])
    places = shardings(config, mesh) if mesh is not None else dict.fromkeys(table(config), single)
    return config, {name: _read(row, tensors, places[name], dtype) for name, row in table(config).items()}


def read_source_config(source: str | Path) -> DecoderConfig:
    """The shape of what `read_weights` would read, without reading it."""
    path = locate(source, ("config.json",))
    return GGUFFile(path).config if path.is_file() else read_config(path)


def read_config(folder: Path) -> DecoderConfig:
    """The shape that a folder's config.json describes, errors naming the folder."""
    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing")
    try:
        return from_hugging_face(json.loads(file.read_text()))
    except KeyError as error:
        raise ValueError(f"{file}: the key {error} is missing") from error
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _read(row: Parameter, tensors: Mapping[str, np.ndarray], place: jax.sharding.Sharding, dtype: Any) -> jax.Array:
    def shard(index: tuple[slice, ...]) -> np.ndarray:
        layers = range(row.shape[0])[index[0]] if row.stacked else [0]
        inner = index[1:] if row.stacked else index
        inner_shape = (len(range(size)[part]) for size, part in zip(row.layer_shape, inner, strict=True))
        block = np.empty((len(layers), *inner_shape), dtype)
        for position, layer in enumerate(layers):
            block[position] = row.from_hugging_face(tensors[row.hugging_face.format(layer=layer)])[inner]
        return block if row.stacked else block[0]

    # Transfers are asynchronous: without waiting, the host blocks of several parameters would be alive.
    return jax.make_array_from_callback(row.shape, place, shard).block_until_ready()


def _check(config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Compare the tensors that were found with the parameter table."""
    expected = {
        row.hugging_face.format(layer=layer): row.hugging_face_shape
        for row in table(config).values()
        for layer in range(config.layers if row.stacked else 1)
    }
    # A rotary buffer holds no weights; a head beside tied embeddings is their copy.
    harmless = {name for name in shapes if name.endswith(".rotary_emb.inv_freq")}
    harmless |= {"lm_head.weight"} if config.tied_head else set()
    problems = {
        "missing tensors": [name for name in expected if name not in shapes],
        "unexpected tensors": [name for name in shapes if name not in expected and name not in harmless],
        "wrong shapes": [
            f"{name} is {shapes[name]}, expected {shape}"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ],
    }
    told = [
        f"{problem}: {'; '.join(found[:4])}" + (f" and {len(found) - 4} more" if len(found) > 4 else "")
        for problem, found in problems.items()
        if found
    ]
    if told:
        raise ValueError(f"{path} does not fit its {config.family} configuration. {'. '.join(told)}")


def hugging_face_tensors(
    config: DecoderConfig, parameters: Parameters, *, dtype: Any = jnp.float32
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor in Hugging Face's name and layout, in the order of the network, one at a time.

    Every process of a mesh must run through it: an array that lies on several hosts is gathered.
    """
    rows = table(config)

    def tensor(name: str, layer: int) -> tuple[str, np.ndarray]:
        row = rows[name]
        array = parameters[name][layer] if row.stacked else parameters[name]
        array = array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True)
        array = np.asarray(array).astype(dtype)
        return row.hugging_face.format(layer=layer), row.to_hugging_face(array)

    yield tensor("embed", 0)
    for layer in range(config.layers):
        yield from (tensor(name, layer) for name, row in rows.items() if row.stacked)
    yield from (tensor(name, 0) for name in ("final_norm", "head") if name in rows)


def write_safetensors(folder: str | Path, tensors: Iterable[tuple[str, np.ndarray]], *, shard_bytes: int) -> None:
    """Write tensors to `model.safetensors`, or to numbered shards of at most `shard_bytes` and their index.

    One shard at a time is in host memory. Weights of an earlier export in the folder are replaced.
    """
    folder = Path(folder)
    writes = jax.process_index() == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        for old in (*folder.glob("model*.safetensors"), folder / INDEX):
            old.unlink(missing_ok=True)
    shards: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        if writes:
            part = folder / f"model.part-{len(shards)}"
            safetensors.numpy.save_file(shard, part, metadata={"format": "pt"})
            part.chmod(0o644)  # the library makes files that only their owner may read
        shards.append(list(shard))
        shard.clear()

    for name, array in tensors:
        if shard and array.nbytes + sum(other.nbytes for other in shard.values()) > shard_bytes:
            flush()
        shard[name] = np.ascontiguousarray(array)
        total += array.nbytes
    flush()
    if not writes:
        return
    if len(shards) == 1:
        (folder / "model.part-0").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"model.part-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_weights(
    folder: str | Path,
    config: DecoderConfig,
    parameters: Parameters,
    *,
    dtype: Any = jnp.float32,
    shard_bytes: int = 5 * 10**9,
    bos: int | None = None,
    eos: int | None = None,
    pad: int | None = None,
    max_new_tokens: int | None = None,
) -> None:
    """Write config.json, generation_config.json and the weights, as transformers' ...ForCausalLM reads them.

    Args:
        dtype: of the stored tensors, float32, float16 or bfloat16.
        shard_bytes: largest size of a safetensors file (a single larger tensor still gets a file of its own).
        bos, eos, pad: the tokenizer's ids, None where it has none.
        max_new_tokens: what generate() stops at unless told otherwise, in transformers 20.
    """
    folder = Path(folder)
    write_safetensors(folder, hugging_face_tensors(config, parameters, dtype=dtype), shard_bytes=shard_bytes)
    if jax.process_index() == 0:
        settings = to_hugging_face(config, bos=bos, eos=eos, pad=pad)
        _write_json(folder / "config.json", {**settings, "torch_dtype": jnp.dtype(dtype).name})
        told = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad, "max_new_tokens": max_new_tokens}
        _write_json(folder / "generation_config.json", {key: value for key, value in told.items() if value is not None})


def weights_digest(folder: Path) -> str:
    """SHA-256 of a model folder's safetensors files, in the order of their names, as hex digits."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
