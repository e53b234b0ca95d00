"""What a compiled TPU program costs, read from the compiler's own text of it.

XLA's `cost_analysis` counts the body of a loop once, and a decoder is loops: layers, micro-batches, vocabulary chunks.
So the scheduled program is walked here, and what an instruction costs is counted as often as its loop turns.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64} | {
    f"{sign}{bits}": bits for sign in "su" for bits in (2, 4, 8, 16, 32, 64)
}
# These name, alias or wait for an array; they move nothing.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
UNESTIMATED = 2**63 - 1  # what the compiler writes where it has no estimate

_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between chips.

    Attributes:
        kind: of `COLLECTIVES`.
        shapes: "bf16[2,4096,5120]" of each array it leaves on a chip.
        bytes: of these arrays, each time.
        times: how often it runs in one step.
        group: how many chips take part.
        overlapped: it runs beside the instructions that follow it.
    """

    kind: str
    shapes: tuple[str, ...]
    bytes: int
    times: int
    group: int
    overlapped: bool


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A hand-written kernel, into which the compiler does not look.

    Attributes:
        flops, bytes: each time, as it says of itself; of one that says nothing, 0 and the bytes of its arrays.
        vmem: bytes of fast memory that it holds at most.
        times: how often it runs in one step.
    """

    name: str
    flops: float
    bytes: float
    vmem: int
    times: int


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one chip and one run: clock cycles by the compiler's estimate, bytes to and from memory, exchanges.

    What `kernels` move between memory and chip is in `bytes`, each array once; their time is not in `cycles`.
    """

    cycles: float
    bytes: float
    collectives: tuple[Collective, ...]
    kernels: tuple[Kernel, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    kind: str
    rest: str  # operands and attributes
    root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found and found[1]


def array_bytes(shape: str) -> int:
    """Bytes of an array or a tuple of arrays, as the compiler writes their shape."""
    return sum(
        math.prod(map(int, filter(None, sizes.split(",")))) * BITS.get(kind, 0) // 8
        for kind, sizes in _ARRAY.findall(shape)
    )


def read_costs(text: str) -> Costs:
    """Walk a scheduled HLO module.

    Raises:
        ValueError: the text is no HLO module, or a loop of it ends by no constant.
    """
    computations, entry = _parse(text)
    found: list[Collective] = []
    kernels: list[Kernel] = []
    totals = collections.Counter()

    def walk(name: str, times: int) -> None:
        shapes = {instruction.name: instruction for instruction in computations[name]}
        for instruction in computations[name]:
            if instruction.kind == "while":
                walk(instruction.attribute("body"), times * _turns(instruction, computations))
            elif instruction.kind in ("call", "conditional"):
                for called in re.findall(r"(?:to_apply|_computation|calls)=%?([\w.\-]+)", instruction.rest):
                    walk(called, times)
            inner = _nested(instruction.attribute("calls"), computations) if instruction.kind == "fusion" else ()
            for each in (instruction, *inner):
                if each.kind.removesuffix("-start") in COLLECTIVES:
                    found.append(_collective(each, times, instruction))
            moved = _moved(instruction, shapes, computations)
            totals["cycles"] += times * _cycles(instruction)
            totals["bytes"] += times * moved
            if 'custom_call_target="tpu_custom_call"' in instruction.rest:
                kernels.append(_kernel(instruction, moved, times))

    walk(entry, 1)
    return Costs(totals["cycles"], totals["bytes"], tuple(found), tuple(kernels))


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[1], [])
            if line.startswith("ENTRY"):
                entry = head[1]
        elif (found := _INSTRUCTION.match(line)) and computations:
            root, name, shape, kind, rest = found.groups()
            current.append(_Instruction(name, shape, kind, rest, bool(root)))
    if not entry:
        raise ValueError("no HLO module: it has no ENTRY computation")
    return computations, entry


