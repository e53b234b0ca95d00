"""The plan's golden file: what the TPU compiler says of every stage's step, for three teachers and three slices.

    python -m benchmarks.plan_figures                          compile all that the file has, and compare
    python -m benchmarks.plan_figures --write                  compile what the file lacks, and add it
    python -m benchmarks.plan_figures --only="0.6B v5e:4x4"    of either, the entries whose name has these words
    python -m benchmarks.plan_figures --quick                  compare the student's programs on v5e:4x4 alone

The recipe is configs/afrl_qwen3_32b_to_0_6b.py with another teacher; no chip is needed, nothing runs. Figures keep
three digits. The exit status is 1 where one differs from tests/golden/plan.json: then either the step has changed,
which the difference should explain, or the compiler has. To accept it, delete the entry from the file and --write it
again. A teacher on a slice takes two to twenty minutes on one core. Prints one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from afrl_jax.plan import programs
from afrl_jax.settings import read_settings
from lm_jax.config_file import read_config
from sharding.chips import topology
from sharding.mesh import make_mesh
from sharding.plan import Figures, Program, measure

REPOSITORY = Path(__file__).resolve().parents[1]
GOLDEN = REPOSITORY / "tests/golden/plan.json"
TEACHERS = ("0.6B", "8B", "32B")
# Axes of a mesh are whole axes of the slice's torus, or products of them.
MESHES = {"v5e:4x4": "fsdp=16", "v5p:4x4x4": "fsdp=16,tensor=4", "v6e:16x16": "fsdp=16,tensor=16"}
STUDENT = ("distill", "scoring")  # the same whatever the teacher
Wanted = Callable[[str, str], bool]  # (entry, program)


def entries(teacher: str, slice_name: str, wanted: Wanted) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, figures) of the programs of the recipe with this teacher, on one slice."""
    config = read_config(
        REPOSITORY / "configs/afrl_qwen3_32b_to_0_6b.py", [f"--config.teacher.source=Qwen/Qwen3-{teacher}"]
    )
    chip, devices = topology(slice_name)
    mesh = make_mesh(MESHES[slice_name], devices)
    known: dict[str, Figures] = {}  # stages that share a program share its figures
    for program in programs(read_settings(config), mesh):
        entry = name_of(teacher, slice_name, program)
        if wanted(entry, program.name):
            yield entry, rounded(measure(program, chip, mesh, "full", known))


def name_of(teacher: str, slice_name: str, program: Program) -> str:
    """The student's programs bear no teacher's name."""
    return f"{'student' if program.name in STUDENT else teacher} {slice_name} {program.name}"


def rounded(figures: Figures) -> dict[str, Any]:
    """The figures of a chip as they are kept: GiB, TFLOP, GB and seconds, to three digits."""
    kept: dict[str, Any] = {"fits": figures.fits, "GiB": figures.peak_bytes / 2**30}
    kept |= {f"GiB of {name}": size / 2**30 for name, size in figures.held.items()}
    if figures.fits:
        kept |= {"TFLOP": figures.flops / 1e12, "GB moved": figures.bytes / 1e9}
        kept |= {f"GB by {kind}": total / 1e9 for kind, (_, total) in sorted(figures.collectives.items())}
        kept |= {"s computing": figures.compute_seconds, "s exchanging": figures.collective_seconds}
        kept |= {"s": figures.seconds, "MFU": figures.mfu, f"{figures.unit} a second": figures.per_second}
    return {name: value if isinstance(value, bool) else float(f"{value:.3g}") for name, value in kept.items()}


def differences(found: Mapping[str, Any], golden: Mapping[str, Any]) -> list[str]:
    """A line for each figure that is not the golden one."""
    return [
        f"{name}: {golden.get(name)} then, {found.get(name)} now"
        for name in dict.fromkeys([*golden, *found])
        if golden.get(name) != found.get(name)
    ]


def memory_gigabytes() -> float:
    """The most that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """See the head of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", default="", metavar="WORDS")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    words = ["student", "v5e:4x4"] if arguments.quick else arguments.only.split()
    done: dict[str, list[str]] = {}

    def wanted(entry: str, program: str) -> bool:
        chosen = all(word in entry for word in words) and entry not in done
        return chosen and (entry in golden) != arguments.write

    began = time.monotonic()
    for slice_name in (each for each in MESHES if not any(":" in word and word != each for word in words)):
        for teacher in TEACHERS:
            for entry, figures in entries(teacher, slice_name, wanted):
                done[entry] = [] if arguments.write else differences(figures, golden[entry])
                taken = f"{time.monotonic() - began:.0f} s, {memory_gigabytes():.1f} GB"
                print(f"[{taken}] {entry}: {figures}", *done[entry], sep="\n  ", flush=True)
                if arguments.write:
                    golden[entry] = figures
                    GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    different = [entry for entry, lines in done.items() if lines]
    print(json.dumps({"benchmark": "plan_figures", "compiled": len(done), "different": different}))
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
