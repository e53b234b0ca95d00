"""Kernels by each implementation on this machine, Pallas interpreted, and compiled for TPUs that are not here."""

import contextlib
import importlib.util
import io

import hypothesis
import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from kernels import implementation, tpu_memory
from sharding.chips import topology
from sharding.mesh import make_mesh
from sharding.plan import compile_costs

# An example is a shape to compile, so there are few of them, the same in every run.
hypothesis.settings.register_profile("shapes", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("shapes")


@pytest.fixture(scope="session")
def interpreted():
    """A function: what `function(*arrays)` returns with its Pallas kernels interpreted as TPU programs.

    Memory nobody wrote is NaN, a read outside an array raises, and so does one access that races with another. `cores`
    share the axes of a grid that are declared parallel.
    """

    def run(function, *arrays, cores=1):
        said = io.StringIO()
        jax.config.update("jax_disable_most_optimizations", True)  # each program runs once: compiling is the time
        with (
            pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores)),
            contextlib.redirect_stdout(said),
        ):
            try:
                found = jax.tree.map(np.asarray, function(*arrays))
            finally:
                pltpu.reset_tpu_interpret_mode_state()
                jax.config.update("jax_disable_most_optimizations", False)
        if "RACE DETECTED" in said.getvalue():
            raise AssertionError(said.getvalue())
        return found

    return run


@pytest.fixture(scope="session", params=implementation.NAMES)
def run(request, interpreted):
    """A function: what `function(*arrays)` returns with every kernel by the implementation of this test.

    On two cores: one alone races with nobody.
    """

    def run(function, *arrays):
        with implementation.setting(request.param):
            return interpreted(function, *arrays, cores=2)

    return run


@pytest.fixture(scope="session", params=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def compiled(request):
    """A function: what `function` of arrays of (shape, dtype) costs on one chip of a TPU generation, and its kernels by
    name: (memory analysis, costs, kernels)."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: it holds the compiler for TPUs")
    mesh = make_mesh("", topology(request.param)[1][:1])

    def compile(function, *arrays):
        place = NamedSharding(mesh, PartitionSpec())
        abstract = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in arrays]
        with jax.set_mesh(mesh):
            memory, costs = compile_costs(jax.jit(function).lower(*abstract))
        kernels = {kernel.name: kernel for kernel in costs.kernels}
        assert len(kernels) == len(costs.kernels)
        assert all(0 < kernel.vmem <= tpu_memory.VMEM_BYTES for kernel in kernels.values())
        return memory, costs, kernels

    return compile