def _turns(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int:
    """How often a loop turns at most: the constant that its condition compares its counter with (it starts at 0)."""
    condition = loop.attribute("condition")
    bounds = [
        int(found[1])
        for instruction in _nested(condition, computations)
        if instruction.kind == "constant"
        and (found := re.match(r"(\d+)\)", instruction.rest))
        and re.match(r"[su]32\[\]", instruction.shape)
    ]
    if not bounds:
        raise ValueError(f"the loop {loop.name} ends by no constant in its condition {condition}")
    return max(bounds)


def _nested(name: str, computations: dict[str, list[_Instruction]]) -> Iterator[_Instruction]:
    for instruction in computations[name]:
        yield instruction
        if called := instruction.attribute("calls"):
            yield from _nested(called, computations)


def _cycles(instruction: _Instruction) -> int:
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
    cycles = int(found[1]) if found else UNESTIMATED
    return 0 if cycles == UNESTIMATED else cycles


def _kernel(call: _Instruction, moved: int, times: int) -> Kernel:
    name = re.search(r"/(?:\w+\()*([^/\"()]*)\)*/pallas_call", call.rest)  # as in jvp(NAME), transpose(jvp(NAME))
    found = re.search(r'"cost_estimate":\{([^}]*)\}', call.rest)
    said = dict(re.findall(r'"(\w+)":"?(\d+)', found[1])) if found else {}
    vmem = re.search(r'"used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"', call.rest)
    return Kernel(
        name[1] if name else call.name,
        float(said.get("flops", 0)),
        float(said.get("bytes_accessed", moved)),
        int(vmem[1]) if vmem else 0,
        times,
    )


def _collective(instruction: _Instruction, times: int, outer: _Instruction) -> Collective:
    """`outer` is the fusion around the exchange, or itself: an all-reduce of which a fusion keeps a part scatters."""
    arrays = [f"{kind}[{sizes}]" for kind, sizes in _ARRAY.findall(instruction.shape) if kind in BITS]
    overlapped = instruction.kind.endswith("-start")
    if overlapped and instruction.shape.startswith("("):  # (operands, results, contexts)
        arrays = [array for array in arrays if array != "u32[]"]
        arrays = arrays[len(arrays) // 2 :]
    kind = instruction.kind.removesuffix("-start")
    if kind == "all-reduce" and array_bytes(outer.shape) < sum(map(array_bytes, arrays)):
        kind = "reduce-scatter"
    return Collective(
        kind, tuple(arrays), sum(map(array_bytes, arrays)), times, _group_size(instruction.rest), overlapped
    )


def _group_size(attributes: str) -> int:
    """How many chips exchange: the compiler writes the groups as a list, as [groups,size] or by axes of a mesh."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return 2  # a collective-permute sends from one to another


def _moved(
    instruction: _Instruction, here: dict[str, _Instruction], computations: dict[str, list[_Instruction]]
) -> int:
    """Bytes read and written; of an array that is only sliced or updated in place, the slice."""
    waits = instruction.kind.endswith(("-start", "-done", "-update"))
    if instruction.kind in FREE or waits or '"AllocateBuffer"' in instruction.rest:
        return 0
    body = computations.get(instruction.attribute("calls") or "", []) if instruction.kind == "fusion" else []
    parameters = {int(i.rest.split(")")[0]): i.name for i in body if i.kind == "parameter"}
    total = 0
    for number, operand in enumerate(instruction.operands):
        if operand not in here:
            continue
        users = [i for i in body if parameters.get(number) in i.operands]
        ways = {i.kind if i.operands[0] == parameters[number] else "" for i in users}  # "": not as what is sliced
        if users and ways <= {"slice", "dynamic-slice", "gather"}:
            total += sum(array_bytes(i.shape) for i in users)
        elif ways != {"dynamic-update-slice"}:
            total += array_bytes(here[operand].shape)
    root = next((i for i in body if i.root), instruction)
    if root.kind == "dynamic-update-slice":
        scope = {i.name: i for i in body} if body else here
        return total + array_bytes(scope[root.operands[1]].shape)
    return total + array_bytes(instruction.shape)
