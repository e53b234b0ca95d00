import argparse
import importlib.metadata
import importlib.util
import os
import pathlib

import jax
import pytest

from kernels import implementation
from lm_jax.program import before_jax, ending_as_told, use_kernels
from sharding.distributed import PREEMPTED


def test_the_kernels_of_a_run_are_told_once(capfd):
    use_kernels("xla")
    use_kernels("xla")  # a second run in the process
    for _ in range(2):
        assert implementation.choice("label_head") == {"default": "xla"}
    assert capfd.readouterr().err == "kernel label_head: xla, as asked for\n"


@pytest.mark.parametrize(
    ("library", "devices", "plugins", "given", "expected"),
    [
        (True, [], [], None, "cpu"),
        (True, ["accel0"], [], None, None),  # a TPU
        (True, [], ["cuda"], None, None),  # a GPU may be at hand
        (False, [], [], None, None),
        (True, [], [], "tpu", "tpu"),  # the environment decides
    ],
)
def test_the_library_of_tpus_is_left_alone_where_there_is_none(monkeypatch, library, devices, plugins, given, expected):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "kept")
    monkeypatch.delenv("JAX_PLATFORMS")
    if given:
        monkeypatch.setenv("JAX_PLATFORMS", given)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if library else None)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(pathlib.Path, "glob", lambda path, pattern: devices if pattern == "accel*" else [])
    before_jax()
    assert os.environ.get("JAX_PLATFORMS") == expected
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "kept"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"), PREEMPTED),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: a task died"), PREEMPTED),
        (ValueError("a group needs a row of 9000 tokens"), 1),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), 1),
        (jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile TPU kernel"), 1),
        (KeyError("kl"), 1),
    ],
)
def test_of_several_processes_one_with_a_fault_of_its_own_is_not_started_again(monkeypatch, capfd, error, status):
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    class Ended(BaseException):
        pass

    def end(number):
        raise Ended(number)

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended) as ended, ending_as_told(argparse.ArgumentParser()):
        raise error
    assert ended.value.args == (status,)
    assert type(error).__name__ in capfd.readouterr().err  # and where it was
