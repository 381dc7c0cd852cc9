"""QEMU's command line: pure, one small function a device, golden-tested. Changing it changes what a memory snapshot fits."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ramet import network
from ramet.model import Accelerator

QEMU = "qemu-system-x86_64"
AGENT_PORT = "ramet.agent"
# q35: `pc` describes its interrupt routing with a loop in AML that the guest interprets for 90 ms for each PCI device, under emulation.
_CHIPSET = "q35,smbus=off,sata=off,vmport=off,usb=off,i8042=off,memory-backend=mem"
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
# The translation cache of an emulated cpu: QEMU's default of 1 GiB a machine costs memory with many; 64 MiB cost nothing measurable (see kernel/README.md).
_TB_SIZE_MIB = 64


class Aio(StrEnum):
    """How QEMU asks the host's kernel to read and write. native works past the page cache only."""

    THREADS = "threads"
    NATIVE = "native"
    URING = "io_uring"


@dataclass(frozen=True, kw_only=True)
class DiskIo:
    """How a machine's overlay is read and written. direct: past the host's page cache.

    Whatever it is, a flush of the guest becomes an fdatasync of the host's file: that is QEMU's default, and no option here turns it off. So what
    the guest flushed survives QEMU's death (in the host's page cache) and the host's (on its disk).
    """

    aio: Aio = Aio.THREADS
    direct: bool = False

    def __str__(self) -> str:
        return f"{self.aio},direct" if self.direct else str(self.aio)

    @classmethod
    def parse(cls, text: str) -> DiskIo:
        """`threads`, `native`, `io_uring`, with or without `,direct`. ValueError for anything else."""
        aio, comma, rest = text.partition(",")
        if comma and rest != "direct":
            raise ValueError(text)
        return cls(aio=Aio(aio), direct=bool(comma) or aio == Aio.NATIVE)


PLAIN = DiskIo()  # what QEMU does when it is told nothing


@dataclass(frozen=True, kw_only=True)
class Disk:
    """overlay: the machine's own qcow2, whose header names no backing file; base: the raw file it stands on, None: zeros; number: of the overlay, in nodes'
    names. name: of a drive; the root disk has none.
    """

    overlay: Path = Path()
    base: Path | None = None
    name: str = ""
    number: int = 0
    io: DiskIo = PLAIN


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything QEMU is told.

    memory in bytes; disks: the root disk first, which is the guest's /dev/vda, then the drives; qmp_fd and agent_fd: listening unix sockets that QEMU inherits;
    initrd None: none. memory_file: where the guest's memory comes from, mapped privately; a machine with one does not boot, it waits for its devices'
    state. mergeable: the host may merge pages of its memory that are the same as those of other machines (KSM). The guest cannot tell, so a snapshot fits
    either.
    """

    name: str
    accelerator: Accelerator
    cpus: int
    memory: int
    kernel: Path
    initrd: Path | None
    cmdline: str
    qmp_fd: int | None = None
    agent_fd: int | None = None
    disks: tuple[Disk, ...] = ()
    memory_file: Path | None = None
    network: network.Network | None = None
    mergeable: bool = False


def _accelerator(config: Config) -> list[str]:
    if config.accelerator is Accelerator.KVM:
        return ["-accel", "kvm", "-cpu", "host"]
    # One thread for each virtual cpu only where there are several: the single-threaded loop is cheaper for one.
    thread = "multi" if config.cpus > 1 else "single"
    # erms: QEMU emulates `rep movsb` byte by byte, and clearing memory takes ten times as long. mpx, pku: nothing uses them, and they
    # make the state three times as large that each switch of threads saves. kernel/README.md has the figures.
    return ["-accel", f"tcg,thread={thread},tb-size={_TB_SIZE_MIB}", "-cpu", "max,erms=off,mpx=off,pku=off"]


def kernel_words(accelerator: Accelerator) -> list[str]:
    """What the guest's kernel is told because of the accelerator.

    Under emulation QEMU 7.2 keys its translations by virtual address: with addresses randomized, the C library is translated anew for each
    process. A dynamically linked `true` then took 32 ms of cpu instead of 9.5 (measured on a busy host). With KVM the guest randomizes as ever.
    """
    return ["norandmaps"] if accelerator is Accelerator.TCG else []


def shim_words(accelerator: Accelerator) -> list[str]:
    """What the shim is told. An emulated machine gains nothing from huge pages of the host: without, a cold-booted one took 103 MB instead of 116,
    a fork after its first command 37 instead of 41, in the same time. With KVM they make the guest's page tables shorter."""
    return ["--small-pages"] if accelerator is Accelerator.TCG else []


def _machine(config: Config) -> list[str]:
    mebibytes = config.memory >> 20
    backend: dict[str, object] = {"qom-type": "memory-backend-ram", "id": "mem", "size": config.memory}
    if config.memory_file:
        # Private: what the guest writes is its own, what it only reads it shares with all that map the same file.
        backend |= {"qom-type": "memory-backend-file", "mem-path": str(config.memory_file), "share": False}
    return [
        # Said in both cases, for QEMU's own default is to let memory be merged.
        "-machine", f"{_CHIPSET},mem-merge={'on' if config.mergeable else 'off'}",
        "-smp", str(config.cpus),
        "-m", f"{mebibytes}M",
        "-object", json.dumps(backend),
        "-rtc", "base=utc",
        # The devices' state is loaded without the section that names the machine: `xen-save-devices-state` writes none.
        "-global", "migration.send-configuration=off",
    ]  # fmt: skip


