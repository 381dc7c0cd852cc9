"""Frozen records to JSON values and back, by their type hints: what the client and the CLI need of pydantic, at none of its start-up time.

The server validates what comes in with pydantic; this reads what the daemon answers. Keys it does not know are skipped, for a daemon
may be newer than its client.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ramet.errors import DaemonError

T = TypeVar("T")


def dump(value: Any) -> Any:
    """The JSON value of a record: dicts, lists, strings, numbers, None."""
    if isinstance(value, str):
        return str(value)
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): dump(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [dump(item) for item in value]
    kind: Any = type(value)
    if is_dataclass(value):
        return {name: dump(getattr(value, name)) for name in _names(kind)}
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def load(kind: type[T], value: Any, where: str = "answer") -> T:
    """The record of type `kind` that a JSON value stands for; DaemonError names the attribute that is not as it should be."""
    result: T = _load(kind, value, where)
    return result


@functools.cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


@functools.cache
def _shape(kind: type) -> tuple[tuple[str, Any, bool], ...]:
    """Of a dataclass: name, type and whether it must be there, of each field."""
    hints = get_type_hints(kind)
    return tuple((f.name, hints[f.name], f.default is MISSING and f.default_factory is MISSING) for f in fields(kind))


def _wrong(where: str, wanted: str, value: Any) -> DaemonError:
    return DaemonError(
        f"the daemon's answer is not understood: {where} should be {wanted}, not {str(value)[:60]!r}",
        hint="The daemon and this client may be of different versions: compare `ramet info` with `ramet --version`.",
    )


def _load(kind: Any, value: Any, where: str) -> Any:
    origin = get_origin(kind)
    if origin is Union or origin is types.UnionType:
        return None if value is None else _load(next(arg for arg in get_args(kind) if arg is not type(None)), value, where)
    if origin is list or origin is tuple:
        if not isinstance(value, list):
            raise _wrong(where, "a list", value)
        return origin(_load(get_args(kind)[0], item, f"{where}[{at}]") for at, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(where, "an object", value)
        return {key: _load(get_args(kind)[1], item, f"{where}.{key}") for key, item in value.items()}
    if is_dataclass(kind):
        return _load_record(kind, value, where)
    return _load_plain(kind, value, where)


def _load_record(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(where, "an object", value)
    found = {}
    for name, hint, needed in _shape(kind):
        if name in value:
            found[name] = _load(hint, value[name], f"{where}.{name}")
        elif needed:
            raise _wrong(f"{where}.{name}", "there", None)
    return kind(**found)


def _load_plain(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        try:
            return kind(value)
        except ValueError:
            raise _wrong(where, f"one of {', '.join(kind)}", value) from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _wrong(where, kind.__name__, value)
    return value
