"""Checkpoints: a train state every so often, written by orbax, complete or absent.

Orbax writes into a temporary folder and renames it when all is on disk, so a checkpoint cut short by a kill is never
seen.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

logging.getLogger("absl").setLevel(logging.WARNING)  # orbax tells every file it writes


class Checkpoints:
    """The newest train states of one stage, in `folder`/<step>.

    Attributes:
        cut_short: names of what a kill left half-written; it was never a checkpoint, and is removed.
    """

    def __init__(self, folder: Path, keep: int = 1):
        self.cut_short = sorted(path.name for path in folder.glob("*.orbax-checkpoint-tmp*"))
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, None where there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any) -> None:
        """Write `state` in the background; waits for the write before."""
        self._checkpointer.wait()
        self._checkpointer.save_async(step, state)

    def restore(self, step: int, like: Any) -> Any:
        """The state at `step`, with the shapes and shardings of `like` (arrays or ShapeDtypeStructs)."""
        return self._checkpointer.load(step, jax.tree.map(abstract_array, like))

    def close(self) -> None:
        """Wait for writes and let go of the folder."""
        self._checkpointer.close()


def save_tree(folder: Path, tree: Any) -> None:
    """Write one tree of arrays as `folder`, which appears only when complete."""
    ocp.save(folder.absolute(), tree, overwrite=True)


def load_tree(folder: Path, like: Any) -> Any:
    """Read what `save_tree` wrote, with the shapes and shardings of `like`."""
    return ocp.load(folder.absolute(), jax.tree.map(abstract_array, like))


def abstract_array(x: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and place of `x`; without one on a mesh, all of the mesh, or else the first device.

    Never the place where it lay when it was written: that may have been another mesh.
    """
    place = getattr(x, "sharding", None)
    if not isinstance(place, NamedSharding) and not (mesh := jax.sharding.get_mesh()).empty:
        place = NamedSharding(mesh, PartitionSpec())
    place = place or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
