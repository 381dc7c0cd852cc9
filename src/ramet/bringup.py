"""The steps of bringing a machine up, each on its own: its disk, what QEMU is told, its limits, the commands that its spec and its image want run."""

from __future__ import annotations

import contextlib
import logging
import shutil
from pathlib import Path

from ramet import cgroup, commands, kernels, network, process
from ramet.errors import HostError, MachineFailedError
from ramet.guest import Guest
from ramet.host import Boot, Host
from ramet.model import Command, ImageConfig, InitMode, Spec, Started
from ramet.paths import MachineDir
from ramet.vm import argv
from ramet.vm import machine as vm

log = logging.getLogger("ramet")

HOOK_DEADLINE = 3600.0  # seconds for a lifecycle command: package installations are slow


async def overlay(base: Path, files: MachineDir, size: int) -> None:
    """The machine's own disk over its image: made aside, then renamed. The backing path is relative, so that the state directory can move."""
    made = files.disk.with_suffix(".new")
    relative = Path("../..") / base.relative_to(files.root.parent.parent)
    try:
        options = ["-f", "qcow2", "-b", str(relative), "-F", "raw", "-o", "cluster_size=64k,lazy_refcounts=on"]
        command = ["qemu-img", "create", "-q", *options, str(made), str(size)]
        (await process.run(command, deadline=60)).check("making the machine's disk")
        made.rename(files.disk)
    finally:
        made.unlink(missing_ok=True)


def config(wanted: Spec, boot: Boot, files: MachineDir, net: network.Network) -> argv.Config:
    """What QEMU and the guest's kernel are told."""
    accelerator = boot.probe.accelerator
    words = [
        kernels.cmdline(boot.kernel),
        *argv.kernel_words(accelerator),
        "ramet.root=/dev/vda",
        f"ramet.hostname={wanted.name}",
        *network.kernel_words(),
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
        disk=files.disk,
        network=net,
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


def remove_tree(path: Path) -> None:
    """Delete a directory and all in it. HostError when something in it cannot be."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise HostError(f"{path} cannot be removed: {error.strerror}", hint="Mend its permissions, then delete again.") from error
