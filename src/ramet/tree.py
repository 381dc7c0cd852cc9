"""A file tree becomes an ext4 disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ramet import userns
from ramet.errors import CommandError, HostError, ImageError
from ramet.watch import Progress, allocated, watched

BLOCK = 4096
GROUP = 128 << 20  # bytes that one bitmap block describes at 4 KiB blocks
INODE_RATIO = 16384  # bytes of disk for each inode: kept as the file system grows, 524,288 inodes on an 8 GiB disk
INODE_SIZE = 256  # nanosecond times, times beyond 2038, and room for a small xattr (capabilities) without a block of its own
JOURNAL = (
    32 << 20
)  # it does not grow with the file system: enough for package installs, and all that its wrapping around ever adds to a machine's overlay
MAX_GROWTH = 1 << 40  # bytes up to which the guest can grow the file system online by plain descriptor blocks (508 KiB reserved a copy)
LABEL = "ramet"
DEADLINE = 3600.0
ENVIRONMENT = {"MKE2FS_CONFIG": "/dev/null"}  # nothing from the host's configuration

# `none` first: what the host's mke2fs.conf thinks is the default differs from release to release, and the guest's kernel must know them all.
#   has_journal            machines are killed and snapshots taken at any moment
#   resize_inode           grows online by reserved descriptor blocks; without it the kernel turns to meta_bg, the path with the bugs
#   64bit metadata_csum    checksums find corruption, and let block groups stay uninitialised until used; 64bit gives them their full width
#   flex_bg                16 groups' bitmaps and inode tables side by side: fewer reads at mount, fewer writes when growing
#   the rest               what every kernel since 2.6.28 has
_FEATURES = (
    "none,has_journal,resize_inode,64bit,metadata_csum,flex_bg,"
    "ext_attr,dir_index,filetype,extent,sparse_super,large_file,huge_file,dir_nlink,extra_isize"
)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a tree needs. data: bytes in whole blocks; inodes: files of any type, hard links counted once."""

    data: int
    inodes: int


def sum_up(lines: Iterable[str]) -> Usage:
    """Usage from lines of `TYPE SIZE BLOCKS(512) LINKS DEVICE:INODE`."""
    data = inodes = 0
    seen: set[str] = set()
    for line in lines:
        kind, size, blocks, links, inode = line.split()
        if kind != "d" and int(links) > 1:
            if inode in seen:
                continue
            seen.add(inode)
        inodes += 1
        if kind == "d":
            data += max(int(blocks) * 512, BLOCK)
        elif kind == "f":
            # holes stay holes; where the host compresses, this is too little, which `make_disk` finds out
            data += min(-(-int(size) // BLOCK) * BLOCK, -(-int(blocks) * 512 // BLOCK) * BLOCK)
        elif kind == "l" and int(size) >= 60:  # shorter ones live in their inode
            data += BLOCK
    return Usage(data=data, inodes=inodes)


def disk_size(usage: Usage) -> int:
    """Bytes of a file system that holds a tree: whole block groups, for a last one cut short must be completed first when the disk grows.

    The file is sparse, so generosity costs nothing, except that no machine's disk can be smaller.
    """
    data = usage.data * 105 // 100 + (usage.inodes // 50) * BLOCK + JOURNAL + (16 << 20)  # xattr and extent blocks, descriptors, bitmaps
    tables = data // INODE_RATIO * INODE_SIZE
    inodes = (usage.inodes * 105 // 100 + 1024) * INODE_RATIO
    return -(-max(data + tables, inodes) // GROUP) * GROUP


def mke2fs(disk: Path, tree: Path | None = None, *, label: str = LABEL, journal: int = JOURNAL, growth: int = MAX_GROWTH) -> list[str]:
    """The command line that fills a (new, sparse, empty) file with a file system. Nothing that is zero need be written: it is zero already.

    tree: what is in it. journal, growth: bytes, of the journal, and up to which the guest can grow it; growth 0: what mke2fs thinks.
    """
    grown = f",resize={growth // BLOCK}" if growth else ""
    return [
        *("mke2fs", "-q", "-F", *(("-d", str(tree)) if tree else ()), "-L", label),
        *("-b", str(BLOCK), "-I", str(INODE_SIZE), "-i", str(INODE_RATIO), "-m", "0"),
        *("-J", f"size={journal >> 20}", "-O", _FEATURES, "-e", "remount-ro"),
        # prezeroed marks the inode tables as zeroed too, so that no guest's kernel does it again in the background
        *("-E", f"root_owner=0:0,assume_storage_prezeroed=1,lazy_itable_init=1,lazy_journal_init=1,nodiscard{grown}"),
        str(disk),
    ]


async def measure(tree: Path) -> Usage:
    """What a tree needs on disk."""
    listing = await userns.run(("find", str(tree), "-xdev", "-printf", r"%y %s %b %n %D:%i\n"), deadline=DEADLINE, apart=True)
    return sum_up(listing.check("measuring a tree").output.splitlines())


async def make_disk(what: str, tree: Path, disk: Path, progress: Progress) -> None:
    """Write a tree to a new ext4 file, synced. Raises NoSpaceError, CommandError, ImageError (the tree is no directory)."""
    if tree.is_symlink() or not tree.is_dir():
        raise ImageError(f"{what}: its layers leave no root directory")
    userns.require("mke2fs")
    usage = await measure(tree)
    size = disk_size(usage)
    for attempt in range(4):
        try:
            await _fill(what, tree, disk, size << attempt, usage, progress)
            break
        except CommandError as error:
            # the file system was too small, not the host's disk: a host that compresses, or uncommonly many xattrs
            if attempt == 3 or "Could not allocate" not in error.details["log"]:
                raise
    with open(disk, "rb") as file:
        os.fsync(file.fileno())


async def _fill(what: str, tree: Path, disk: Path, size: int, usage: Usage, progress: Progress) -> None:
    disk.unlink(missing_ok=True)
    with open(disk, "xb") as file:
        try:
            file.truncate(size)
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            raise HostError(f"the file system of {disk.parent} cannot hold a file of {size >> 20} MiB") from error
    # It is read as the namespace's root, to which the tree belongs.
    work = userns.run(mke2fs(disk, tree), deadline=DEADLINE, env=ENVIRONMENT)
    result = await watched(work, lambda: progress("writing the disk", min(1.0, allocated(disk) / max(usage.data, 1))))
    result.check(f"{what}: writing its disk")
