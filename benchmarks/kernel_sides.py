"""What the benchmarks of kernels share: sides that must agree and take turns, and what the TPU compiler expects.

No TPU is at hand, so the Pallas kernel is not run: the TPU compiler estimates what surrounds it, and the kernel itself
is taken at the chip's peak for the FLOPs and bytes that it says it needs (`sharding.plan`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from sharding.chips import topology
from sharding.plan import compile_costs, compute_seconds

CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


def arguments(description: str) -> argparse.Namespace:
    """The command line: `--quick`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, few repetitions")
    return parser.parse_args()


def compare(
    sides: Mapping[str, Callable[..., Any]], arrays: Sequence[Any], *, repetitions: int, tolerance: float
) -> dict[str, float]:
    """Median seconds of each side; the sides take turns.

    Raises:
        AssertionError: a result of a side differs from the first side's by more than `tolerance` of its largest entry.
    """
    compiled = {name: jax.jit(side).lower(*arrays).compile() for name, side in sides.items()}
    results = {name: jax.tree.leaves(jax.tree.map(np.asarray, run(*arrays))) for name, run in compiled.items()}
    first = next(iter(results.values()))
    for name, found in results.items():
        for expected, ours in zip(first, found, strict=True):
            largest = max(1.0, float(np.abs(expected.astype(np.float32)).max()))
            np.testing.assert_allclose(
                ours.astype(np.float32), expected.astype(np.float32), atol=tolerance * largest, rtol=0, err_msg=name
            )
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, run in compiled.items():
            began = time.perf_counter()
            jax.block_until_ready(run(*arrays))
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in seconds.items()}


def estimates(kernel: Callable[..., Any], arrays: Sequence[Any]) -> dict[str, dict[str, float]]:
    """Of one chip of each generation: microseconds, MiB of fast memory (VMEM), and bytes moved over the least possible,
    which is all arrays and results once."""
    results = jax.eval_shape(kernel, *arrays)
    least = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((list(arrays), results)))
    found = {}
    for name in CHIPS:
        chip, devices = topology(name)
        place = SingleDeviceSharding(devices[0])
        abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in arrays]
        _, costs = compile_costs(jax.jit(kernel).lower(*abstract))
        found[name.partition(":")[0]] = {
            "microseconds": 1e6 * compute_seconds(costs, chip),
            "vmem_mib": max(each.vmem for each in costs.kernels) / 2**20,
            "bytes_over_least": costs.bytes / least,
        }
    return found


def report(name: str, cases: Mapping[str, tuple[dict[str, float], dict[str, dict[str, float]]]]) -> None:
    """A table, and one line of JSON last: seconds of each side, the ratio of the first to the last, and estimates."""
    found = {}
    for case, (seconds, estimated) in cases.items():
        naive, ours = next(iter(seconds)), list(seconds)[-1]
        ratio = seconds[naive] / seconds[ours]
        print(f"{case}: " + ", ".join(f"{side} {1e3 * each:.1f} ms" for side, each in seconds.items()), end="; ")
        print(f"ratio {ratio:.2f}")
        for chip, figures in estimated.items():
            print(
                f"  {chip}, compiler's estimate: {figures['microseconds']:.0f} us, {figures['vmem_mib']:.1f} MiB VMEM, "
                f"{figures['bytes_over_least']:.2f} times the least bytes"
            )
        found[case] = {"seconds": seconds, "ratio": ratio, "tpu_estimates": estimated}
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(json.dumps({"benchmark": name, "device": device, "cases": found}))
