"""QEMU's command line: pure, one small function a device, golden-tested. Changing it changes what a memory snapshot fits."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from ramet import network
from ramet.model import Accelerator

QEMU = "qemu-system-x86_64"
AGENT_PORT = "ramet.agent"
# q35: `pc` describes its interrupt routing with a loop in AML that the guest interprets for 90 ms for each PCI device, under emulation.
_CHIPSET = "q35,smbus=off,sata=off,vmport=off,usb=off,i8042=off,memory-backend=mem"
# The translation cache of an emulated cpu: QEMU's default of 1 GiB a machine costs memory with many; 64 MiB cost nothing measurable (see kernel/README.md).
_TB_SIZE_MIB = 64


@dataclass(frozen=True, kw_only=True)
class Disk:
    """overlay: the machine's own qcow2, whose header names no backing file; base: the raw file it stands on; number: of the overlay, in nodes' names."""

    overlay: Path
    base: Path
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything QEMU is told.

    memory in bytes; qmp_fd and agent_fd: listening unix sockets that QEMU inherits; initrd None: none. memory_file: where the guest's memory comes from, mapped
    privately; a machine with one does not boot, it waits for its devices' state.
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
    disk: Disk | None = None
    memory_file: Path | None = None
    network: network.Network | None = None


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
        "-machine", _CHIPSET,
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


def overlay_name(number: int) -> str:
    """The name of an overlay's node."""
    return f"disk{number}"


def overlay_node(path: Path, number: int, backing: str | None) -> dict[str, object]:
    """A qcow2 overlay as a block node; what the guest discards or zeroes leaves the host's file. backing: the name of another node."""
    name = overlay_name(number)
    return {
        "driver": "qcow2",
        "node-name": name,
        "discard": "unmap",
        "detect-zeroes": "unmap",
        "backing": backing,
        "file": {"driver": "file", "node-name": f"{name}-file", "filename": str(path), "discard": "unmap"},
    }


def base_node(path: Path, number: int) -> dict[str, object]:
    """The raw file under an overlay, as a block node."""
    file = {"driver": "file", "filename": str(path), "read-only": True}
    return {"driver": "raw", "node-name": f"base{number}", "read-only": True, "file": file}


def _disk(disk: Disk) -> list[str]:
    base = base_node(disk.base, disk.number)
    overlay = overlay_node(disk.overlay, disk.number, str(base["node-name"]))
    return [
        "-object", "iothread,id=io", "-blockdev", json.dumps(base), "-blockdev", json.dumps(overlay),
        # The geometry is given, else QEMU reads the first sector to guess it: from a base that may only be about to exist.
        "-device", f"virtio-blk-pci,drive={overlay['node-name']},iothread=io,cyls=16383,heads=16,secs=63",
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
    """What a snapshot's device state fits, beyond QEMU's version: every device with its options, in order, but for the overlay's number."""
    words = build(dataclasses.replace(config, disk=Disk(overlay=Path(), base=Path()), memory_file=None))
    devices = [words[at + 1] for at, word in enumerate(words) if word == "-device"]
    return " ".join([_CHIPSET, str(config.cpus), str(config.memory), *devices])


def build(config: Config) -> list[str]:
    """The whole command line."""
    return [
        QEMU, "-name", f"ramet-{config.name}", "-nodefaults", "-no-user-config", "-display", "none",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        *_accelerator(config),
        *_machine(config),
        *_boot(config),
        *_console(),
        *(_monitor(config.qmp_fd) if config.qmp_fd is not None else []),
        *(_agent(config.agent_fd) if config.agent_fd is not None else []),
        *(_disk(config.disk) if config.disk else []),
        *(_network(config.network) if config.network else []),
        *_small(),
    ]  # fmt: skip
