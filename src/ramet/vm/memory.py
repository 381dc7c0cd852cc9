"""A guest's memory as its QEMU holds it: which pages are private to the process, and their contents."""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ramet.store import disk

PAGE = 4096

# ioctl PAGEMAP_SCAN (Linux 6.7, include/uapi/linux/fs.h): _IOWR('f', 16, struct pm_scan_arg), which is twelve u64.
_PAGEMAP_SCAN = 0xC0606610
_ARGUMENTS = struct.Struct("<12Q")
_REGION = struct.Struct("<3Q")
_FILE, _PRESENT, _SWAPPED, _ZERO = 1 << 2, 1 << 3, 1 << 4, 1 << 5  # PAGE_IS_*
_REGIONS = 8192  # that one call can return
_COPY = 1 << 20  # bytes moved at a time

# Bits of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst)
_BIT_PRESENT, _BIT_SWAPPED, _BIT_FILE = 1 << 63, 1 << 62, 1 << 61


def private(pid: int, base: int, size: int) -> list[tuple[int, int]]:
    """The pages of [base, base + size) that the process wrote: (first page, count), counted from `base`, in order.

    Written pages are anonymous: in a private mapping of a file as much as in plain memory. What was only read is the file's, or the zero page.
    Takes time by what is present, not by `size`, on Linux 6.7 and newer; before that 10 to 20 ms for each GiB.
    """
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            regions = list(_scan(fd, base, base + size))
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL):
                raise
            regions = list(_walk(fd, base, base + size))
    finally:
        os.close(fd)
    return [((start - base) // PAGE, (end - start) // PAGE) for start, end in _merged(regions)]


def _scan(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """By the ioctl: present or swapped, and neither a file's page nor the zero page."""
    buffer = ctypes.create_string_buffer(_REGION.size * _REGIONS)
    done = start
    while start < end:
        wanted = (_FILE | _ZERO, _FILE | _ZERO, _PRESENT | _SWAPPED, _PRESENT | _SWAPPED)  # inverted, all of, any of, returned
        arguments = bytearray(_ARGUMENTS.pack(_ARGUMENTS.size, 0, start, end, 0, ctypes.addressof(buffer), _REGIONS, 0, *wanted))
        found = fcntl.ioctl(fd, _PAGEMAP_SCAN, arguments, True)
        start = _ARGUMENTS.unpack(arguments)[4]  # walk_end
        for first, last, _ in _REGION.iter_unpack(buffer.raw[: found * _REGION.size]):
            if last > done:  # 6.18 was seen to tell a region again at the end of a long list
                yield max(first, done), last
                done = last


def _walk(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """By reading every page's word."""
    step = 1 << 16
    for at in range(start // PAGE, end // PAGE, step):
        words = array.array("Q", os.pread(fd, 8 * min(step, end // PAGE - at), 8 * at))
        for page, word in enumerate(words, at):
            if word & _BIT_SWAPPED or (word & _BIT_PRESENT and not word & _BIT_FILE):
                yield page * PAGE, (page + 1) * PAGE


def _merged(regions: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Neighbours as one (the categories of a page may differ where ours do not)."""
    last: tuple[int, int] | None = None
    for start, end in regions:
        if last and last[1] == start:
            last = (last[0], end)
            continue
        if last:
            yield last
        last = (start, end)
    if last:
        yield last


def copy(pid: int, base: int, spans: list[tuple[int, int]], out: int) -> int:
    """Append the contents of pages of a stopped process to the file `out`, packed; returns bytes."""
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    buffer = memoryview(bytearray(_COPY))
    total = filled = 0
    try:
        for first, count in spans:
            at, end = base + first * PAGE, base + (first + count) * PAGE
            while at < end:
                n = os.preadv(memory, [buffer[filled : filled + min(end - at, _COPY - filled)]], at)
                if n <= 0:
                    raise OSError(errno.EIO, "the process's memory went away")
                at, filled, total = at + n, filled + n, total + n
                if filled == _COPY:
                    disk.write_all(out, buffer)
                    filled = 0
        disk.write_all(out, buffer[:filled])
    finally:
        os.close(memory)
    return total


# Of each mapping (Documentation/filesystems/proc.rst): its head, and the lines that are looked at.
_MAPPING = re.compile(
    rb"^(?:([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \d+ *(.*)|(Rss|Pss|Private_Clean|Private_Dirty|Anonymous|Swap): +(\d+) kB)$", re.M
)


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of memory that the host holds for a QEMU; pages that others map too are counted in parts (PSS).

    own: what its guest wrote; common: its part of the pages of layers that it only read; cache: code that emulation translated; heap: other anonymous memory;
    program: it and its libraries. The sum of these is what it costs, of which nobody else maps `private`.
    guest: bytes of the guest's memory that are there, whoever shares them, in swap too.
    """

    own: int = 0
    common: int = 0
    cache: int = 0
    heap: int = 0
    program: int = 0
    private: int = 0
    guest: int = 0

    @property
    def total(self) -> int:
        return self.own + self.common + self.cache + self.heap + self.program


def held(pid: int, size: int, served: Path) -> Held:
    """What the host holds for a QEMU: OSError when it is gone. size: of the guest's memory in bytes; served: where the files of memory layers are.

    The guest's memory is a private mapping of a layer's file, or the anonymous mapping that is as large as it. Translated code is in mappings that may be
    written and executed.
    """
    layers, sums = os.fsencode(served) + b"/", Counter[str]()
    kind, is_guest, pss = "heap", False, 0
    for begin, end, rights, path, name, value in _MAPPING.findall(Path(f"/proc/{pid}/smaps").read_bytes()):
        if begin:
            is_guest = path.startswith(layers) or (not path and rights.startswith(b"rw-") and int(end, 16) - int(begin, 16) >= size)
            kind = "common" if is_guest else "cache" if b"wx" in rights else "program" if path.startswith(b"/") else "heap"
            continue
        number = int(value) << 10
        if name == b"Pss":
            pss = number
            sums[kind] += number
        elif name.startswith(b"Private"):
            sums["private"] += number
        elif is_guest and name == b"Anonymous":
            own = min(number, pss)  # merged pages (KSM) are anonymous too, and not its own alone
            sums["own"] += own
            sums["common"] -= own
        elif is_guest:
            sums["guest"] += number  # Rss, Swap
    return Held(**sums)
