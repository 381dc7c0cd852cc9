"""Empty file systems that drives begin with: one for each name and size, made once, sparse, and never written to.

Not one for all: the drives of a machine must not have the same UUID, and one that has its size already need not be grown by the guest.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from ramet import locks, process, tree, userns
from ramet.model import Drive
from ramet.paths import StateDir
from ramet.store.disk import STAGED, guard, sync

_DEADLINE = 300.0  # seconds: 8 TiB take one, on an idle host
_PART = 16  # the journal is at most this part of it


async def ensure(state: StateDir, drive: Drive) -> Path:
    """The file that a drive with a mount begins with; of a drive's size, ext4. NoSpaceError, HostError, CommandError: nothing is left."""
    path = state.blank(drive.name, drive.size)
    if path.exists():
        return path
    userns.require("mke2fs", "debugfs")
    async with locks.exclusive(path.with_suffix(".lock")):
        if not path.exists():
            await _make(path, drive)
    return path


async def _make(path: Path, drive: Drive) -> None:
    staged = path.with_name(STAGED + path.name)
    staged.unlink(missing_ok=True)  # of one that was killed at it
    try:
        with guard("write", path), open(staged, "xb") as file:
            file.truncate(drive.size)
        words = tree.mke2fs(staged, label=drive.name[:16], journal=min(tree.JOURNAL, drive.size // _PART), growth=0)
        (await process.run(words, deadline=_DEADLINE, env=tree.ENVIRONMENT)).check(f"making drive {drive.name}")
        # Programs that want an empty directory for their data refuse one that has a lost+found.
        emptied = await process.run(["debugfs", "-w", "-R", "rmdir lost+found", str(staged)], deadline=_DEADLINE)
        emptied.check(f"making drive {drive.name}")
        await asyncio.to_thread(_publish, staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def _publish(staged: Path, path: Path) -> None:
    sync(staged)
    with guard("write", path):
        staged.chmod(0o400)  # what drives of many machines stand on: a mistake must not change it
        staged.rename(path)
    sync(path.parent)
