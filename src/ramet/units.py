"""Sizes at the edges, where people read and write them. Inside they are bytes."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1, **{f"{p}{s}": 1 << (10 * (i + 1)) for i, p in enumerate("KMGT") for s in ("", "iB")}}
_UNITS |= {f"{p}B": 1000 ** (i + 1) for i, p in enumerate(("K", "M", "G", "T"))} | {"kB": 1000}
_SIZE = re.compile(r"^\s*(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*$")
SIZE_HELP = "a size such as `512MiB`, `2G` (both powers of 1024) or `500MB` (powers of 1000)"


def parse_size(value: str | int) -> int:
    """Bytes of `512MiB`, `2G`, `1.5GiB`, `500MB` or a plain number; ValueError says what would be right."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"is not a size: write {SIZE_HELP}")
    match = _SIZE.match(str(value))
    if not match:
        raise ValueError(f"{value!r} is not a size: write {SIZE_HELP}")
    number, unit = match.groups()
    if unit not in _UNITS:
        close = next((u for u in _UNITS if u and u.lower() == unit.lower()), None)
        raise ValueError(f"{value!r} has the unknown unit {unit!r}: write {f'`{number}{close}`' if close else SIZE_HELP}")
    return int(float(number) * _UNITS[unit])


def format_size(size: int) -> str:
    """Bytes for people: three digits, binary units."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 999.5 or unit == "TiB":
            return f"{value:.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.3g} {unit}"
        value /= 1024
    raise AssertionError
