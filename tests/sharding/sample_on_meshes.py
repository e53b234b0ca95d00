"""Answers drawn on one device and on meshes of eight CPU devices, as JSON."""

import json

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # half of the time is compiling

import numpy as np  # noqa: E402

from lm_jax.config import DecoderConfig  # noqa: E402
from lm_jax.parameters import initialize, shardings  # noqa: E402
from lm_jax.sample import sample  # noqa: E402
from sharding.distributed import place_batch  # noqa: E402
from sharding.mesh import make_mesh  # noqa: E402
from tests import quick_compiling  # noqa: E402, F401

CONFIG = DecoderConfig("qwen3", 96, 32, 1, 4, 2, 8, 64, qk_norm=True, tied_head=False)
MESHES = ("fsdp=8", "data=2,fsdp=2,tensor=2")


def draw(parameters, mesh, temperature: float):
    random = np.random.default_rng(0)
    lengths = random.integers(1, 9, 8).astype(np.int32)
    tokens = (random.integers(2, 96, (8, 8)) * (np.arange(8) < lengths[:, None])).astype(np.int32)
    inputs = place_batch((tokens, lengths, np.arange(8, dtype=np.uint32)), mesh)
    fixed = {"config": CONFIG, "group": 4, "max_new_tokens": 6, "eos": 1}
    return jax.device_get(sample(parameters, *inputs, jax.random.key(3), **fixed, temperature=temperature))


def main():
    # Large weights, so that answers are far from uniform.
    start = {name: 10 * x if x.ndim > 1 else x for name, x in initialize(CONFIG, 0).items()}
    alone = {temperature: draw(start, None, temperature) for temperature in (0.7, 0.0)}
    found = {"distinct": len({tuple(answer) for answer in alone[0.7].tokens.reshape(32, -1).tolist()})}
    for shape in MESHES:
        mesh = make_mesh(shape)
        with jax.set_mesh(mesh):
            drawn = {t: draw(jax.device_put(start, shardings(CONFIG, mesh)), mesh, t) for t in alone}
        found[shape] = {
            "other tokens": int(sum((drawn[t].tokens != alone[t].tokens).sum() for t in alone)),
            "largest difference": float(max(np.abs(drawn[t].logprobs - alone[t].logprobs).max() for t in alone)),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
