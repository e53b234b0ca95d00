import argparse
import importlib.metadata
import importlib.util
import os
import pathlib

import jax
import pytest

from kernels import implementation
from lm_jax.program import before_jax, ending_as_told, join_run, use_kernels
from lm_jax.train_loop import NonFiniteLoss
from sharding import distributed
from sharding.distributed import PREEMPTED


def test_the_kernels_of_a_run_are_told_once(capfd):
    use_kernels("xla")
    use_kernels("xla")  # a second run in the process
    for _ in range(2):
        assert implementation.choice("label_head") == "xla"
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


class Ended(BaseException):
    """Stands for the end of the process, which waits for nobody."""


@pytest.fixture
def ends(monkeypatch):
    def end(number):
        raise Ended(number)

    monkeypatch.setattr(os, "_exit", end)


def test_of_several_processes_one_that_refuses_its_arguments_ends_without_the_others(monkeypatch, capfd, ends):
    """Python's own end would wait for them in jax's barrier, and all of them would abort."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    parser = argparse.ArgumentParser()
    with pytest.raises(Ended) as ended, ending_as_told(parser):
        parser.exit(2, "error: data.train: not there\n")
    assert ended.value.args == (2,)
    with pytest.raises(Ended) as ended, ending_as_told(parser):
        raise NonFiniteLoss("sft: loss nan")
    assert ended.value.args == (1,)
    assert capfd.readouterr().err == "error: data.train: not there\nerror: sft: loss nan\n"


def test_one_process_ends_as_python_does(capfd):
    parser = argparse.ArgumentParser()
    with pytest.raises(SystemExit) as ended, ending_as_told(parser):
        parser.exit(2, "error: data.train: not there\n")
    assert ended.value.code == 2
    with pytest.raises(SystemExit) as ended, ending_as_told(parser):
        raise NonFiniteLoss("sft: loss nan")
    assert ended.value.code == 1
    assert capfd.readouterr().err == "error: data.train: not there\nerror: sft: loss nan\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("JAX_COORDINATOR_ADDRESS goes with others"), 2),
        (jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out"), PREEMPTED),  # they may come next time
    ],
)
def test_where_the_others_do_not_come_the_run_is_started_again(monkeypatch, capfd, ends, error, status):
    def start(**options):
        raise error

    monkeypatch.setattr(distributed, "start", start)
    with pytest.raises(Ended) as ended:
        join_run(argparse.ArgumentParser())
    assert ended.value.args == (status,)
    assert str(error) in capfd.readouterr().err


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
def test_of_several_processes_one_with_a_fault_of_its_own_is_not_started_again(monkeypatch, capfd, ends, error, status):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(Ended) as ended, ending_as_told(argparse.ArgumentParser()):
        raise error
    assert ended.value.args == (status,)
    assert type(error).__name__ in capfd.readouterr().err  # and where it was
