import importlib.metadata
import importlib.util
import os
import pathlib

import pytest

from kernels import implementation
from lm_jax.program import before_jax, use_kernels


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
