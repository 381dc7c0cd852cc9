"""What a test may leave behind: processes, mounts, descriptors, network devices, cgroups, sockets, half-made files. A snapshot before, a comparison after.

Everything that the tests start carries TMPDIR=SCRATCH in its environment (`ramet.process` passes that on): a daemonised QEMU is told from a stranger's by it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ramet import locks, process
from ramet.paths import StateDir

PATIENCE = 120.0  # seconds that what is ending gets to end: a killed QEMU with its memory, on a busy host
_NAP = 0.05


@dataclass
class Scratch:
    """The directory below which a test session does everything, and the state directories in it. Those of other sessions are beside it."""

    root: Path
    states: list[StateDir] = field(default_factory=list)

    @property
    def prefix(self) -> str:
        """Of every path in it; without the last character it would be that of another session's too."""
        return f"{self.root}/"

    def add(self, state: StateDir) -> None:
        """A state directory; sessions beside this one hear of it."""
        self.states.append(state)
        with open(self.root / "states", "a") as file:
            file.write(f"{state.root}\n")

    def is_strangers(self, machine: str) -> bool:
        """Whether a machine is one of a session beside this one."""
        lists = [path for path in self.root.parent.glob("*/states") if path.parent != self.root]
        return any(Path(line, "machines", machine).exists() for path in lists for line in _read(str(path)).decode().splitlines())


@dataclass(frozen=True)
class Process:
    pid: int
    started: int
    command: str


Snapshot = dict[str, set[str]]


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _parent(pid: int) -> int:
    stat = _read(f"/proc/{pid}/stat").decode(errors="replace").rpartition(")")[2].split()
    return int(stat[1]) if len(stat) > 1 else 0


def _is_ours(pid: int, mark: bytes) -> bool:
    """By its environment or its command line: both stay when a process is daemonised."""
    return mark in _read(f"/proc/{pid}/environ") or mark in _read(f"/proc/{pid}/cmdline")


