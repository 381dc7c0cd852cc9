"""Small file systems, and full ones."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from ramet.paths import StateDir
from tests.fixtures import States


@contextlib.contextmanager
def mounted(states: States, root: Path, size: int) -> Iterator[StateDir]:
    """A state directory on a file system of so many bytes; mounting it needs root."""
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "ramet-test", str(root)], check=True)
    try:
        yield states.new(root)
        states.scratch.states.pop()
    finally:
        subprocess.run(["umount", str(root)], check=True)


def free(state: StateDir) -> int:
    """Bytes."""
    found = os.statvfs(state.root)
    return found.f_bavail * found.f_frsize


def fill(state: StateDir, left: int) -> Path:
    """Take all of the space but `left` bytes."""
    ballast = state.root / "ballast"
    with open(ballast, "wb") as file:
        for _ in range(100):
            try:
                os.posix_fallocate(file.fileno(), 0, max(4096, free(state) - left))
                break
            except OSError as error:
                assert error.errno == errno.ENOSPC  # a guest has written meanwhile
    return ballast
