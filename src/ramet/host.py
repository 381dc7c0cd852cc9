"""What machines boot with on this host: QEMU, accelerator, kernel, agent, limits. Asked at every start, for a better kernel may have been built since."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from ramet import __version__, binaries, capacity, cgroup, kernels, network, process
from ramet.binaries import Binaries
from ramet.capacity import Room
from ramet.errors import HostError
from ramet.kernels import BuildState, Kernel, KernelKind
from ramet.model import HostInfo
from ramet.paths import StateDir
from ramet.pressure import HostSample
from ramet.vm import argv
from ramet.vm.argv import Aio, DiskIo
from ramet.vm.probe import Probe, probe

log = logging.getLogger("ramet")

MERGE = "RAMET_MERGE_MEMORY"
_MERGE_RISK = (
    f"memory merging: on ({MERGE}), between all machines of this daemon: a guest can find out, by how long a write takes, whether another "
    "machine's memory holds a page that it knows"
)
_KSM = Path("/sys/kernel/mm/ksm/run")
_DISK_IO = "RAMET_DISK_IO"


@dataclass(frozen=True, kw_only=True)
class Boot:
    """All that a machine's start needs from the host."""

    kernel: Kernel
    initrd: Path
    binaries: Binaries
    probe: Probe
    disk_io: DiskIo
    mergeable: bool


class Host:
    """This computer. Constructing it looks at nothing."""

    def __init__(self, state: StateDir) -> None:
        self.state = state
        self.network = network.USER
        self.cgroups = cgroup.Support(directories={}, unified=False, reason="not looked at yet")
        self.cpu = ""
        self.overcommit = capacity.OVERCOMMIT
        self._qemu = ""
        self._boot: Boot | None = None
        self._lock = asyncio.Lock()

    async def open(self) -> None:
        """Look once at what does not change while the daemon runs."""
        self.overcommit = capacity.overcommit(os.environ)
        self.cgroups = await asyncio.to_thread(cgroup.detect)
        self.cpu = _cpu_model()
        for line in _merging():
            log.warning("%s", line)

    async def qemu(self) -> str:
        """QEMU's version line."""
        if not self._qemu:
            text = await process.output([argv.QEMU, "--version"], deadline=30, what="asking QEMU for its version")
            self._qemu = text.splitlines()[0].removeprefix("QEMU emulator version ")
        return self._qemu

    async def qemu_version(self) -> str:
        """QEMU's version without the distribution's: `7.2.22`."""
        return (await self.qemu()).split()[0]

    async def boot(self, *, fresh: bool = True) -> Boot:
        """What to boot now, made or fetched where it is missing. HostError says what the host lacks.

        fresh: ask anew, for a better kernel may have been built since. A start from a snapshot boots no kernel, and has no time to ask.
        """
        if self._boot and not fresh and self._boot.binaries.shim.exists():
            return self._boot
        async with self._lock:  # the first two machines of a fresh host must not do it twice
            kernel = await kernels.current()
            built = await binaries.ensure()
            initrd = await asyncio.to_thread(kernels.initramfs, kernel, built.agent)
            found = await probe(self.state.kvm, kernel, await self.qemu())
            self._boot = Boot(
                kernel=kernel, initrd=initrd, binaries=built, probe=found, disk_io=_disk_io(found), mergeable=os.environ.get(MERGE) == "1"
            )
            return self._boot

    def room(self) -> Room:
        """What machines may have of the memory."""
        memory = _meminfo()
        return Room(total=memory["MemTotal"], available=memory["MemAvailable"], overcommit=self.overcommit)

    async def info(self, machines: int, running: int, parked: int, committed: int) -> HostInfo:
        """The host for people. Asks, but builds nothing beyond what a start would."""
        boot = await self.boot()
        room = self.room()
        limits = list(self.network.limits)
        if self.cgroups.reason:
            limits.append(f"cgroup limits: none, {self.cgroups.reason}")
        if boot.kernel.kind is KernelKind.DEBIAN:
            limits.append("kernel: Debian's, until ours is built: no DAMON, no VMGENID, slower boots")
        if boot.probe.uring:
            limits.append(f"disks: threads of QEMU read and write them instead of io_uring: {boot.probe.uring}")
        limits += _merging()
        return HostInfo(
            version=__version__,
            accelerator=boot.probe.accelerator,
            accelerator_reason=boot.probe.reason,
            kernel=boot.kernel.version,
            kernel_kind=boot.kernel.kind,
            kernel_build=await _build_words(),
            qemu=await self.qemu(),
            cpus=os.cpu_count() or 1,
            memory=room.total,
            memory_available=room.available,
            memory_committed=committed,
            memory_capacity=room.promisable,
            overcommit=room.overcommit,
            disk_available=shutil.disk_usage(self.state.root).free,
            machines=machines,
            running=running,
            parked=parked,
            network=self.network.name,
            state_dir=str(self.state.root),
            limits=tuple(limits),
        )


def _disk_io(found: Probe) -> DiskIo:
    """How disks are read and written here: io_uring, where it works, and the host's page cache.

    Measured with fio in an emulated guest on a busy host (`ramet bench disk --all`): io_uring 476 MiB/s written in a row and 4.3 GiB/s read, 846 flushed
    writes a second; threads 251, 3.3 and 863. Past the page cache a row was read at 0.4 to 0.7 GiB/s, whatever the way, and flushed writes were no quicker;
    nor could machines share what they read.
    """
    if wanted := os.environ.get(_DISK_IO):
        try:
            return DiskIo.parse(wanted)
        except ValueError:
            raise HostError(f"{_DISK_IO} is {wanted!r}", hint="Set it to threads, native or io_uring, with or without `,direct`.") from None
    return DiskIo(aio=Aio.THREADS if found.uring else Aio.URING)


def _merging() -> list[str]:
    """What to say about merging equal pages of machines, which an administrator asks for by an environment variable of the daemon."""
    if os.environ.get(MERGE) != "1":
        return []
    try:
        runs = _KSM.read_text().strip() == "1"
    except OSError:
        return [_MERGE_RISK, "memory merging: this host's kernel has no KSM, so nothing is merged"]
    idle = f"memory merging: KSM does not run, so nothing is merged; `echo 1 > {_KSM}` as root starts it"
    return [_MERGE_RISK] if runs else [_MERGE_RISK, idle]


def sample(pressure: Path = Path("/proc/pressure/memory")) -> HostSample:
    """The host's memory now."""
    memory = _meminfo()
    return HostSample(at=time.monotonic(), total=memory["MemTotal"], available=memory["MemAvailable"], stalled=_stalled(pressure))


def _stalled(path: Path) -> float:
    """Per cent; 0 where the kernel does not tell. The line: `some avg10=1.53 avg60=0.87 avg300=0.15 total=123`."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in path.read_text().splitlines():
            name, _, rest = line.partition(" avg10=")
            if name == "some":
                return float(rest.split()[0])
    return 0.0


async def _build_words() -> str:
    """How the build of our own kernel stands, for people."""
    try:
        status = await kernels.build_status()
    except HostError as error:
        return f"not possible: {error.message}"
    return f"being built, {status.fraction:.0%}" if status.state is BuildState.RUNNING else str(status.state)


def _cpu_model() -> str:
    """The processor's name; an emulated guest too reads its cycle counter, so that a snapshot's clock would run wrong on another."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == "model name":
            return rest.strip()
    return platform.machine()


def _meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes."""
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0]) << 10
    if "MemAvailable" not in found:
        raise HostError("/proc/meminfo has no MemAvailable")
    return found
