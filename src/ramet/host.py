"""What machines boot with on this host: QEMU, accelerator, kernel, agent, limits. Asked at every start, for a better kernel may have been built since."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from ramet import __version__, binaries, cgroup, kernels, network, process
from ramet.binaries import Binaries
from ramet.errors import HostError
from ramet.kernels import BuildState, Kernel, KernelKind
from ramet.model import HostInfo
from ramet.paths import StateDir
from ramet.vm import argv
from ramet.vm.probe import Probe, probe


@dataclass(frozen=True, kw_only=True)
class Boot:
    """All that a machine's start needs from the host."""

    kernel: Kernel
    initrd: Path
    binaries: Binaries
    probe: Probe


class Host:
    """This computer. Constructing it looks at nothing."""

    def __init__(self, state: StateDir) -> None:
        self.state = state
        self.network = network.USER
        self.cgroups = cgroup.Support(directories={}, unified=False, reason="not looked at yet")
        self.cpu = ""
        self._qemu = ""
        self._boot: Boot | None = None
        self._lock = asyncio.Lock()

    async def open(self) -> None:
        """Look once at what does not change while the daemon runs."""
        self.cgroups = await asyncio.to_thread(cgroup.detect)
        self.cpu = _cpu_model()

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
            self._boot = Boot(kernel=kernel, initrd=initrd, binaries=built, probe=found)
            return self._boot

    async def info(self, machines: int, running: int, parked: int) -> HostInfo:
        """The host for people. Asks, but builds nothing beyond what a start would."""
        boot = await self.boot()
        memory = _meminfo()
        limits = list(self.network.limits)
        if self.cgroups.reason:
            limits.append(f"cgroup limits: none, {self.cgroups.reason}")
        if boot.kernel.kind is KernelKind.DEBIAN:
            limits.append("kernel: Debian's, until ours is built: no DAMON, no VMGENID, slower boots")
        return HostInfo(
            version=__version__,
            accelerator=boot.probe.accelerator,
            accelerator_reason=boot.probe.reason,
            kernel=boot.kernel.version,
            kernel_kind=boot.kernel.kind,
            kernel_build=await _build_words(),
            qemu=await self.qemu(),
            cpus=os.cpu_count() or 1,
            memory=memory["MemTotal"],
            memory_available=memory["MemAvailable"],
            disk_available=shutil.disk_usage(self.state.root).free,
            machines=machines,
            running=running,
            parked=parked,
            network=self.network.name,
            state_dir=str(self.state.root),
            limits=tuple(limits),
        )


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
