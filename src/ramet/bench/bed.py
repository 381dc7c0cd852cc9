"""What benches stand on: an engine of their own in a directory that goes away, and what the host was doing meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from ramet.engine import Engine
from ramet.errors import NotFoundError
from ramet.host import Boot, Host
from ramet.model import HostInfo, Spec
from ramet.paths import StateDir

IDLE = 0.05  # share of the host's cpus that others may take while a host still counts as idle


@dataclass(frozen=True, kw_only=True)
class Bed:
    """state: of this run only; boot: what its machines boot with."""

    state: StateDir
    engine: Engine
    boot: Boot
    info: HostInfo

    @property
    def header(self) -> str:
        """On what it was measured."""
        own = "" if self.info.kernel_kind == "own" else "Debian's "
        return (
            f"On {self.info.accelerator.words}, {self.info.cpus} cores, guest kernel {own}{self.info.kernel}, QEMU {self.info.qemu}, "
            f"Ramet {self.info.version}."
        )


@contextlib.asynccontextmanager
async def place(images: Path | None = None) -> AsyncIterator[StateDir]:
    """A state directory with the user's images, or those of another directory, and nothing else of theirs. It goes away, and the machines, snapshots
    and layers in it."""
    home = StateDir.default()
    home.create()
    with tempfile.TemporaryDirectory(prefix="ramet-bench-") as directory:
        state = StateDir(root=Path(directory))
        state.images.symlink_to(images or home.images)
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(home.kvm, state.kvm)
        try:
            yield state
        finally:
            async with Engine.open(state) as engine:
                await _clear(engine)


async def _clear(engine: Engine) -> None:
    """Delete all machines and snapshots, and with those what is parked for them."""
    for snapshot in await engine.snapshots():
        with contextlib.suppress(NotFoundError):  # it went with one that it stood on
            await engine.delete_snapshot(snapshot.id, cascade=True)
    for machine in await engine.list():
        await engine.delete(machine.name)


@contextlib.asynccontextmanager
async def opened(state: StateDir) -> AsyncIterator[Bed]:
    """An engine in this process, on it."""
    async with Engine.open(state) as engine:
        yield Bed(state=state, engine=engine, boot=await Host(state).boot(), info=await engine.info())


def spec(name: str, image: str) -> Spec:
    """The machine that is measured: the default one."""
    return Spec(name=name, image=image)


class Others:
    """How much cpu processes that are not ours took since this was made."""

    def __init__(self, pids: tuple[int, ...]) -> None:
        self._pids = (os.getpid(), *pids)
        self._began = time.monotonic()
        self._busy = self._all() - self._ours()

    def spent(self, seconds: float) -> None:
        """Cpu time of a process that is ours and is not looked at by its pid."""
        self._busy += seconds

    def _all(self) -> float:
        fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for disks

    def _ours(self) -> float:
        total = 0.0
        for pid in self._pids:
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        return total

    def share(self) -> float:
        """Of all the host's cpus, 0 to 1."""
        passed = max(time.monotonic() - self._began, 1e-9) * (os.cpu_count() or 1)
        return max(0.0, (self._all() - self._ours() - self._busy) / passed)


def idleness(share: float) -> str:
    """What to say of a host on which others took this share of the cpus."""
    return (
        ""
        if share <= IDLE
        else f"The host was not idle: other processes took {share:.0%} of its cpus, and every time here is longer for it."
    )
