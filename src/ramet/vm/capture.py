"""One instant of a running machine, caught: its devices, its private memory, and its disk, which from then on is an overlay's base.

The order is what makes it one instant: the agent is silent, the cpus stand still, and only then is anything looked at. Nothing is compressed or hashed here:
every millisecond of this is one that the machine stands still.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from ramet.errors import HostError, MachineFailedError, NoSpaceError, RametError
from ramet.identity import Identity
from ramet.vm import argv, memory
from ramet.vm.machine import Vm

_LITTLE = 1 << 20  # bytes: more than the state of all devices
QUIESCE_DEADLINE = 30.0  # seconds for the agent to finish its frame: an emulated guest of a busy host


@dataclass(kw_only=True)
class Capture:
    """What to catch, and what was caught.

    number, next_overlay: the overlay that the machine has, and the file of the one that it gets. state: the file for the devices' state, None: the disk only.
    base: host address of the guest's memory; size: its bytes. spans: pages that were written since the machine's start (first, count);
    frozen: the overlay was changed. pause: seconds that the machine stood still.
    """

    number: int
    next_overlay: Path
    state: Path | None = None
    size: int = 0
    base: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)
    copied: int = 0
    frozen: bool = False
    pause: float = 0.0


async def ram_address(vm: Vm) -> int:
    """Where QEMU's process has the guest's memory (all of it is one mapping; the guest's address 0 is its first byte)."""
    answer = str(await vm.monitor("human-monitor-command", **{"command-line": "gpa2hva 0"}))
    with contextlib.suppress(ValueError):
        return int(answer.rpartition(" ")[2].strip(), 16)
    raise MachineFailedError(f"QEMU does not tell where its memory is: {answer.strip()}")


async def prepare(vm: Vm, wanted: Capture) -> None:
    """What can be done while the machine still runs."""
    if wanted.state:
        wanted.base = await ram_address(vm)
    await discard(vm, wanted)  # of a save that was cut off
    await vm.monitor("blockdev-add", **argv.overlay_node(wanted.next_overlay, wanted.number + 1, None))


async def discard(vm: Vm, wanted: Capture) -> None:
    """Undo `prepare`, where the overlay was not changed."""
    with contextlib.suppress(RametError):
        await vm.monitor("blockdev-del", **{"node-name": argv.overlay_name(wanted.number + 1)})


@dataclass
class Still:
    """A machine that stands still. go_on: whether it goes on afterwards; after an error it does in any case."""

    go_on: bool = True
    pause: float = 0.0


@contextlib.asynccontextmanager
async def still(vm: Vm, step: Callable[[str], None]) -> AsyncIterator[Still]:
    """The machine stands still in the body, its agent between two frames. One that is paused already stays so."""
    was_running = await vm.running()
    state = Still()
    step("pausing")
    if was_running:
        await vm.guest.quiesce(QUIESCE_DEADLINE)
    began = time.monotonic()
    failed = True
    try:
        if was_running:
            await vm.monitor("stop")
        yield state
        failed = False
    finally:
        if was_running and (failed or state.go_on):
            step("going on")
            await vm.monitor("cont")
            state.pause = time.monotonic() - began
            await vm.guest.resume()
            await vm.guest.identify(Identity.clock())  # its clock stood still too, and would be behind by every save's pause


async def catch(vm: Vm, wanted: Capture, spool: int | None, step: Callable[[str], None]) -> None:
    """In a machine that stands still. spool: an open file for the private pages, one after the other; None: only find them."""
    if wanted.state:
        step("saving the devices")
        try:
            await vm.monitor("xen-save-devices-state", filename=str(wanted.state), live=False)
        except MachineFailedError as error:
            if shutil.disk_usage(wanted.state.parent).free < _LITTLE:  # QEMU only says that it could not write
                raise disk_error("the devices' state cannot be saved", OSError(errno.ENOSPC, "")) from error
            raise
    step("freezing the disk")
    await vm.monitor("blockdev-snapshot", node=argv.overlay_name(wanted.number), overlay=argv.overlay_name(wanted.number + 1))
    wanted.frozen = True
    if wanted.state:
        step("copying memory")
        try:
            wanted.spans = await asyncio.to_thread(memory.private, vm.pid, wanted.base, wanted.size)
            if spool is not None:
                wanted.copied = await asyncio.to_thread(memory.copy, vm.pid, wanted.base, wanted.spans, spool)
        except OSError as error:
            raise disk_error("the machine's memory cannot be saved", error) from error


def disk_error(what: str, error: OSError) -> HostError:
    """The error for a failed read or write; a full disk is told apart."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(f"{what}: no space left on the disk", hint="Free some space (`df -h`) and try again.")
    return HostError(f"{what}: {os.strerror(error.errno or 0)}", hint="The host's kernel log may say more.")


async def capture(vm: Vm, wanted: Capture, spool: int | None, step: Callable[[str], None]) -> None:
    """Catch the instant and let the machine go on. Where it fails after the disk was frozen, `wanted.frozen` tells."""
    await prepare(vm, wanted)
    try:
        async with still(vm, step) as stillness:
            await catch(vm, wanted, spool, step)
        wanted.pause = stillness.pause
    finally:
        if not wanted.frozen:
            await discard(vm, wanted)


async def rebase(vm: Vm, number: int, base: Path) -> None:
    """Put the overlay over one raw file with the content of all that is below it, and let go of what was: a chain that grew with each save would slow down."""
    name = argv.overlay_name(number)
    below = argv.base_node(base, number)
    await vm.monitor("blockdev-add", **below)
    options = argv.overlay_node(Path(), number, str(below["node-name"])) | {"file": f"{name}-file"}
    await vm.monitor("blockdev-reopen", options=[options])
    for node in (argv.overlay_name(number - 1), f"base{number - 1}"):
        with contextlib.suppress(RametError):
            await vm.monitor("blockdev-del", **{"node-name": node})


async def active_overlay(vm: Vm) -> int | None:
    """The number of the overlay that the machine writes to."""
    for device in await vm.monitor("query-block"):
        name = str((device.get("inserted") or {}).get("node-name", ""))
        if name.startswith("disk") and name[4:].isdecimal():
            return int(name[4:])
    return None
