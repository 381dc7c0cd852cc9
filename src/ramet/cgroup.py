"""A cgroup for each machine's processes, where we are root: the guest cannot make QEMU take more of the host than the spec says.

Version 2, and version 1 where hosts still have it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from pathlib import Path

from ramet.model import Spec

_ROOT = Path("/sys/fs/cgroup")
_PARENT = "ramet"
# Beyond the guest's memory: QEMU's own heap and translation cache (40 to 110 MiB measured under emulation), its threads' stacks,
# and page cache of the overlay that is charged to it.
OVERHEAD = 512 << 20
PIDS = 128  # QEMU's threads: one a cpu, its io threads, at most 64 in the block layer's pool
_PERIOD = 100_000  # microseconds, the kernel's default


@dataclass(frozen=True, kw_only=True)
class Support:
    """Where groups are made: controller -> directory (version 1), or one directory for all (version 2). Empty: none can be made, `reason` says why."""

    directories: dict[str, Path]
    unified: bool
    reason: str = ""


def detect(root: Path = _ROOT) -> Support:
    """Which cgroup version manages memory here, and whether we may make groups in it."""
    controllers = root / "cgroup.controllers"
    with contextlib.suppress(OSError):
        if "memory" in controllers.read_text().split():
            return _usable(Support(directories={"all": root / _PARENT}, unified=True))
    found = {name: root / name / _PARENT for name in ("memory", "cpu", "pids") if (root / name / "tasks").exists()}
    if "memory" in found:
        return _usable(Support(directories=found, unified=False))
    return Support(directories={}, unified=False, reason="this host has no memory cgroup")


def _usable(support: Support) -> Support:
    try:
        for directory in support.directories.values():
            directory.mkdir(exist_ok=True)
            if not os.access(directory, os.W_OK):  # made by root, once
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
            if support.unified:
                (directory.parent / "cgroup.subtree_control").write_text("+memory +cpu +pids")
                (directory / "cgroup.subtree_control").write_text("+memory +cpu +pids")
    except OSError as error:
        return Support(
            directories={},
            unified=support.unified,
            reason=f"cgroups cannot be made ({error.strerror}): run the daemon as root, or have it delegated",
        )
    return support


def limits(spec: Spec, unified: bool) -> dict[str, tuple[str, str]]:
    """File -> (controller, value), for a machine's group."""
    memory = str(spec.memory + OVERHEAD)
    cpu = (spec.cpus + 1) * _PERIOD  # one more than the guest has: io threads and the main loop
    if unified:
        return {
            "memory.max": ("all", memory),
            "cpu.max": ("all", f"{cpu} {_PERIOD}"),
            "pids.max": ("all", str(PIDS)),
            "memory.oom.group": ("all", "1"),
        }
    return {"memory.limit_in_bytes": ("memory", memory), "cpu.cfs_quota_us": ("cpu", str(cpu)), "pids.max": ("pids", str(PIDS))}


def enter(support: Support, machine_id: str, spec: Spec, pids: list[int]) -> None:
    """Make the machine's group, set its limits, move the processes in. OSError when the host refuses."""
    groups = {name: directory / machine_id for name, directory in support.directories.items()}
    for group in groups.values():
        group.mkdir(exist_ok=True)
    for file, (controller, value) in limits(spec, support.unified).items():
        if controller in groups:
            (groups[controller] / file).write_text(value)
    for group in groups.values():
        for pid in pids:
            (group / "cgroup.procs").write_text(str(pid))


def remove(support: Support, machine_id: str) -> None:
    """Remove the machine's group; it must be empty."""
    for directory in support.directories.values():
        with contextlib.suppress(FileNotFoundError):
            (directory / machine_id).rmdir()
