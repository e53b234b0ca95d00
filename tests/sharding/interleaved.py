"""Rows dealt to two processes that hold them in turn, blocks 0, 2 and 1, 3; prints what came back as JSON."""

import json

import jax
import numpy as np

from sharding import distributed

distributed.start()

from sharding.mesh import AXES  # noqa: E402
from tests import quick_compiling  # noqa: E402, F401

first, second = jax.local_devices(process_index=0), jax.local_devices(process_index=1)
mesh = jax.sharding.Mesh(np.array([first[0], second[0], first[1], second[1]]).reshape(1, 4, 1), AXES)
index, count = distributed.share(mesh)
rows = np.arange(16.0, dtype=np.float32).reshape(8, 2)
size = 8 // count
mine = {"x": rows[index * size : (index + 1) * size]}
placed = distributed.place_batch(mine, mesh)
with jax.set_mesh(mesh):
    doubled = jax.jit(lambda batch: 2 * batch["x"])(placed)
    total = float(jax.jit(lambda batch: batch["x"].sum())(placed))
whole = distributed.fetch_rows(doubled, mesh)
print(json.dumps({"share": [index, count], "whole": whole.tolist(), "total": total}))
