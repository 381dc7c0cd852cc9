"""QEMU's qcow2: where the clusters of an overlay lie that nobody writes to any more, and empty overlays without a process for each.

The format: docs/interop/qcow2.txt in QEMU's source. The numbers in a file are its guest's QEMU's, so none is believed.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ramet import process
from ramet.errors import LayerError
from ramet.store import disk
from ramet.store.layer import MAX_PAGES, PAGE
from ramet.store.runs import ZERO, Runs

CLUSTER = 1 << 16
OPTIONS = "cluster_size=64k,lazy_refcounts=on"
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_OFFSET = 0x00FF_FFFF_FFFF_FE00  # bits 9 to 55 of an entry
_COMPRESSED, _ALL_ZEROS = 1 << 62, 1
# Features that a reader must know: refcounts may be stale (we look at none), another compression (we take no compressed clusters).
_DIRTY, _COMPRESSION = 1, 8
_ENTRIES = CLUSTER // 8
_STRIDE = 64  # entries that are looked at together: most of a table is empty
_EMPTY = bytes(_STRIDE * 8)
_CREATE = 30.0  # seconds


@dataclass(frozen=True, kw_only=True)
class _Header:
    size: int
    l1_size: int
    l1_offset: int


def runs(path: Path, size: int) -> Runs:
    """Which pages an overlay of `size` bytes holds, and at which page of its file; those it says are zero as such.

    LayerError for a file that QEMU does not make for us: compressed, encrypted, with other clusters, damaged.
    """
    with disk.guard("read", path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            length = os.fstat(fd).st_size
            header = _header(fd, path, length)
            if header.size != size:
                raise LayerError(f"{path} is a disk of {header.size} bytes, not of {size}")
            return Runs.build(_clusters(fd, path, header, length))
        finally:
            os.close(fd)


def _header(fd: int, path: Path, length: int) -> _Header:
    data = os.pread(fd, _HEADER.size, 0)
    if len(data) < _HEADER.size or data[:4] != b"QFI\xfb":
        raise LayerError(f"{path} is no qcow2 file")
    fields = _HEADER.unpack(data)
    version, cluster_bits, size, crypt, l1_size, l1_offset, features = (fields[i] for i in (1, 4, 5, 6, 7, 8, 13))
    if version != 3 or 1 << cluster_bits != CLUSTER:
        raise LayerError(f"{path}: only version 3 with clusters of 64 KiB is read, this is version {version} with 2^{cluster_bits} bytes")
    if crypt or features & ~(_DIRTY | _COMPRESSION):
        raise LayerError(f"{path} uses features that are not read: encryption {crypt}, features {features:#x}")
    if not 0 < size <= MAX_PAGES * PAGE or l1_size < -(-size // (CLUSTER * _ENTRIES)) or l1_size > 1 << 22:
        raise LayerError(f"{path} is damaged: a disk of {size} bytes with {l1_size} tables")
    if l1_offset % CLUSTER or l1_offset + l1_size * 8 > length:
        raise LayerError(f"{path} is damaged: its first table is at {l1_offset}, the file has {length} bytes")
    return _Header(size=size, l1_size=l1_size, l1_offset=l1_offset)


def _clusters(fd: int, path: Path, header: _Header, length: int) -> Iterator[tuple[int, int, int]]:
    """First page, count, page of the file or ZERO."""
    pages = (header.size + PAGE - 1) // PAGE
    each = CLUSTER // PAGE
    for number, entry in enumerate(_table(os.pread(fd, header.l1_size * 8, header.l1_offset))):
        at = entry & _OFFSET
        if not at:
            continue
        if at % CLUSTER or at + CLUSTER > length:
            raise LayerError(f"{path} is damaged: table {number} is at {at}, the file has {length} bytes")
        data = os.pread(fd, CLUSTER, at)
        if len(data) != CLUSTER:
            raise LayerError(f"{path} became shorter while it was read")
        table = _table(data)
        for begin in range(0, _ENTRIES, _STRIDE):
            if data.startswith(_EMPTY, begin * 8):
                continue
            for which in range(begin, begin + _STRIDE):
                if not (value := table[which]):
                    continue
                first = (number * _ENTRIES + which) * each
                where = _place(value, path, length)
                if where is not None and first < pages:
                    yield first, min(each, pages - first), where


def _place(entry: int, path: Path, length: int) -> int | None:
    if entry & _COMPRESSED:
        raise LayerError(f"{path} has compressed clusters")
    if entry & _ALL_ZEROS:
        return ZERO
    at = entry & _OFFSET
    if not at:
        return None
    if at % CLUSTER or at >= length:
        raise LayerError(f"{path} is damaged: a cluster is at {at}, the file has {length} bytes")
    return at // PAGE


def _table(data: bytes) -> array[int]:
    table = array("Q")
    table.frombytes(data)
    if sys.byteorder == "little":
        table.byteswap()
    return table


_made: dict[int, tuple[int, list[tuple[int, bytes]]]] = {}  # size -> the length of its empty overlay's file, and what is not zero in it


async def create(path: Path, size: int) -> None:
    """An empty overlay that names no backing file. A copy of one that `qemu-img` made, once for each size: a process costs 30 ms of a fork, a copy none.

    CommandError, HostError; FileExistsError becomes a HostError too, for nothing is overwritten.
    """
    if size not in _made:
        _made[size] = await _make(size)
    length, parts = _made[size]
    with disk.guard("write", path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, length)  # a full disk is met here, and not by a guest that runs
            for offset, data in parts:
                if os.pwrite(fd, data, offset) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(fd)


async def _make(size: int) -> tuple[int, list[tuple[int, bytes]]]:
    with tempfile.TemporaryDirectory(prefix="ramet-qcow2-") as name:
        made = Path(name) / "empty.qcow2"
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", OPTIONS, str(made), str(size)]
        (await process.run(command, deadline=_CREATE)).check(f"making a disk of {size} bytes")
        data = made.read_bytes()
    parts = [(at, data[at : at + PAGE]) for at in range(0, len(data), PAGE)]
    return len(data), [(at, part) for at, part in parts if part.strip(b"\0")]
