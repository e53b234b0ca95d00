"""The plan as people read it: compile programs for a slice, with progress, and print a table and what to change.

A recipe says what its programs are (`afrl_jax.plan`), everything else is here.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import rich.console
import rich.table
from jax.sharding import Mesh

from lm_jax import run_log
from lm_jax.decoder import REMAT
from sharding.chips import topology
from sharding.mesh import make_mesh
from sharding.plan import Figures, Program, measure, meshes

Programs = Callable[[Mesh], Sequence[Program]]
GIGABYTE = 2**30
WIDTH = 190  # of the table, in characters, where no terminal has one


def show_plan(programs: Programs, slice_name: str, mesh_shape: str, remat: str, file: Path | None = None) -> bool:
    """Compile all programs for a slice such as "v5p:4x4x4" and print what each needs; True where all fit.

    Args:
        programs: the programs on a mesh.
        mesh_shape: as in `make_mesh`; "auto" tries meshes and remat policies on the first training step first.
        file: where the figures are written as JSON, if anywhere.

    Raises:
        ValueError: the slice, the mesh or a model of the config cannot be.
    """
    chip, devices = topology(slice_name)
    if mesh_shape == "auto":
        mesh_shape, remat = _choose(programs, slice_name, remat)
    mesh = make_mesh(mesh_shape, devices)
    run_log.say(f"{slice_name}, {len(devices)} chips, mesh {mesh_shape or f'fsdp={len(devices)}'}, remat {remat}")
    found: list[Figures] = []
    known: dict[str, Figures] = {}  # stages that share a program share its figures
    for number, program in enumerate(wanted := programs(mesh), start=1):
        began = time.monotonic()
        found.append(measure(program, chip, mesh, remat, known))
        seconds = time.monotonic() - began
        run_log.say(f"[{number}/{len(wanted)}] {program.name}: compiled in {seconds:.0f} s, {verdict(found[-1])}")
    console = run_log.console if run_log.console.is_terminal else rich.console.Console(stderr=True, width=WIDTH)
    console.print(_table(found))
    for figures in found:
        for line in advice(figures):
            run_log.say(f"{figures.name}: {line}")
    if file:
        file.write_text(json.dumps([dataclasses.asdict(figures) for figures in found], indent=1) + "\n")
    return all(figures.fits for figures in found)


def _choose(programs: Programs, slice_name: str, remat: str) -> tuple[str, str]:
    """The mesh and remat policy with which the first program that trains is fastest, of those that fit."""
    chip, devices = topology(slice_name)
    ranking: list[tuple[Figures, str, str]] = []
    for shape in meshes(len(devices), largest_tensor=8):
        try:
            mesh = make_mesh(shape, devices)
        except ValueError as error:  # the slice cannot be cut so
            run_log.say(str(error))
            continue
        # A rollout holds the optimizer too, but beside it: only an update is given it.
        trains = (each for each in programs(mesh) if "optimizer" in each.held and "optimizer" not in each.resident)
        if (program := next(trains, None)) is None:
            raise ValueError("--mesh=auto looks at the first step that trains, and this config has none")
        for policy in REMAT:
            try:
                figures = measure(program, chip, mesh, policy)
            except ValueError as error:  # a batch or a head that this mesh does not divide
                run_log.say(f"{shape}, remat {policy}: {error}")
                continue
            ranking.append((figures, shape, policy))
            run_log.say(f"{shape}, remat {policy}: {verdict(figures)}")
    ranking = sorted(ranking, key=lambda entry: (not entry[0].fits, entry[0].seconds, entry[0].peak_bytes))
    if not ranking:
        raise ValueError(f"no mesh of {slice_name} divides what the first step that trains needs divided")
    run_log.say(f"\n{ranking[0][0].name}, fastest first:")
    for place, (figures, shape, policy) in enumerate(ranking, start=1):
        run_log.say(f"{place:3}. mesh {shape}, remat {policy}: {verdict(figures)}")
    return ranking[0][1:]


def verdict(figures: Figures) -> str:
    """One line: fits or not, and how fast."""
    share = f"{figures.peak_bytes / GIGABYTE:.1f} of {figures.available_bytes / GIGABYTE:.1f} GiB"
    if not figures.fits:
        return f"does not fit, {share}"
    return f"fits, {share}; {figures.seconds:.3g} s a step, MFU {figures.mfu:.0%}"


def advice(figures: Figures) -> list[str]:
    """What to change where a program does not fit, or nearly."""
    if figures.fits and figures.peak_bytes < 0.9 * figures.available_bytes:
        return []
    held = dict(figures.held)
    fixed = sum(held.get(name, 0.0) for name in ("weights", "optimizer", "reference", "master"))
    lines = []
    if fixed > 0.6 * figures.available_bytes:
        lines.append(
            f"weights and optimizer alone take {fixed / GIGABYTE:.1f} GiB a chip: more chips, "
            "optimizer_dtype=bfloat16 or lora"
        )
    if held.get("cache", 0.0) > 0.2 * figures.available_bytes:
        lines.append("fewer rollouts.prompts at once, or a larger tensor axis: the cache is split over both")
    if figures.peak_bytes - sum(held.values()) > 0.3 * figures.available_bytes:
        lines.append('activations: remat="full", more micro_batches, fewer row_tokens, or a larger tensor axis')
    return lines or ["a little too large: more micro_batches, or one chip more"]


def _table(found: Sequence[Figures]) -> rich.table.Table:
    table = rich.table.Table("step", title="a chip, by the compiler's figures")
    memory = ("weights", "optimizer", "cache", "other", "peak")
    for column in (*memory, "TFLOP", "GB moved", "exchanged", "s", "MFU", "a second"):
        table.add_column(column, justify="right")
    for figures in found:
        held = dict(figures.held)
        weights = sum(held.pop(name, 0.0) for name in ("weights", "reference", "master"))
        optimizer, cache = held.pop("optimizer", 0.0), held.pop("cache", 0.0)
        other = figures.peak_bytes - weights - optimizer - cache
        exchanged = "\n".join(
            f"{kind} {times}x {total / 1e9:.1f} GB" for kind, (times, total) in sorted(figures.collectives.items())
        )
        share = figures.peak_bytes / figures.available_bytes
        table.add_row(
            figures.name,
            *(f"{size / GIGABYTE:.1f}" for size in (weights, optimizer, cache, other)),
            f"{figures.peak_bytes / GIGABYTE:.1f} ({share:.0%})" + ("" if figures.fits else " TOO LARGE"),
            f"{figures.flops / 1e12:.0f}", f"{figures.bytes / 1e9:.0f}", exchanged,
            f"{figures.compute_seconds:.2f} + {figures.seconds - figures.compute_seconds:.2f}",
            f"{figures.mfu:.0%}", f"{figures.per_second:,.0f} {figures.unit}",
            end_section=True,
        )  # fmt: skip
    table.caption = "GiB; other: activations and program; s: computing + waiting for exchanges"
    return table
