"""Traces: which chunks of a layer a start touched, in order of first touch. They say what to fetch first, and what to give up last.

While `layers/ID/trace.new` is there, the workers of the image file system append the number of each chunk that is read of that file, as u32, little-endian.
The file of a layer is its whole address space, so a trace is also about chunks that come from layers below.
"""

from __future__ import annotations

import os
import sys
from array import array
from pathlib import Path

from ramet.errors import LayerError
from ramet.paths import StoreDir
from ramet.store import columns, disk, layer
from ramet.store.layer import CHUNK

_MAGIC = b"RAMETTRC"


def begin(files: StoreDir, layer_id: str) -> None:
    """Have what is read of a layer noted, from when its workers open it anew. NotFoundError, NoSpaceError, HostError."""
    layer.load(files.layer(layer_id), layer_id)
    disk.replace(files.layer(layer_id).tracing, b"", durable=False)


def end(files: StoreDir, layer_id: str) -> list[int]:
    """Make what was noted the layer's trace: the chunks' numbers. Nothing is changed where nothing was noted."""
    place = files.layer(layer_id)
    record = layer.load(place, layer_id)
    with disk.guard("read", place.tracing):
        try:
            noted = place.tracing.read_bytes()
        except FileNotFoundError:
            return []
    numbers = array("I", noted[: len(noted) // 4 * 4])
    if sys.byteorder != "little":
        numbers.byteswap()
    # A worker whose disk was full may have cut a number in two, and then what follows is nonsense: fetched first without need, no more.
    found = [number for number in dict.fromkeys(numbers) if number * CHUNK < record.size]
    if found:
        save(files, layer_id, found)
    place.tracing.unlink(missing_ok=True)
    return found


def save(files: StoreDir, layer_id: str, chunks: list[int]) -> None:
    """Write a layer's trace, atomically."""
    disk.replace(files.layer(layer_id).trace, columns.dump(_MAGIC, [array("I", chunks)]), durable=False)


def load(files: StoreDir, layer_id: str) -> list[int]:
    """The chunks of a layer's trace, in order; none where there is no trace, or a damaged one: it is advice."""
    try:
        [chunks] = columns.load(_MAGIC, "I", files.layer(layer_id).trace.read_bytes(), f"the trace of layer {layer_id}")
    except (OSError, LayerError):
        return []
    return list(chunks)


class Recorder:
    """A worker's side: what is read of one open layer. Falsy where nobody asks for it."""

    def __init__(self, path: Path) -> None:
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError:
            return  # nobody asks, or the disk fails: then there is no trace

    def __bool__(self) -> bool:
        return self._fd >= 0

    def note(self, offset: int, length: int) -> None:
        """Bytes that are read; nothing when `length` is 0."""
        if self._fd < 0 or length <= 0:
            return
        numbers = array("I", range(offset // CHUNK, (offset + length - 1) // CHUNK + 1))
        if sys.byteorder != "little":
            numbers.byteswap()
        data = numbers.tobytes()
        try:
            whole = os.write(self._fd, data) == len(data)
        except OSError:
            whole = False
        if not whole:
            self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
