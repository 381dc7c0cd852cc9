"""The steps of bringing a machine up, each on its own: its disk, what QEMU is told, its limits, the commands that its spec and its image want run."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import shutil
from pathlib import Path

from ramet import cgroup, commands, kernels, network
from ramet.errors import HostError, MachineFailedError
from ramet.guest import Guest
from ramet.host import Boot, Host
from ramet.model import Command, ImageConfig, InitMode, Spec, Started
from ramet.paths import MachineDir
from ramet.vm import argv
from ramet.vm import machine as vm

log = logging.getLogger("ramet")

HOOK_DEADLINE = 3600.0  # seconds for a lifecycle command: package installations are slow


def machine_id(record_id: str) -> str:
    """What the guest's /etc/machine-id says: the same at every boot of a machine, another in every fork."""
    return hashlib.sha256(f"ramet machine {record_id}".encode()).hexdigest()[:32]


def config(
    wanted: Spec,
    boot: Boot,
    net: network.Network,
    *,
    disks: tuple[argv.Disk, ...] = (),
    machine_id: str = "",
    memory_file: Path | None = None,
) -> argv.Config:
    """What QEMU and the guest's kernel are told.

    disks: none where nothing is to start, and only the devices are of interest. machine_id: of the guest, 32 hex digits. memory_file: of a snapshot, then
    nothing boots.
    """
    accelerator = boot.probe.accelerator
    words = [
        kernels.cmdline(boot.kernel),
        *argv.kernel_words(accelerator),
        "ramet.root=/dev/vda",
        f"ramet.hostname={wanted.name}",
        f"ramet.machine_id={machine_id}",
        *network.kernel_words(),
        *(f"ramet.drive={each.name}:{each.mount}" for each in sorted(wanted.drives, key=lambda each: each.mount)),  # outer ones first
    ]
    if wanted.init is InitMode.IMAGE:
        words.append("ramet.init=/sbin/init")
    return argv.Config(
        name=wanted.name,
        accelerator=accelerator,
        cpus=wanted.cpus,
        memory=wanted.memory,
        kernel=boot.kernel.image,
        initrd=boot.initrd,
        cmdline=" ".join(words),
        disks=disks or tuple(argv.Disk(name=name) for name in ("", *(each.name for each in wanted.drives))),
        memory_file=memory_file,
        network=net,
        mergeable=boot.mergeable,
    )


def limit(host: Host, machine_id: str, wanted: Spec, files: MachineDir) -> None:
    """Put the machine's processes under its limits; a host that refuses is reported, not fatal."""
    if host.cgroups.directories:
        try:
            cgroup.enter(host.cgroups, machine_id, wanted, list(vm.pids(files).values()))
        except OSError as error:
            log.warning("%s runs without cgroup limits: %s", wanted.name, error)


async def hook(guest: Guest, wanted: Spec, image: ImageConfig, name: str, script: str) -> None:
    """Run a lifecycle command; its failure is the operation's."""
    command = Command(argv=("sh", "-c", script), timeout=HOOK_DEADLINE, label=f"lifecycle.{name}")
    result = await commands.run(guest, commands.effective(wanted, image, command), b"")
    if result.status:
        text = (result.stderr or result.stdout).decode(errors="replace").strip()
        raise MachineFailedError(
            f"lifecycle.{name} ended with status {result.status}: {(text.splitlines() or ['no output'])[-1]}",
            hint="Mend it in the spec, then delete and create the machine again.",
            details={"log": text[-vm.TAIL :]},
        )


async def service(guest: Guest, wanted: Spec, image: ImageConfig) -> None:
    """Start the image's entrypoint in the background."""
    command = commands.effective(wanted, image, Command(argv=image.service, detach=True, label="entrypoint"))
    async with contextlib.aclosing(guest.execute(command).events()) as events:
        async for event in events:
            if isinstance(event, Started):
                return


async def clear(files: MachineDir) -> None:
    """End what lives in a machine's directory, and remove it, where there is one. HostError when something in it cannot be."""
    await vm.kill(files)
    if files.root.exists():
        await asyncio.to_thread(remove_tree, files.root)


def remove_tree(path: Path) -> None:
    """Delete a directory and all in it. HostError when something in it cannot be."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise HostError(f"{path} cannot be removed: {error.strerror}", hint="Mend its permissions, then delete again.") from error
