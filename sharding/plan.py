"""The plan: compile jitted steps for a TPU slice that is not there, and say what they would need and take.

A `Program` is one jitted step with abstract arguments. `measure` compiles it for the devices of a mesh and reads the
compiler's figures. What a chip computes is timed by the compiler's own cycle estimates, and hand-written kernels, into
which it does not look, by what they say of themselves at the chip's peak. Exchanges between chips have no estimate, so
they are timed as rings over one axis of the torus: (g - 1) / g of the bytes of an all-gather, twice that of an
all-reduce. Those that nothing runs beside are added to the computation; of the others, what is longer counts.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.extend import core
from jax.sharding import Mesh, NamedSharding

from kernels import implementation
from sharding.chips import Chip
from sharding.compiled import Collective, Costs, read_costs

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted step of a stage.

    Attributes:
        trace: remat policy -> the step traced for the mesh that is set (`jitted.trace(...)` of abstract arguments).
        held: what a chip holds of what, by name ("weights", "optimizer", "cache"): trees of abstract arrays.
        work, unit: how much one run does: 4096 "tokens", 64 "pairs".
        resident: the names in `held` that are no arguments of the step but stay in memory beside it.
        turns: how often its `while` loops turn at most; scans say it themselves.
        model_flops: what of its matrix products is the model's, on all chips; None where nothing is computed twice,
            whatever the remat policy.
    """

    name: str
    trace: Callable[[str], Any]
    held: Mapping[str, Any]
    work: float
    unit: str
    resident: tuple[str, ...] = ()
    turns: int = 1
    model_flops: float | None = None


@dataclasses.dataclass(frozen=True)
class Figures:
    """What one run of a program needs of one chip, and takes. Bytes, seconds, FLOPs; `held` is bytes by name.

    Without a fit, only what fitting needs is known. `mfu` is model FLOPs (matrix products, nothing computed twice) over
    what the chips could have done in `seconds`.
    """

    name: str
    fits: bool
    peak_bytes: float
    available_bytes: float
    held: Mapping[str, float]
    flops: float = 0.0
    bytes: float = 0.0
    collectives: Mapping[str, tuple[int, float]] = dataclasses.field(default_factory=dict)  # times, bytes
    compute_seconds: float = 0.0
    collective_seconds: float = 0.0
    seconds: float = 0.0
    mfu: float = 0.0
    per_second: float = 0.0
    unit: str = ""


def measure(program: Program, chip: Chip, mesh: Mesh, remat: str, known: dict[str, Figures] | None = None) -> Figures:
    """Compile a program for a mesh of described devices and read what the compiler says of it.

    `known` holds the figures of programs by their text, so that one that occurs twice is compiled once.
    """
    with jax.set_mesh(mesh):
        with implementation.setting("xla"):  # what a kernel computes is not seen in what is traced
            flops = matrix_flops(program.trace(remat).jaxpr.jaxpr, program.turns)
            model_flops = program.model_flops or matrix_flops(program.trace("none").jaxpr.jaxpr, program.turns)
        traced = program.trace(remat)
        held = {name: sum(map(chip_bytes, jax.tree.leaves(tree))) for name, tree in program.held.items()}
        resident = sum(held[name] for name in program.resident)
        lowered = traced.lower()
        beside = f"{held} {resident} {program.work} {program.unit}"  # of which the program itself says nothing
        text = f"{lowered.as_text()} {beside}" if known is not None else ""
        if known and text in known:
            return dataclasses.replace(known[text], name=program.name)
        try:
            memory, costs = compile_costs(lowered)
        except jax.errors.JaxRuntimeError as error:
            return Figures(program.name, False, _needed(error) + resident, chip.memory, held)
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
        + resident
    )
    compute = compute_seconds(costs, chip)
    alone, beside = (
        sum(ring_bytes(c) * c.times for c in costs.collectives if c.overlapped == overlapped) / chip.link
        for overlapped in (False, True)
    )
    seconds = max(compute + alone, alone + beside)
    counted: dict[str, tuple[int, float]] = {}
    for exchange in costs.collectives:
        times, total = counted.get(exchange.kind, (0, 0.0))
        counted[exchange.kind] = (times + exchange.times, total + exchange.times * exchange.bytes)
    found = Figures(
        program.name, peak <= chip.memory, peak, chip.memory, held,
        flops=flops / mesh.size, bytes=costs.bytes, collectives=counted,
        compute_seconds=compute, collective_seconds=alone + beside, seconds=seconds,
        mfu=model_flops / (mesh.size * chip.peak * seconds), per_second=program.work / seconds, unit=program.unit,
    )  # fmt: skip
    if known is not None:
        known[text] = found
    return found


