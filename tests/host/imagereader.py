"""A program that reads a served layer and compares every byte with the file it comes from: how much it compared, or what was wrong.

Until SIGTERM, and for so many bytes as it is told to.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import sys
from types import FrameType

PIECES, LONGEST = 64, 300_000


class Stop:
    asked = False


def drop(fd: int, mapped: mmap.mmap | None) -> None:
    """Have it come from the file system again."""
    if mapped:
        mapped.madvise(mmap.MADV_DONTNEED)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def whole(fd: int, length: int, offset: int) -> bytes:
    """A file's bytes. A read that fails half-way returns what it has; the next one tells the error."""
    got = b""
    while len(got) < length and (more := os.pread(fd, length - len(got), offset + len(got))):
        got += more
    return got


def main(mode: str, served: str, raw: str, least: str) -> int:
    def stop(number: int, frame: FrameType | None) -> None:
        Stop.asked = True

    signal.signal(signal.SIGTERM, stop)
    with open(raw, "rb") as file:
        wanted = file.read()
    rng = random.Random(served)
    fd = os.open(served, os.O_RDWR)  # as QEMU opens a machine's memory
    mapped = mmap.mmap(fd, len(wanted), flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) if mode == "map" else None
    compared = 0
    print("reading", flush=True)
    while not Stop.asked or compared < int(least):
        drop(fd, mapped)
        for _ in range(PIECES):
            offset, length = rng.randrange(len(wanted)), rng.randrange(1, LONGEST)
            got = mapped[offset : offset + length] if mapped else whole(fd, length, offset)
            if got != wanted[offset : offset + length]:
                print(f"wrong bytes in {length} at {offset}, of which {len(got)} came")
                return 1
            compared += len(got)
    print(compared)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except OSError as error:
        print(f"{type(error).__name__} {error.errno}: {error}")
        sys.exit(2)
