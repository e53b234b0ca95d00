"""Many processes, one run: start-up, who writes, what each reads, and being told to stop.

With one process every function here is what it would be without it, so nothing above asks how many there are.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.rules import RULES

SILENCE = 60  # seconds without a sign of a process after which the others end
GRACE = 60  # seconds between SIGTERM and the end, whatever the run is doing
PREEMPTED = 75  # exit status of a run that a launcher should start again (EX_TEMPFAIL of sysexits.h)


def start(*, hears_sigterm: bool = False) -> None:
    """Join the other processes, if the environment says there are any; call it before anything else of jax.

    Either plain addresses, JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID; or
    AFRL_DISTRIBUTED=1, and jax finds out by itself (TPU pods, SLURM, Open MPI, Kubernetes).

    Args:
        hears_sigterm: jax takes SIGTERM over and passes it on, for a program that asks `stop.wanted` at every step. Any
            other program would only become deaf to it.

    Raises:
        ValueError: only some of the plain addresses are given.
    """
    jax.config.update("jax_enable_preemption_service", hears_sigterm)
    plain = {name: os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")}
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    given = [value for value in (address, *plain.values()) if value is not None]
    patience = {"heartbeat_timeout_seconds": SILENCE, "shutdown_timeout_seconds": SILENCE}
    if len(given) == 3:
        count, index = (int(value) for value in plain.values())
        jax.distributed.initialize(address, count, index, **patience)
    elif os.environ.get("AFRL_DISTRIBUTED") == "1":
        jax.distributed.initialize(**patience)
    elif given:
        raise ValueError(f"JAX_COORDINATOR_ADDRESS, {' and '.join(plain)} go together; {len(given)} of 3 are set")


def is_primary() -> bool:
    """Whether this process is the one that logs and writes small files."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def on_primary(name: str, write: Callable[[], Any]) -> None:
    """Run `write` in one process while the others wait."""
    if is_primary():
        write()
    barrier(name)


def fetch(tree: Any) -> Any:
    """Whole arrays, as NumPy, in every process, wherever their parts lie. All processes must call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(
        lambda x: jax.device_get(x) if x.is_fully_replicated else multihost_utils.process_allgather(x, tiled=True),
        tree,
    )


def concatenate(local: np.ndarray) -> np.ndarray:
    """What the processes have, one behind the other, in every process; the shapes must be the same."""
    if jax.process_count() == 1:
        return local
    return np.concatenate(multihost_utils.process_allgather(np.asarray(local)))


def batch_parts(mesh: Mesh | None) -> int:
    """Into how many parts the rows of a batch are split."""
    return 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in RULES["batch"]]))


def row_blocks(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """Which of a batch's `batch_parts` blocks of rows each process holds, by its number. They need not follow on each
    other: a slice's torus is cut across its hosts."""
    parts = batch_parts(mesh)
    found: dict[int, set[int]] = {}
    place = NamedSharding(mesh, PartitionSpec(RULES["batch"]))
    for device, (rows,) in place.devices_indices_map((parts,)).items():
        found.setdefault(device.process_index, set()).add(rows.start or 0)
    return {process: tuple(sorted(blocks)) for process, blocks in found.items()}


def pieces(mesh: Mesh) -> list[tuple[int, ...]]:
    """The equal pieces into which processes divide a batch, each the blocks of its rows; the same in all of them.

    Processes that a tensor axis joins have the same piece. Where processes hold unlike numbers of blocks, or share only
    some of them, there is one piece, all of it.
    """
    parts = batch_parts(mesh)
    distinct = sorted(set(row_blocks(mesh).values()))
    alike = len({len(blocks) for blocks in distinct}) == 1 and sum(map(len, distinct)) == parts
    return distinct if alike else [tuple(range(parts))]


def share(mesh: Mesh | None) -> tuple[int, int]:
    """(index, count): this process computes the index-th of `count` equal pieces of every batch's rows."""
    if mesh is None or jax.process_count() == 1:
        return 0, 1
    found = pieces(mesh)
    return (found.index(row_blocks(mesh)[jax.process_index()]) if len(found) > 1 else 0), len(found)


def place_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Split a batch (a tree of NumPy arrays, this process's piece of the rows) over the mesh; without one, as it is.

    A piece lies where its process holds rows, so the rows of the whole may be in another order: see `fetch_rows`.
    """
    if mesh is None:
        return batch
    place = NamedSharding(mesh, PartitionSpec(RULES["batch"]))
    if jax.process_count() == 1:
        return jax.device_put(batch, place)
    count = share(mesh)[1]

    def whole(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(place, x, (x.shape[0] * count, *x.shape[1:]))

    return jax.tree.map(whole, batch)


def fetch_rows(tree: Any, mesh: Mesh | None) -> Any:
    """`fetch` of arrays with a row for each of a batch that `place_batch` placed: one piece's rows behind another's."""
    found = fetch(tree)
    if mesh is None or jax.process_count() == 1:
        return found
    order = np.concatenate(pieces(mesh))
    return jax.tree.map(lambda x: x.reshape(len(order), -1, *x.shape[1:])[order].reshape(x.shape), found)


class Stop:
    """SIGTERM, as a pod sends it before it takes a machine away.

    The first one is remembered and asked for at every step, by `wanted`; `GRACE` seconds later, or at the second one,
    the process ends whatever it is doing. With several processes the word of one is passed on to all by jax, and they
    agree on the step. No timer of ours runs then: where no steps are made, between stages, or where a step and its save
    take longer than the machine is given, they go on until they are killed.
    """

    def __init__(self) -> None:
        self._told = threading.Event()
        self._asked = 0

    def listen(self, said: Callable[[], None]) -> None:
        """Take over SIGTERM; `said` is called when it comes."""
        if jax.process_count() > 1:
            return  # jax listens

        def hear(number: int, frame: FrameType | None) -> None:
            if self._told.is_set():
                os._exit(128 + number)
            self._told.set()
            said()
            timer = threading.Timer(GRACE, os._exit, (PREEMPTED,))
            timer.daemon = True
            timer.start()

        signal.signal(signal.SIGTERM, hear)

    def wanted(self) -> bool:
        """Whether to save and end. To be asked after every step: all processes get the same answer then."""
        if jax.process_count() > 1 and not self._told.is_set():
            self._asked += 1  # jax agrees on a number to come, so numbers may not begin anew with a stage
            if multihost_utils.reached_preemption_sync_point(self._asked):
                self._told.set()
        return self._told.is_set()


stop = Stop()
