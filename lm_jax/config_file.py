"""A config file of an experiment, and values changed on the command line: `--config=FILE --config.rl.steps=40`."""

from __future__ import annotations

import ast
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


def read_config(file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """What `get_config()` of a Python file returns, with overrides, as plain dictionaries.

    Args:
        overrides: each "--config.some.key=value"; the key need not be in the file. Where the file holds a string, the
            value is one; elsewhere it is read as Python (3, 1e-4, True, ("sft", "rl")) if it can be. What refers to a
            changed value (a `FieldReference`) changes too.

    Raises:
        ValueError: an argument that is no override, or one that goes through a value that has no keys.
        FileNotFoundError: there is no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"--config: there is no file {file}")
    functions = runpy.run_path(str(file))
    if "get_config" not in functions:
        raise ValueError(f"--config: {file} has no function get_config()")
    config: ConfigDict = functions["get_config"]()
    for override in overrides:
        key, equals, text = override.partition("=")
        path = key.removeprefix("--config.").split(".")
        if not key.startswith("--config.") or not equals or not all(path):
            raise ValueError(f"unknown argument {override}; --config.some.key=value changes a value of the config")
        with config.unlocked(), config.ignore_type():
            _set(config, path, text, key)
    return config.to_dict()


def _set(config: ConfigDict, path: Sequence[str], text: str, key: str) -> None:
    for part in path[:-1]:
        if not isinstance(config.get(part, config), ConfigDict):
            raise ValueError(f"{key}: {part} has no keys, it is {config[part]!r}")
        if part not in config:
            config[part] = ConfigDict()
        config = config[part]
    config[path[-1]] = text if isinstance(config.get(path[-1]), str) else _value(text)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text, text)
