"""The kernel's FUSE protocol as bytes, as far as a file system of flat files needs it. Pure.

Numbers and structures: include/uapi/linux/fuse.h (7.31, and NOTIFY_RESEND of 7.40). A request is a header of 40 bytes and a body, an answer a
header of 16 bytes and a body; all in the host's byte order. ValueError: a request that is shorter than its kind, or whose numbers cannot be.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag

MAJOR, MINOR = 7, 31
RESEND_MINOR = 40  # Linux 6.9: what was taken and never answered can be asked for again
ROOT = 1
PAGE = 4096
MAX_READ = 1 << 20
MAX_PAGES = MAX_READ // PAGE
MAX_WRITE = PAGE  # the least that the kernel accepts: nobody writes here
# 8192 is FUSE_MIN_READ_BUFFER. Longer requests than fit (long attributes) the kernel fails itself.
BUFFER = 16384
# Read-ahead requests under way; with fewer than 64 the workers run dry. So many more, for those that wait for a registry stay under way, and
# would keep those of other machines from being sent.
BACKGROUND, CONGESTED = 1024, 768
FOREVER = 10 * 365 * 86400  # seconds; layers never change
NAME_LENGTH = 16

IN = struct.Struct("=IIQQIIIHH")  # length, opcode, unique, node, uid, gid, pid, length of extensions, padding
OUT = struct.Struct("=IiQ")  # length, error, unique
READ_IN = struct.Struct("=QQIIQII")  # handle, offset, size, flags, lock owner, flags, padding
_INIT_IN = struct.Struct("=IIII")  # major, minor, max_readahead, flags
_INIT_OUT = struct.Struct("=IIIIHHIIHHI7I")
_SETATTR_IN = struct.Struct("=IIQQ")  # valid, padding, handle, size
_FALLOCATE_IN = struct.Struct("=QQQII")  # handle, offset, length, mode, padding
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_ENTRY_OUT = struct.Struct("=QQQQII")  # node, generation, entry and attribute timeouts: seconds, nanoseconds
_ATTR_OUT = struct.Struct("=QII")
_OPEN_OUT = struct.Struct("=QII")
_DIRENT = struct.Struct("=QQII")  # node, offset of the next, name length, type
_STATFS = struct.Struct("=QQQQQIIII6I")

KEEP_CACHE = 1 << 1  # FOPEN_KEEP_CACHE
SIZE_GIVEN = 1 << 3  # FATTR_SIZE
KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE
NOTIFY_RESEND = 7
CLONE = 0x8004E500  # FUSE_DEV_IOC_CLONE: _IOR(229, 0, uint32_t)


class Opcode(IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    ACCESS = 34
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43


class Flag(IntFlag):
    """What is agreed on at INIT."""

    ASYNC_READ = 1 << 0
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22


WANTED = Flag.ASYNC_READ | Flag.PARALLEL_DIROPS | Flag.MAX_PAGES


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """The other side, as it said at INIT."""

    major: int
    minor: int
    flags: int

    @property
    def resends(self) -> bool:
        return (self.major, self.minor) >= (MAJOR, RESEND_MINOR)


def init_request(body: bytes | memoryview) -> Kernel:
    if len(body) < _INIT_IN.size:
        raise ValueError(f"INIT of {len(body)} bytes")
    major, minor, _, flags = _INIT_IN.unpack_from(body)
    if major != MAJOR or minor < MINOR:
        raise ValueError(f"the kernel speaks FUSE {major}.{minor}, not {MAJOR}.{MINOR} or newer")
    return Kernel(major=major, minor=minor, flags=flags)


def init_answer(kernel: Kernel) -> bytes:
    """1 MiB reads (the kernel reads ahead less for page faults, see its own read_ahead_kb) and as many of them at once as keeps every worker busy."""
    flags = int(WANTED) & kernel.flags
    return _INIT_OUT.pack(MAJOR, MINOR, MAX_READ, flags, BACKGROUND, CONGESTED, MAX_WRITE, 1, MAX_PAGES, 0, 0, *([0] * 7))


def name_request(body: bytes | memoryview) -> bytes:
    """The name of a LOOKUP; it ends with a zero byte."""
    name, zero, _ = bytes(body).partition(b"\0")
    if not zero:
        raise ValueError("a name without an end")
    return name


def read_request(body: bytes | memoryview) -> tuple[int, int]:
    """Offset and size of a READ or READDIR."""
    if len(body) < READ_IN.size:
        raise ValueError(f"READ of {len(body)} bytes")
    _, offset, size, *_ = READ_IN.unpack_from(body)
    if size > MAX_READ or offset >= 1 << 63:
        raise ValueError(f"READ of {size} bytes at {offset}")
    return offset, size


def setattr_request(body: bytes | memoryview) -> int | None:
    """The size that a SETATTR asks for, None when it is about something else."""
    if len(body) < _SETATTR_IN.size:
        raise ValueError(f"SETATTR of {len(body)} bytes")
    valid, _, _, size = _SETATTR_IN.unpack_from(body)
    return int(size) if valid & SIZE_GIVEN else None


def fallocate_request(body: bytes | memoryview) -> int:
    """The size that a file must have for a FALLOCATE to leave it as it is."""
    if len(body) < _FALLOCATE_IN.size:
        raise ValueError(f"FALLOCATE of {len(body)} bytes")
    _, offset, length, mode, _ = _FALLOCATE_IN.unpack_from(body)
    return 0 if mode & KEEP_SIZE else int(offset) + int(length)


def attributes(node: int, size: int, uid: int, gid: int) -> bytes:
    """Of the root directory, or of a file of `size` bytes. All times are 0."""
    mode, links = (stat.S_IFDIR | 0o700, 2) if node == ROOT else (stat.S_IFREG | 0o600, 1)
    return _ATTR.pack(node, size, (size + 511) // 512, 0, 0, 0, 0, 0, 0, mode, links, uid, gid, 0, PAGE, 0)


def entry(node: int, attr: bytes) -> bytes:
    """The answer to a LOOKUP that found something."""
    return _ENTRY_OUT.pack(node, 0, FOREVER, FOREVER, 0, 0) + attr


def attr_answer(attr: bytes) -> bytes:
    return _ATTR_OUT.pack(FOREVER, 0, 0) + attr


def open_answer() -> bytes:
    return _OPEN_OUT.pack(0, KEEP_CACHE, 0)


def statfs(blocks: int) -> bytes:
    """A file system that is full: blocks of 4096 bytes, none of them free."""
    return _STATFS.pack(blocks, 0, 0, 0, 0, PAGE, NAME_LENGTH, PAGE, 0, *([0] * 6))


def directory(entries: Iterable[tuple[int, str]], offset: int, size: int) -> bytes:
    """The answer to a READDIR: (node, name) pairs, sorted by node. An entry's offset is its node id, so a listing survives that entries come and go."""
    found = bytearray()
    for node, name in entries:
        if node <= offset:
            continue
        encoded = name.encode()
        record = _DIRENT.pack(node, node, len(encoded), stat.S_IFREG >> 12) + encoded
        record += bytes(-len(record) % 8)
        if len(found) + len(record) > size:
            break
        found += record
    return bytes(found)


def answer(unique: int, parts: Sequence[bytes | memoryview], length: int) -> list[bytes | memoryview]:
    """What to write for an answer whose parts have `length` bytes together."""
    return [OUT.pack(OUT.size + length, 0, unique), *parts]


def refusal(unique: int, error: int) -> bytes:
    """error: an errno, positive."""
    return OUT.pack(OUT.size, -error, unique)


def resend() -> bytes:
    """Asks the kernel to send again what was taken and not answered. It refuses with EINVAL before Linux 6.9."""
    return OUT.pack(OUT.size, NOTIFY_RESEND, 0)
