"""What the store does to files: whole writes, atomic replacement, and the errors of a full or failing disk.

Like all that `chain` imports it pulls in no asyncio: the image file system's processes must stay small.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ramet.errors import HostError, NoSpaceError

STAGED = ".new-"  # how the name of what is not whole yet begins
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def guard(doing: str, path: Path) -> Iterator[None]:
    """Turn an OSError of the body into NoSpaceError or HostError. doing: `write`, `read`: what failed, for the sentence."""
    try:
        yield
    except OSError as error:
        raise failure(f"cannot {doing} {path}", error, path=str(path)) from error


def failure(what: str, error: OSError, **details: Any) -> HostError:
    """The error for a failed read or write; a full disk is told apart, for users can do something about that."""
    details["errno"] = error.errno
    if error.errno in _FULL:
        why = "" if error.errno == errno.ENOSPC else f" ({error.strerror})"
        return NoSpaceError(f"{what}: no space left on the disk{why}", details=details)
    hint = "The host's kernel log may say more." if error.errno == errno.EIO else ""
    return HostError(f"{what}: {error.strerror}", hint=hint, details=details)


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """Write every byte; a short write is followed by the error that caused it."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def replace(path: Path, data: bytes, *, durable: bool) -> None:
    """Make the file's content `data`, all of it or not at all. durable: on the disk, and its name too, when this returns."""
    staged = path.with_name(f"{STAGED}{path.name}.{threading.get_native_id()}")  # two may write the same file at once
    with guard("write", path):
        try:
            fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                write_all(fd, data)
                if durable:
                    os.fsync(fd)
            finally:
                os.close(fd)
            staged.replace(path)
        except OSError:
            staged.unlink(missing_ok=True)
            raise
    if durable:
        sync(path.parent)


def remove_unwritten(place: Path) -> None:
    """Of a directory, files that `replace` had not given their names when its process was killed. The thread that writes one is in its name."""
    for path in place.glob(f"{STAGED}*.*"):
        thread = path.suffix[1:]
        if thread.isdigit() and not Path("/proc", thread).exists():
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    with guard("write", path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def lock(path: Path, *, alone: bool = False) -> int:
    """A descriptor that has the flock of a file or directory until it is closed, shared with others unless `alone`. Waits for it. HostError."""
    with guard("read", path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        except BaseException:
            os.close(fd)
            raise
    return fd


@contextlib.contextmanager
def locked(path: Path, *, alone: bool = False) -> Iterator[None]:
    """The same in the body."""
    fd = lock(path, alone=alone)
    try:
        yield
    finally:
        os.close(fd)


def allocated(path: Path) -> int:
    """Bytes that a file takes on the disk; 0 when there is none."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
