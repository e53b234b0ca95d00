"""Config values as typed dataclasses: unknown and missing keys, wrong types and values are named with what is right."""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any


def one_of(key: str, value: Any, allowed: typing.Collection[str]) -> None:
    """Raise ValueError naming the key and what is allowed, unless the value is."""
    if value not in allowed:
        raise ValueError(f"{key}: {value!r} is unknown; it is one of {', '.join(allowed)}")


def at_least(least: int, prefix: str, values: Any, *keys: str) -> None:
    """Raise ValueError naming the first of these attributes that is below `least`."""
    for key in keys:
        if getattr(values, key) < least:
            raise ValueError(f"{prefix}{key}: {getattr(values, key)} must be at least {least}")


def refuse_unknown(values: Mapping[str, Any], known: typing.Collection[str], prefix: str) -> None:
    """Raise ValueError naming the first key that is not known, and the one that was probably meant."""
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else f"; known are {', '.join(sorted(known))}"
            raise ValueError(f"unknown config key {prefix}{key}{hint}")


def read_fields(cls: type, values: Mapping[str, Any], prefix: str, **given: Any) -> Any:
    """A dataclass from a mapping and fields read already (`given`), every key named with its `prefix`.

    Raises:
        ValueError: an unknown or missing key, or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name not in given}
    refuse_unknown(values, fields, prefix)
    for key, field in fields.items():
        if key not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"the config has no key {prefix}{key}")
    return cls(**given, **{key: typed_value(value, hints[key], prefix + key) for key, value in values.items()})


def typed_value(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type of a field: ints are taken for floats, lists for tuples, mappings for dataclasses."""
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return read_fields(hint, typed_value(value, Mapping[str, Any], key), f"{key}.")
    if origin is float and type(value) is int:
        return float(value)
    if origin is tuple and isinstance(value, list | tuple):
        each = inner[:1] * len(value) if inner[1:] == (...,) else inner
        if len(each) == len(value):
            pairs = enumerate(zip(value, each, strict=True))
            return tuple(typed_value(item, of, f"{key}[{place}]") for place, (item, of) in pairs)
    elif origin is collections.abc.Mapping and isinstance(value, Mapping):
        return {name: typed_value(item, inner[1], f"{key}.{name}") for name, item in value.items()}
    elif isinstance(value, origin) and (origin is bool or not isinstance(value, bool)):
        return value
    expected = str(hint).replace("typing.", "") if inner else hint.__name__
    raise ValueError(f"{key}: {value!r} is a {type(value).__name__}, expected {expected}")