def _boot(config: Config) -> list[str]:
    if config.memory_file:
        return ["-incoming", "defer", "-S", "-no-reboot"]  # the kernel is in the memory; QEMU would only hold a copy of its file
    initrd = ["-initrd", str(config.initrd)] if config.initrd else []
    return ["-kernel", str(config.kernel), *initrd, "-append", config.cmdline, "-no-reboot"]


def _console() -> list[str]:
    """The serial console goes to stdout, which the shim keeps in a log of limited size."""
    return ["-chardev", "file,id=console,path=/dev/stdout", "-serial", "chardev:console"]


def _monitor(fd: int) -> list[str]:
    return ["-chardev", f"socket,id=qmp,fd={fd},server=on,wait=off", "-mon", "chardev=qmp,mode=control"]


def _agent(fd: int) -> list[str]:
    return [
        "-chardev", f"socket,id=agent,fd={fd},server=on,wait=off",
        "-device", "virtio-serial-pci,id=serial,max_ports=2",
        "-device", f"virtserialport,id=agent,chardev=agent,name={AGENT_PORT}",
    ]  # fmt: skip


def overlay_name(at: int, number: int) -> str:
    """The name of an overlay's node, of at most 31 characters. at: the disk's place among the machine's, 0: the root."""
    return f"drive{at}-{number}" if at else f"disk{number}"


def base_name(at: int, number: int) -> str:
    """The name of the node below it."""
    return f"drive{at}-base{number}" if at else f"base{number}"


def overlay_number(name: str) -> tuple[int, int] | None:
    """The disk's place, and the number of its overlay, whose node has the name; None: it is no overlay's."""
    found = re.fullmatch("(?:disk|drive([1-9][0-9]*)-)([0-9]+)", name)
    return (int(found[1] or 0), int(found[2])) if found else None


def _file(path: Path, io: DiskIo, **options: object) -> dict[str, object]:
    """A file of the host. Words that say what is QEMU's default are left out."""
    file: dict[str, object] = {"driver": "file", **options, "filename": str(path)}
    if io.aio is not Aio.THREADS:
        file["aio"] = str(io.aio)
    if io.direct:
        file["cache"] = {"direct": True}
    return file


def overlay_node(at: int, disk: Disk, backing: str | None) -> dict[str, object]:
    """A qcow2 overlay as a block node; what the guest discards or zeroes leaves the host's file. backing: the name of another node."""
    name = overlay_name(at, disk.number)
    return {
        "driver": "qcow2",
        "node-name": name,
        "discard": "unmap",
        "detect-zeroes": "unmap",
        "backing": backing,
        "file": _file(disk.overlay, disk.io, **{"node-name": f"{name}-file"}) | {"discard": "unmap"},
    }


def base_node(at: int, disk: Disk, base: Path) -> dict[str, object]:
    """The raw file under an overlay, as a block node: always through the page cache, where others read the same."""
    cached = DiskIo(aio=Aio.THREADS if disk.io.aio is Aio.NATIVE else disk.io.aio)
    file = _file(base, cached) | {"read-only": True}
    return {"driver": "raw", "node-name": base_name(at, disk.number), "read-only": True, "file": file}


def _disk(at: int, disk: Disk) -> list[str]:
    """A thread serves each disk, so that none waits for another's."""
    thread, serial = (f"io-{disk.name}", f",serial={disk.name}") if disk.name else ("io", "")
    below = base_node(at, disk, disk.base) if disk.base else None
    overlay = overlay_node(at, disk, base_name(at, disk.number) if below else None)
    return [
        "-object", f"iothread,id={thread}", *(("-blockdev", json.dumps(below)) if below else ()), "-blockdev", json.dumps(overlay),
        # The geometry is given, else QEMU reads the first sector to guess it: from a base that may only be about to exist.
        "-device", f"virtio-blk-pci,drive={overlay['node-name']},iothread={thread}{serial},cyls=16383,heads=16,secs=63",
    ]  # fmt: skip


def _network(net: network.Network) -> list[str]:
    # romfile: without a boot ROM there is nothing to boot from the network, and 60 ms less firmware
    return ["-netdev", net.netdev, "-device", f"virtio-net-pci,netdev=net,mac={network.MAC},romfile="]


def _small() -> list[str]:
    return [
        "-object", "rng-builtin,id=entropy", "-device", "virtio-rng-pci,rng=entropy",
        "-device", "virtio-balloon-pci,free-page-reporting=on,deflate-on-oom=on",
        "-device", "vmgenid,guid=auto",  # another in each QEMU: the guest's kernel sees that it was copied, before any of its programs runs
    ]  # fmt: skip


def machine_type(config: Config) -> str:
    """What a snapshot's device state fits, beyond QEMU's version: every device with its options, in order, but for the overlays' numbers."""
    disks = tuple(Disk(name=each.name) for each in config.disks)
    words = build(dataclasses.replace(config, disks=disks, memory_file=None))
    devices = [words[at + 1] for at, word in enumerate(words) if word == "-device"]
    return " ".join([_CHIPSET, str(config.cpus), str(config.memory), *devices])


def build(config: Config) -> list[str]:
    """The whole command line."""
    return [
        QEMU, "-name", f"ramet-{config.name}", "-nodefaults", "-no-user-config", "-display", "none",
        "-sandbox", SANDBOX,
        *_accelerator(config),
        *_machine(config),
        *_boot(config),
        *_console(),
        *(_monitor(config.qmp_fd) if config.qmp_fd is not None else []),
        *(_agent(config.agent_fd) if config.agent_fd is not None else []),
        *(word for at, disk in enumerate(config.disks) for word in _disk(at, disk)),
        *(_network(config.network) if config.network else []),
        *_small(),
    ]  # fmt: skip
