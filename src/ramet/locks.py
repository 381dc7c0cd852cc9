"""flock(2) with asyncio: locks that the kernel releases when their holder dies, however it dies."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

GLANCE = 0.5  # seconds after which a lock is somebody's, and not only looked at


def try_lock(path: Path, flags: int = os.O_RDONLY, *, patience: float = 0.0) -> int | None:
    """An fd that holds the lock on a file or directory until it is closed; None when another holds it for longer than so many seconds, or the path is gone."""
    try:
        fd = os.open(path, flags | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if not _lock(fd, patience) or not _names(path, fd):
        os.close(fd)
        return None
    return fd


def is_held(path: Path) -> bool:
    """Whether a process holds the lock on a file; False when there is no file. Looking takes it for a moment, shared, so that lookers do not see each other."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def take(path: Path, *, patience: float = GLANCE) -> int | None:
    """An fd that holds the lock on a file, made when it is not there, for as long as it or a copy that a program inherited is open.

    None when another holds it for longer than so many seconds: one that only looks holds it for less.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if _lock(fd, patience):
        return fd
    os.close(fd)
    return None


def _lock(fd: int, patience: float) -> bool:
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.01)


@contextlib.asynccontextmanager
async def exclusive(path: Path, on_wait: Callable[[], None] | None = None) -> AsyncIterator[None]:
    """Wait for a lock file, hold it in the body, remove it afterwards. Excludes tasks of this process as well as other processes.

    on_wait: called when another holds it.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            await _flock(fd, on_wait)
        except BaseException:
            os.close(fd)
            raise
        if _names(path, fd):
            break
        os.close(fd)  # the holder before us removed the file: the lock that counts is on a new one
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def _names(path: Path, fd: int) -> bool:
    """Whether the path still leads to the open file."""
    try:
        there, here = path.stat(), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


async def _flock(fd: int, on_wait: Callable[[], None] | None) -> None:
    """A blocking flock that can be cancelled: a thread waits on a duplicate, and lets go of what it gets when nobody wants it any more."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    if on_wait:
        on_wait()
    loop = asyncio.get_running_loop()
    locked: asyncio.Future[None] = loop.create_future()
    copy = os.dup(fd)

    def settle(error: OSError | None) -> None:
        if not locked.done():
            locked.set_exception(error) if error else locked.set_result(None)

    def wait() -> None:
        error: OSError | None = None
        try:
            fcntl.flock(copy, fcntl.LOCK_EX)
        except OSError as failed:
            error = failed
        finally:
            os.close(copy)  # a duplicate shares the lock: the caller's fd keeps it, unless it is closed by now
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, error)

    # not the loop's executor: asyncio.run would wait for its threads, and this one may wait for another process for long
    threading.Thread(target=wait, name="flock", daemon=True).start()
    await locked
