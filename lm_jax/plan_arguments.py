"""`--compile_for` of a program: the plan of a config for a TPU slice instead of a run."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """--compile_for, --mesh and --plan_file."""
    parser.add_argument("--compile_for", metavar="SLICE", help="plan for a TPU slice, such as v5p:4x4x4, instead")
    parser.add_argument("--mesh", metavar="MESH", help="of the plan: auto, or as the config's `mesh`")
    parser.add_argument("--plan_file", type=Path, metavar="FILE", help="where the plan's figures go as JSON")


def check_plan_arguments(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
    """End the program where they do not go together. Call it before JAX is imported."""
    if parsed.compile_for:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: the slice is only described
    if not parsed.workdir and not parsed.compile_for:
        parser.error("the following arguments are required: --workdir")
    if not parsed.compile_for and (parsed.mesh or parsed.plan_file):
        parser.error("--mesh and --plan_file belong to --compile_for; a run's mesh is --config.mesh=...")


def end_with_plan(
    parser: argparse.ArgumentParser,
    parsed: argparse.Namespace,
    config: Mapping[str, Any],
    read_settings: Callable[[Mapping[str, Any]], Any],
    programs: Callable[[Any, Any], Sequence[Any]],
) -> None:
    """Show the plan, then end the program: 0 where all fits, 1 where it does not, 2 where there can be no plan.

    Args:
        read_settings: the config's settings, which have `kernels`, `mesh` and `remat`.
        programs: (settings, mesh) -> the programs of a run.
    """
    from lm_jax.plan_table import show_plan
    from lm_jax.program import use_kernels

    try:
        settings = read_settings(config)
        use_kernels(settings.kernels)
        mesh = settings.mesh if parsed.mesh is None else parsed.mesh
        made = functools.partial(programs, settings)
        fits = show_plan(made, parsed.compile_for, mesh, settings.remat, parsed.plan_file)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    parser.exit(0 if fits else 1)