def _holds(pid: int, root: str) -> bool:
    with contextlib.suppress(OSError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if str(fd.readlink()).startswith(root):
                    return True
    return False


def descendants(of: int) -> set[int]:
    """The processes below one, by their parents."""
    found: set[int] = set()
    todo = [of]
    while todo:
        pid = todo.pop()
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            children = {int(word) for word in _read(str(task)).split()}
            todo += children - found
            found |= children
    return found


_WORKER = "ramet.store.imagefs"
_FETCHER = "ramet.store.fetcher"


def processes(scratch: Scratch, *, thorough: bool) -> dict[int, Process]:
    """Our descendants and, thoroughly, every process of the system that works in the scratch directory."""
    pids = descendants(os.getpid())
    if thorough:
        mark, root = os.fsencode(scratch.prefix), scratch.prefix
        everyone = {int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()} - {os.getpid()}
        pids |= {pid for pid in everyone - pids if _is_ours(pid, mark) or _holds(pid, root)}
        pids -= _ancestors()
    found = {}
    for pid in pids:
        if (started := process.start_time(pid)) is not None:
            command = _read(f"/proc/{pid}/cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
            if (_WORKER in command or _FETCHER in command) and _WORKER.encode() in _read(f"/proc/{_parent(pid)}/cmdline"):
                continue  # of the image file system: its keeper is looked at, and replaces them
            found[pid] = Process(pid, started, command[:200] or "?")
    return found


def _ancestors() -> set[int]:
    """Those above us: the shell that started pytest with TMPDIR set is not the tests' doing."""
    found = set()
    pid = os.getppid()
    while pid > 1:
        found.add(pid)
        pid = _parent(pid)
    return found


def _mounts(scratch: Scratch) -> set[str]:
    return {line for line in _read("/proc/self/mountinfo").decode(errors="replace").splitlines() if scratch.prefix in line}


def _fds() -> set[str]:
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(f"{fd.name} -> {fd.readlink()}")
    # An event loop's own; this listing's; SQLite's, which it opens and closes as its locks allow.
    return {each for each in found if not each.endswith(("[eventpoll]", f"/proc/{os.getpid()}/fd", "/ramet.db", "/ramet.db-wal"))}


def _networks(scratch: Scratch) -> set[str]:
    """Devices and namespaces of Ramet's, which are named after a process: not those of a stranger's that lives."""
    spaces = Path("/run/netns")
    found = {f"device {path.name}" for path in Path("/sys/class/net").glob("ramet*")}
    found |= {f"namespace {path.name}" for path in spaces.glob("ramet*")} if spaces.is_dir() else set()
    return {name for name in found if not _is_strangers(name, scratch)}


def _is_strangers(name: str, scratch: Scratch) -> bool:
    digits = name[len(name.rstrip("0123456789")) :]
    pid = int(digits or 0)
    return (
        bool(pid)
        and Path(f"/proc/{pid}").exists()
        and pid not in descendants(os.getpid())
        and not _is_ours(pid, os.fsencode(scratch.prefix))
    )


def _cgroups(scratch: Scratch, *, used: bool) -> set[str]:
    """Not those of sessions beside this one. used: also groups with a process in it, which is somebody's, and if that is ours, the process is named."""
    found = set()
    for group in [*Path("/sys/fs/cgroup").glob("ramet/*/cgroup.procs"), *Path("/sys/fs/cgroup").glob("*/ramet/*/cgroup.procs")]:
        with contextlib.suppress(OSError):
            if (used or not group.read_text().strip()) and not scratch.is_strangers(group.parent.name):
                found.add(str(group.parent))
    return found


def _unowned(state: StateDir) -> set[str]:
    """Files of a state directory that belong to no machine, no image and no running maker."""
    if not state.root.is_dir():
        return set()
    known: set[str] = set()
    if state.database.exists():
        with (
            contextlib.closing(sqlite3.connect(f"file:{state.database}?mode=ro", uri=True)) as database,
            contextlib.suppress(sqlite3.Error),
        ):
            known = {row[0] for row in database.execute("SELECT id FROM machines")}
    found = {str(path) for path in state.machines.glob("*") if path.name not in known}
    for path in state.machines.glob("*/*"):
        if path.suffix == ".new" or (path.suffix == ".sock" and not locks.is_held(path.parent / "lock")):
            found.add(str(path))
    found |= {str(path) for path in state.images.glob(".work-*") if not locks.is_held(path)}
    return found | {str(path) for path in state.root.glob("*.new")}


def snapshot(scratch: Scratch, *, thorough: bool, before: bool = False) -> Snapshot:
    """Everything there is now, by kind, in words. thorough: with what only tests that run machines can leave. before: with what others may leave."""
    found = {
        "process": {f"{p.pid} ({p.started}): {p.command}" for p in processes(scratch, thorough=thorough).values()},
        "descriptor": _fds(),
    }
    if thorough:
        found |= {
            "mount": _mounts(scratch),
            "network": _networks(scratch),
            "cgroup": _cgroups(scratch, used=before),
            "file": set().union(*map(_unowned, scratch.states)),
            "temporary file": {str(path) for path in (scratch.root / "tmp").iterdir()},
        }
    return found


def left(before: Snapshot, look: Callable[[], Snapshot]) -> list[str]:
    """What is there now and was not before, after what is ending has had time to end."""
    deadline = time.monotonic() + PATIENCE
    while True:
        now = look()
        new = [f"{kind}: {each}" for kind, all_now in now.items() for each in sorted(all_now - before.get(kind, set()))]
        if not new or time.monotonic() > deadline:
            return new
        time.sleep(_NAP)  # the end of strangers' processes, of the kernel's work on a cgroup: no event to wait for


def clean_up(scratch: Scratch, before: Snapshot, *, thorough: bool) -> None:
    """End the processes and unmount the mounts that a test left."""
    for each in processes(scratch, thorough=thorough).values():
        if f"{each.pid} ({each.started}): {each.command}" not in before["process"]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each.pid, signal.SIGKILL)
    for line in _mounts(scratch) - before.get("mount", set()) if thorough else ():
        subprocess.run(["umount", "-l", line.split()[4]], check=False)
