"""One instant of a running machine, caught: its devices, its private memory, and its disk, which from then on is an overlay's base.

The order is what makes it one instant: the agent is silent, the cpus stand still, and only then is anything looked at. Nothing is compressed or hashed here:
every millisecond of this is one that the machine stands still.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from ramet.errors import MachineFailedError, NoSpaceError, RametError
from ramet.identity import Identity
from ramet.store import disk
from ramet.vm import argv, memory
from ramet.vm.machine import Vm

_LITTLE = 1 << 20  # bytes: more than the state of all devices
QUIESCE_DEADLINE = 30.0  # seconds for the agent to finish its frame: an emulated guest of a busy host


@dataclass(kw_only=True)
class Capture:
    """What to catch, and what was caught.

    overlays: those that the machine gets, each in place of the one before it; in the order of its disks.
    state: the file for the devices' state, None: the disk only.
    base: host address of the guest's memory; size: its bytes. spans: pages that were written since the machine's start (first, count);
    frozen: the overlay was changed. pause: seconds that the machine stood still.
    """

    overlays: tuple[argv.Disk, ...]
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
    for at, overlay in enumerate(wanted.overlays):
        await vm.monitor("blockdev-add", **argv.overlay_node(at, overlay, None))


async def discard(vm: Vm, wanted: Capture) -> None:
    """Undo `prepare`, where the overlays were not changed."""
    for at, overlay in enumerate(wanted.overlays):
        with contextlib.suppress(RametError):
            await vm.monitor("blockdev-del", **{"node-name": argv.overlay_name(at, overlay.number)})


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
                raise NoSpaceError("the devices' state cannot be saved: no space left on the disk") from error
            raise
    step("freezing the disk")
    changes = [
        {"node": argv.overlay_name(at, overlay.number - 1), "overlay": argv.overlay_name(at, overlay.number)}
        for at, overlay in enumerate(wanted.overlays)
    ]
    await vm.monitor("transaction", actions=[{"type": "blockdev-snapshot", "data": each} for each in changes])  # all of them, or none
    wanted.frozen = True
    if wanted.state:
        step("copying memory")
        try:
            wanted.spans = await asyncio.to_thread(memory.private, vm.pid, wanted.base, wanted.size)
            if spool is not None:
                wanted.copied = await asyncio.to_thread(memory.copy, vm.pid, wanted.base, wanted.spans, spool)
        except OSError as error:
            raise disk.failure("the machine's memory cannot be saved", error) from error


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


async def rebase(vm: Vm, at: int, overlay: argv.Disk, base: Path) -> None:
    """Put an overlay over one raw file with the content of all that is below it, and let go of what was: a chain that grew with each save would slow down.

    at: the disk's place among the machine's.
    """
    below = argv.base_node(at, overlay, base)
    await vm.monitor("blockdev-add", **below)
    options = argv.overlay_node(at, overlay, str(below["node-name"])) | {"file": f"{argv.overlay_name(at, overlay.number)}-file"}
    await vm.monitor("blockdev-reopen", options=[options])
    for node in (argv.overlay_name(at, overlay.number - 1), argv.base_name(at, overlay.number - 1)):
        with contextlib.suppress(RametError):
            await vm.monitor("blockdev-del", **{"node-name": node})


async def settle(vm: Vm, at: int, overlay: argv.Disk) -> None:
    """The same, of a QEMU of which nobody knows how far a save that was cut off came with it. Until then it reads layers that are not the overlay's any more,
    and may be collected. overlay: with the base that it stands on."""
    nodes = {node["node-name"] for node in await vm.monitor("query-named-block-nodes")}
    if argv.overlay_name(at, overlay.number - 1) not in nodes:
        return
    if (base := argv.base_name(at, overlay.number)) in nodes:
        with contextlib.suppress(RametError):  # it is in use: only the last step is missing
            await vm.monitor("blockdev-del", **{"node-name": base})
    assert overlay.base
    await rebase(vm, at, overlay, overlay.base)


async def active_overlays(vm: Vm) -> dict[int, int]:
    """The number of the overlay that the machine writes to, of each disk, by its place among the machine's."""
    names = (str((device.get("inserted") or {}).get("node-name", "")) for device in await vm.monitor("query-block"))
    return dict(found for name in names if (found := argv.overlay_number(name)))
