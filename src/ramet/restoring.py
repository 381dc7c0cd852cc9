"""Starting from a snapshot: a machine goes on from that instant, with the right time, a name of its own and randomness of its own, or it does not start."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path

from ramet import bringup, commands, disks, images, snapshot
from ramet.errors import ImageError, LayerError, MachineFailedError, RametError
from ramet.identity import Identity
from ramet.model import Command, Compatibility, Snapshot, SnapshotState, Spec
from ramet.operations import Entry, Operations, log
from ramet.paths import MachineDir
from ramet.store import mounting, remote, tracing
from ramet.store.fetching import Fetcher
from ramet.store.layer import is_id
from ramet.vm import balloon
from ramet.vm.machine import Vm

ANSWER_DEADLINE = 60.0  # seconds until the agent of a restored machine has answered: 0.1, on an idle host
# Seconds that what is read still counts as the start's once commands can run: what the first ones need is waited for as well. Nothing tells that they are over.
_TRACED = 10.0
_TEST = ".testing-"


def identity(entry: Entry) -> Identity:
    """What makes a copy a machine of its own."""
    return Identity(hostname=entry.record.name, machine_id=bringup.machine_id(entry.record.id), generation=str(uuid.uuid4()))


async def here(ops: Operations, spec: Spec) -> Compatibility:
    """What a start from a snapshot of such a machine would be under, on this host and now."""
    boot = await ops.host.boot(fresh=False)
    config = bringup.config(spec, boot, ops.host.network)
    return snapshot.compatibility(config, await ops.host.qemu_version(), ops.host.cpu, boot.kernel.version)


async def check(ops: Operations, found: Snapshot) -> None:
    """Whether a machine can be started from it: IncompatibleError, LayerError or ImageError say why not."""
    if found.state is SnapshotState.BROKEN:
        raise LayerError(f"snapshot {found.title} is broken: {found.reason}", hint="`ramet snapshots` shows others.")
    if images.load(ops.state, found.image_digest) is None:
        raise ImageError(f"the image {found.image_digest} that {found.title} stands on is gone")
    if found.memory:
        snapshot.require_fit(found, await here(ops, found.spec))


async def launch(ops: Operations, found: Snapshot, files: MachineDir, spec: Spec) -> Vm:
    """A QEMU for the snapshot's memory and disks, which it does not read yet: they may still be in the making."""
    await ops.use_layers()
    made = await disks.make(ops.state, files, found.spec, found.disk_layers)
    boot = await ops.host.boot(fresh=False)
    where = disks.arguments(ops.state, files, made, found.image_digest, boot.disk_io)
    config = bringup.config(spec, boot, ops.host.network, disks=where, memory_file=ops.state.store.served(found.memory_layer))
    machine = await Vm.launch(files, config, boot.binaries.shim)
    machine.reclaim = found.spec.reclaim
    return machine


async def go_on(ops: Operations, found: Snapshot, machine: Vm, who: Identity) -> None:
    """Let it go on from the snapshot's instant, as somebody of its own. It does not live when that fails."""
    try:
        await machine.go_on(ops.state.snapshot(found.id).state, who, deadline=ANSWER_DEADLINE)
    except BaseException:
        await machine.kill()
        raise


async def bring_back(ops: Operations, entry: Entry, found: Snapshot, whole: asyncio.Future[None] | None = None) -> None:
    """Let the machine go on from a snapshot that was checked; whatever it was before is ended and its disk forgotten.

    whole: done when the snapshot is, where it is not yet.
    """
    began = time.monotonic()
    await ops.end(entry)
    image = images.load(ops.state, found.image_digest)
    entry.image = image.config if image else entry.image
    boot = await ops.host.boot(fresh=False)
    after = {
        "snapshot_id": found.id,
        "memory_layer": found.memory_layer,
        "image_digest": found.image_digest,
        "initialised": True,
        "accelerator": boot.probe.accelerator,
        "kernel": found.compatibility.kernel if found.compatibility else "",
    }
    if any(getattr(entry.record, name) != value for name, value in after.items()):
        await ops.set(entry, **after)  # before anything runs: a collection of layers must see what it needs
    if remote.is_any(ops.state.store):
        # What an earlier start touched is fetched before it is asked for.
        fetch_later(ops, f"what {found.title} needs at its start", lambda fetcher: fetcher.trace(found.layers))
    async with _traced_once(ops, found):
        await _go_on_from(ops, entry, found, whole, began)


def fetch_later(ops: Operations, what: str, work: Callable[[Fetcher], Awaitable[None]]) -> None:
    """Have something fetched that nobody waits for. what: it, for the log."""

    async def fetch() -> None:
        try:
            await ops.use_layers()
            async with Fetcher.connect(ops.state.store, ops.layers.nudge) as fetcher:
                await work(fetcher)
        except RametError as error:
            log.warning("%s is only fetched when it is read: %s", what, error.message)

    ops.spawn(fetch())


