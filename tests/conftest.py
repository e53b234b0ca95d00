"""The surroundings of every test: CPU, no network, one compilation cache. Set before jax is imported anywhere."""

import logging
import os
import pathlib

import hypothesis
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # plans for TPU topologies compile without asking for a TPU's metadata
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it warns at every fork of a process that has tokenized
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

from tests import quick_compiling  # noqa: E402, F401

# A property holds or does not; how long it takes says something of the machine and what else it does.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Each compiled program maps memory, and Linux gives a process 65,530 maps by default. One process that ran the
    whole suite was aborted near its end while it loaded a program."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        import jax

        jax.clear_caches()


@pytest.fixture(autouse=True)
def nothing_left_of_a_program():
    """A program run in this process by an earlier test set how kernels run and are told; each test begins anew."""
    from kernels import implementation

    implementation.setting.set_global("auto")
    implementation.log.handlers = []
    implementation.log.setLevel(logging.NOTSET)
    implementation.log.propagate = True
    implementation._tell.cache_clear()
