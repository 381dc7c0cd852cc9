"""Tables of numbers as files: columns of fixed-width little-endian integers behind one SHA-256, so that every truncation and every flipped bit is found.

magic    8 bytes, names the table
columns  u16, then for each: type (one of B H I Q: 1, 2, 4, 8 bytes) and rows, u8 and u64
digest   32 bytes, of all the above and of all that follows
the columns, one after the other
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections.abc import Sequence

from ramet.errors import LayerError

_HEAD = struct.Struct("<8sH")
_COLUMN = struct.Struct("<cQ")
_DIGEST = 32


def dump(magic: bytes, columns: Sequence[array[int]]) -> bytes:
    """The file's content."""
    head = _HEAD.pack(magic, len(columns)) + b"".join(_COLUMN.pack(column.typecode.encode(), len(column)) for column in columns)
    body = b"".join(_swapped(column).tobytes() for column in columns)
    return head + hashlib.sha256(head + body).digest() + body


def load(magic: bytes, types: str, data: bytes, what: str) -> list[array[int]]:
    """The columns, of the given types. LayerError, which begins with `what`, when it is not exactly what `dump` made."""
    size = _HEAD.size + _COLUMN.size * len(types)
    if len(data) < size + _DIGEST or _HEAD.unpack_from(data) != (magic, len(types)):
        raise LayerError(f"{what} is damaged: it does not begin as it should", hint="Delete what stands on it, or restore the file.")
    head, digest = data[:size], data[size : size + _DIGEST]
    body = memoryview(data)[size + _DIGEST :]
    wrong = hashlib.sha256(head)
    wrong.update(body)
    if wrong.digest() != digest:
        raise LayerError(f"{what} is damaged: its content does not match its digest", hint="Delete what stands on it, or restore the file.")
    found: list[array[int]] = []
    at = 0
    for number, wanted in enumerate(types):
        kind, rows = _COLUMN.unpack_from(head, _HEAD.size + _COLUMN.size * number)
        column = array(wanted)
        end = at + rows * column.itemsize
        if kind != wanted.encode() or end > len(body):
            raise LayerError(f"{what} is damaged: column {number} is not as it should be")
        column.frombytes(body[at:end])
        found.append(_swapped(column))
        at = end
    if at != len(body):
        raise LayerError(f"{what} is damaged: it is longer than it should be")
    return found


def _swapped(column: array[int]) -> array[int]:
    if sys.byteorder == "little":
        return column
    column = column[:]
    column.byteswap()
    return column