async def _go_on_from(ops: Operations, entry: Entry, found: Snapshot, whole: asyncio.Future[None] | None, began: float) -> None:
    files = ops.state.machine(entry.record.id)
    if not found.memory:
        await disks.make(ops.state, files, found.spec, found.disk_layers)
        await ops.bring_up(entry)
        return
    ops.doing(entry, "starting QEMU")
    entry.started = time.time()
    entry.vm = await launch(ops, found, files, entry.record.spec)
    limits = asyncio.ensure_future(asyncio.to_thread(bringup.limit, ops.host, entry.record.id, entry.record.spec, files))
    try:
        if whole:
            ops.doing(entry, "waiting for the snapshot")
            await asyncio.shield(whole)
        ops.doing(entry, "loading the devices")
        await go_on(ops, found, entry.vm, identity(entry))
    except MachineFailedError as error:
        if reason := mounting.unserved(ops.state.store, found.memory_layer, entry.started):
            raise LayerError(reason, hint="`ramet layer verify` checks a layer; start from another snapshot.") from error
        raise
    finally:
        await limits
    ops.note(entry, started_at=time.time(), boot_time=time.monotonic() - began)
    ops.watch(entry, entry.vm)
    if found.memory_limit or entry.record.memory_limit:
        ops.spawn(balloon.apply(entry.record.name, entry.vm, entry.record.memory_limit or entry.record.spec.memory))
    await open_ports(ops, entry)


async def open_ports(ops: Operations, entry: Entry) -> None:
    """Those that the spec wants; the machine is usable without."""
    for port in entry.record.spec.ports:
        try:
            await ops.open_port(entry, port)
        except (RametError, OSError) as error:
            await ops.set(entry, reason=str(error))


async def warm_up(machine: Vm) -> None:
    """Run one throw-away command: under emulation, code that a QEMU has not run yet must be translated first, which is most of a first command's time."""
    command = Command(argv=("true",), timeout=30)
    try:
        await commands.run(machine.guest, command, b"")
    except RametError as error:
        log.info("a parked machine could not run `true`: %s", error.message)


async def test(ops: Operations, found: Snapshot) -> str:
    """Start from a snapshot once, in a directory of its own; why that failed, or nothing."""
    files = MachineDir(root=ops.state.machines / f"{_TEST}{found.id}")
    who = Identity(hostname=found.spec.name, machine_id=os.urandom(16).hex(), generation=str(uuid.uuid4()))
    began = time.time()
    try:
        await check(ops, found)
        async with _tracing(ops, found.layers):
            machine = await launch(ops, found, files, found.spec)
            try:
                await go_on(ops, found, machine, who)
                await machine.guest.ping()
            finally:
                await machine.kill()
    except RametError as error:
        return mounting.unserved(ops.state.store, found.memory_layer, began) or error.message
    finally:
        await bringup.clear(files)
    return ""


# What a start touches is remembered with the layers, to be fetched first by those who pull them.


@contextlib.asynccontextmanager
async def _tracing(ops: Operations, layers: Sequence[str]) -> AsyncIterator[None]:
    """Note what is read of these layers in the body."""
    noted = [layer for layer in layers if not ops.state.store.layer(layer).tracing.exists()]
    try:
        for layer in noted:
            await asyncio.to_thread(ops.store.begin_trace, layer)
        ops.layers.forget()  # workers look when they open a layer
        yield
    finally:
        await asyncio.to_thread(_end_traces, ops, noted)
        ops.layers.forget()


def _end_traces(ops: Operations, layers: Iterable[str]) -> None:
    for layer in layers:
        try:
            ops.store.end_trace(layer)
        except RametError as error:  # it is advice
            log.info("what was touched of layer %s is not known: %s", layer, error.message)


@contextlib.asynccontextmanager
async def _traced_once(ops: Operations, found: Snapshot) -> AsyncIterator[None]:
    """Note the first start from a template of which nothing is known yet, and what follows it. Not from what is automatic: a fork has no time for that."""
    layers = [layer for layer in found.layers if not tracing.load(ops.state.store, layer)] if found.template else []
    if not layers:
        yield
        return
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(_tracing(ops, layers))
        yield
        ops.spawn(_end_later(stack.pop_all()))


async def _end_later(noting: contextlib.AsyncExitStack) -> None:
    async with noting:
        await asyncio.sleep(_TRACED)


def end_traces(ops: Operations) -> None:
    """Those that a daemon which died had begun: else all that is read would be noted for ever."""
    _end_traces(ops, [path.parent.name for path in ops.state.store.layers.glob("*/trace.new") if is_id(path.parent.name)])


def tests_left(state_machines: Path) -> list[MachineDir]:
    """Directories of tests that a crash interrupted."""
    return [MachineDir(root=path) for path in state_machines.glob(f"{_TEST}*")]