def collectives(lowered: jax.stages.Lowered) -> tuple[Collective, ...]:
    """Every exchange between chips in the compiled program."""
    return compile_costs(lowered)[1].collectives


def compute_seconds(costs: Costs, chip: Chip) -> float:
    """What a chip computes: the compiler's cycles, and of its kernels FLOPs or bytes, whichever take longer."""
    kernels = sum(max(each.flops / chip.peak, each.bytes / chip.bandwidth) * each.times for each in costs.kernels)
    return costs.cycles / chip.clock + kernels


def compile_costs(lowered: jax.stages.Lowered) -> tuple[Any, Costs]:
    """Compile for a TPU: the compiler's memory analysis, and what the program costs."""
    # The executable cannot print every program it holds, so the text is the one the compiler writes on its way.
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        texts = sorted(Path(folder).glob("*after_codegen.txt"), key=lambda file: file.stat().st_size)
        return compiled.memory_analysis(), read_costs(texts[-1].read_text())


def _needed(error: Exception) -> float:
    """Bytes that a program would have needed, of the compiler's message; anything else is raised again."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of|temporaries \(([\d.]+)([KMGT]?)\)", str(error))
    if not found:
        raise error
    number, unit = (group for group in found.groups() if group is not None)
    return float(number) * _UNITS[unit]


def ring_bytes(exchange: Collective) -> float:
    """Bytes that pass a chip when its group forms a ring."""
    share = (exchange.group - 1) / exchange.group
    return exchange.bytes * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(exchange.kind, share)


def chip_bytes(x: Any) -> float:
    """Bytes of an abstract array that one chip holds."""
    shape = x.sharding.shard_shape(x.shape) if isinstance(x.sharding, NamedSharding) else x.shape
    return math.prod(shape) * x.dtype.itemsize


def matrix_flops(jaxpr: core.Jaxpr, turns: int = 1) -> float:
    """FLOPs of the matrix products in a traced function, on all chips together; a `while` turns `turns` times."""
    total = 0.0
    for equation in jaxpr.eqns:
        parameters = equation.params
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
            continue
        times = {"scan": parameters.get("length"), "while": turns}.get(equation.primitive.name, 1)
        if equation.primitive.name == "shard_map":
            times = math.prod(parameters["mesh"].shape[axis] for axis in parameters["newly_manual_axes"])
        inner = [getattr(each, "jaxpr", each) for value in parameters.values() for each in _jaxprs(value)]
        costs = [matrix_flops(each, turns) for each in inner]
        total += times * (max(costs, default=0.0) if equation.primitive.name == "cond" else sum(costs))
    return total


def _jaxprs(value: Any) -> Iterable[Any]:
    values = value if isinstance(value, tuple | list) else (value,)
    return [each for each in values if isinstance(each, core.Jaxpr | core.ClosedJaxpr)]


def meshes(devices: int, largest_tensor: int) -> list[str]:
    """The factorizations worth a try: all of data 1, tensor a power of two up to `largest_tensor`."""
    sizes = [2**power for power in range(largest_tensor.bit_length()) if devices % 2**power == 0]
    return [f"fsdp={devices // tensor},tensor={tensor}" for tensor in sizes]
