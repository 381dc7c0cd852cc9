"""What changes a machine's state: each operation in a task of its own that outlives its caller, every failure written where the user looks."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any, TypeVar

from ramet import bringup, capacity, cgroup, disks, guestfs, images, lifecycle, locks
from ramet.bus import Bus
from ramet.capacity import Claim
from ramet.catalogue import Catalogue
from ramet.commands import Forward
from ramet.db import Database, Record
from ramet.entry import Entry
from ramet.errors import BusyError, HostError, MachineFailedError, NoCapacityError, NoSpaceError, RametError, SpecError, StateError
from ramet.host import Host
from ramet.lifecycle import Operation
from ramet.model import Activity, Event, Image, InitMode, Port, State
from ramet.paths import MachineDir, StateDir
from ramet.store import mounting
from ramet.store.eviction import Evicted
from ramet.store.garbage import Freed
from ramet.store.mounting import ImageFs
from ramet.store.store import Store
from ramet.units import format_size
from ramet.vm import balloon
from ramet.vm import machine as vm
from ramet.vm.disk import Disks
from ramet.vm.machine import Vm

__all__ = ["LOST", "Entry", "Operations", "log", "retrieve"]

T = TypeVar("T")

log = logging.getLogger("ramet")

LOST = "the image file system, which serves its memory and disk, ended; `ramet restore` goes back to its last snapshot, `ramet start` boots its disk"
_DYING = 5.0  # seconds that a guest which lost its agent gets to end by itself (a panic, a power-off) before it counts as failed
_LITTLE = 64 << 10  # bytes that must be free for the image file system to write down who it is
# A full disk must not keep anybody from stopping and deleting: a daemon that starts anew finds these states out by looking.
_FOUND_AGAIN = frozenset({State.STOPPING, State.STOPPED, State.FAILED, State.DELETING})


class Operations:
    """The machines of this host and what is being done to them."""

    def __init__(self, state: StateDir, database: Database, host: Host) -> None:
        self.state = state
        self.host = host
        self.bus = Bus()
        self.entries: dict[str, Entry] = {}
        self.snapshots = Catalogue(database)
        self.db = database
        self.store = Store(state.store)
        self.layers = ImageFs(state.store)
        self._layers_lock = asyncio.Lock()
        self._saving = 0
        self._uncollected = False
        self.collecting = asyncio.Lock()
        self.on_end: Callable[[Entry], None] = lambda entry: None  # called when a QEMU ended by itself
        self.on_layers: Callable[[], None] = lambda: None  # called when layers are going to be read
        self.on_stuck: Callable[[Entry, Vm], None] = lambda entry, machine: None  # called when QEMU stopped a machine, for the disk is full
        self._background: set[asyncio.Task[Any]] = set()

    # the frame of every operation

    def add(self, record: Record) -> Entry:
        entry = self.entries[record.id] = Entry(record=record)
        return entry

    async def perform(self, entry: Entry, operation: Operation, work: Callable[[Entry], Awaitable[None]]) -> None:
        """Do an operation in its own task. A caller that goes away does not end it; a delete does."""
        if entry.operation:
            raise BusyError(
                f"{entry.record.name} is busy: {entry.operation}",
                hint="Wait for it; `ramet delete` ends it.",
                details={"operation": entry.operation},
            )
        entry.require_found()
        entry.require_memory(operation)
        during = lifecycle.begin(entry.record.name, entry.record.state, operation)
        if wanted := capacity.wanted(entry.record, operation, alive=bool(entry.vm)):
            self.admit(entry, wanted)
        entry.operation, entry.last_used = operation, time.monotonic()
        entry.task = task = asyncio.create_task(self._perform(entry, operation, during, work))
        task.add_done_callback(retrieve)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise StateError(f"{operation} of {entry.record.name} was ended by a delete, or by the daemon's stop") from None
            raise

    def admit(self, entry: Entry, wanted: Claim) -> None:
        """NoCapacityError where the host has no room for it; a machine that was to be made is forgotten then."""
        others = [has for each in self.entries.values() if each is not entry and (has := each.claim())]
        try:
            capacity.check(entry.record.name, wanted, others, self.host.room())
        except NoCapacityError:
            if entry.record.state is State.CREATING:
                del self.entries[entry.record.id]
            raise

    async def _perform(self, entry: Entry, operation: Operation, during: State, work: Callable[[Entry], Awaitable[None]]) -> None:
        before = entry.record.state
        try:
            if operation in lifecycle.MAKING:
                await self.db.insert(entry.record)
                self._publish(entry)
            elif during is not before:
                await self.set(entry, state=during, reason="")
            await work(entry)
            if (after := lifecycle.TABLE[operation][2]) is not None:
                await self.set(entry, state=after)
        except BaseException as error:
            why = entry.because(error)
            await self._undo(entry, operation, before, why)
            if why is not error:
                raise why from error
            raise
        finally:
            entry.operation = entry.activity = None

    async def _undo(self, entry: Entry, operation: Operation, before: State, error: BaseException) -> None:
        """After a failed operation: nothing half-made, and the reason where users look. before: the machine's state when it began."""
        reason = (
            error.message
            if isinstance(error, RametError)
            else f"{operation} was interrupted"
            if isinstance(error, asyncio.CancelledError)
            else repr(error)
        )
        log.warning("%s of %s failed: %s", operation, entry.record.name, reason)
        try:
            after, during = lifecycle.FAILED[operation], lifecycle.TABLE[operation][1]
            if during and entry.record.state is not during:
                return  # it was put right already
            if after is None:
                try:
                    await self.set(entry, state=before)
                except NoSpaceError:  # a daemon that starts anew finds it running, and goes on from that
                    self.note(entry, state=before)
                return
            if operation is not Operation.DELETE:
                await self.end(entry)
            if operation in lifecycle.MAKING and entry.record.started_at is None:
                await self.remove(entry)  # it never ran: there is nothing to look at
            else:
                await self.set(entry, state=after, reason=f"{operation}: {reason}")
        except RametError as second:
            log.error("%s is left as it is: %s", entry.record.name, second.message)
            if operation in lifecycle.MAKING:
                self.entries.pop(entry.record.id, None)

    async def cancel(self, entry: Entry) -> None:
        """End what is being done to a machine and wait until that has cleaned up."""
        if entry.task and not entry.task.done():
            entry.task.cancel()
            await asyncio.wait({entry.task})

    async def set(self, entry: Entry, **changes: Any) -> None:
        """Change the record: on disk first, then in memory, then told, where it is the state or its reason."""
        async with entry.writing:
            record = dataclasses.replace(entry.record, **changes)
            try:
                await self.db.update(record)
            except NoSpaceError as error:
                if record.state not in _FOUND_AGAIN:
                    raise
                log.error("%s is %s, which is not on disk: %s", record.name, record.state, error.message)
            self.note(entry, **changes)  # what was noted meanwhile stays

    def note(self, entry: Entry, **changes: Any) -> None:
        """Change the record in memory; the next `set` writes it, which the end of every operation does."""
        self.replace(entry, dataclasses.replace(entry.record, **changes))

    def replace(self, entry: Entry, record: Record) -> None:
        """A record that the database has already."""
        told, entry.record = entry.record, record
        if (told.state, told.reason) != (record.state, record.reason):
            self._publish(entry)

    def _publish(self, entry: Entry) -> None:
        record = entry.record
        self.bus.publish(Event(at=time.time(), kind="state", machine=record.name, state=record.state, reason=record.reason))

    def doing(self, entry: Entry, step: str, fraction: float | None = None) -> None:
        """Say what is being done; small steps of a long way are not worth an event each."""
        now = Activity(verb=str(entry.operation), step=step, fraction=fraction)
        if now.goes_on_from(entry.activity):
            return
        entry.activity = now
        self.bus.publish(Event(at=time.time(), kind="activity", machine=entry.record.name, activity=entry.activity))

    # create, start

    async def bring_up(self, entry: Entry) -> None:
        """Make what is missing and boot: idempotent, so that the first start is one like any other, and an interrupted one is simply done again."""
        await self.end(entry)
        image = await self._image(entry)
        entry.image = image.config
        files = self.state.machine(entry.record.id)
        if not disks.current(files, entry.record.spec.disk):
            self.doing(entry, "making the disk")
            point = self.snapshots.get(entry.record.snapshot_id)  # from which it was to be made, when that was cut off
            await disks.make(self.state, files, entry.record.spec, point.disk_layers if point else ())
        found = await self.settle_disks(entry, {})
        if disks.layers_of(files):
            await self.use_layers()
        self.doing(entry, "preparing the kernel")
        boot = await self.host.boot()
        self.doing(entry, "booting")
        began = time.monotonic()
        where = disks.arguments(self.state, files, found, image.digest, boot.disk_io)
        config = bringup.config(entry.record.spec, boot, self.host.network, disks=where, machine_id=bringup.machine_id(entry.record.id))
        entry.vm = await Vm.launch(files, config, boot.binaries.shim)
        await self.set(entry, started_at=time.time(), accelerator=boot.probe.accelerator, kernel=boot.kernel.version)
        bringup.limit(self.host, entry.record.id, entry.record.spec, files)
        await entry.vm.connect_agent(deadline=vm.BOOT_DEADLINE, resync=False)
        await self.set(entry, boot_time=time.monotonic() - began)
        self.watch(entry, entry.vm)
        if entry.record.memory_limit:
            self.spawn(balloon.apply(entry.record.name, entry.vm, entry.record.memory_limit))
        await self._hooks(entry)

    async def settle_disks(self, entry: Entry, active: Mapping[int, int]) -> Disks:
        """Put the disks right where a save was cut off; what the machine has then. active: the overlays that a QEMU which lives writes to."""
        return await disks.settle(self.state, self.store, self.state.machine(entry.record.id), entry.record.image_digest, active)

    async def _image(self, entry: Entry) -> Image:
        """The image the machine's disk stands on, made when it is not there and no disk yet stands on it."""
        found = images.load(self.state, entry.record.image_digest) if entry.record.image_digest else None
        if found:
            return found
        if disks.current(self.state.machine(entry.record.id), entry.record.spec.disk):
            raise MachineFailedError(f"the image {entry.record.image_digest} that the disk of {entry.record.name} stands on is gone")
        image = await images.ensure(self.state, entry.record.spec.image, progress=lambda step, fraction: self.doing(entry, step, fraction))
        if image.disk_size > entry.record.spec.disk:
            need = format_size(image.disk_size)
            raise SpecError(f"`disk`: {format_size(entry.record.spec.disk)} is too small for {image.reference}: write at least {need}")
        await self.set(entry, image_digest=image.digest)
        return image

    async def _hooks(self, entry: Entry) -> None:
        """What the spec and the image want run in a machine that has booted."""
        assert entry.vm
        guest, wanted = entry.vm.guest, entry.record.spec
        workdir = wanted.workdir or entry.image.workdir
        if not entry.record.initialised:
            if workdir not in ("", "/"):
                await guestfs.make_dir(guest, workdir, mode=0o755, parents=True, user="")
            await self._hook(entry, "create", wanted.lifecycle.create)
            await self.set(entry, initialised=True)
        for port in wanted.ports:
            await self.open_port(entry, port)
        await self._hook(entry, "start", wanted.lifecycle.start)
        if wanted.entrypoint and entry.image.service and wanted.init is InitMode.AGENT:
            try:
                await bringup.service(guest, wanted, entry.image)
            except RametError as error:  # the machine is usable all the same
                await self.set(entry, reason=f"the image's entrypoint did not start: {error.message}")

    async def _hook(self, entry: Entry, name: str, script: str) -> None:
        if script and entry.vm:
            self.doing(entry, f"running lifecycle.{name}")
            await bringup.hook(entry.vm.guest, entry.record.spec, entry.image, name, script)

    async def open_port(self, entry: Entry, port: Port) -> Port:
        if port.guest in entry.forwards:
            return entry.forwards[port.guest].port

        def guest() -> Any:
            assert entry.vm
            return entry.vm.guest

        forward = entry.forwards[port.guest] = await Forward.open(port, guest)
        return forward.port

    # stop, delete

    async def take_down(self, entry: Entry, *, force: bool) -> None:
        if entry.vm and not (force or entry.waiting) and entry.record.state is State.STOPPING:
            self.doing(entry, "powering off")
            if rude := await entry.vm.power_off():
                await self.set(entry, reason=rude)
        await self.end(entry)

    async def let_go(self, entry: Entry) -> None:
        """Leave what lives of the machine to itself."""
        while entry.forwards:
            await entry.forwards.popitem()[1].close()
        running, entry.vm, entry.waiting = entry.vm, None, ""
        if running:
            await running.release()

    async def end(self, entry: Entry) -> None:
        """Make sure that nothing of the machine lives; quick when nothing does."""
        await self.let_go(entry)
        files = self.state.machine(entry.record.id)
        if vm.is_alive(files):
            await vm.kill(files)
        for path in (files.qmp, files.agent):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            cgroup.remove(self.host.cgroups, entry.record.id)

    # layers

    async def use_layers(self) -> None:
        """Make sure that layers are served; from then on, machines that stand on them are failed within a second of its end."""
        async with self._layers_lock:
            known = getattr(self.layers, "dead", None)
            try:
                await self.layers.ensure()
            except HostError as error:
                if shutil.disk_usage(self.state.store.root).free < _LITTLE:
                    raise NoSpaceError("the image file system cannot start: no space left on the disk") from error
                raise
            if self.layers.dead is not known:
                self.spawn(self._layers_died(self.layers.dead))
        self.on_layers()

    async def _layers_died(self, dead: asyncio.Future[str]) -> None:
        """Without the file system, a page that is not in memory yet is an I/O error or a SIGBUS, sooner or later."""
        why = await asyncio.shield(dead)
        log.error("the image file system ended: %s", why)
        for entry in list(self.entries.values()):
            if entry.vm and (entry.record.memory_layer or disks.layers_of(entry.vm.files)):
                self.spawn(self._lost_layers(entry, entry.vm))

    async def _lost_layers(self, entry: Entry, machine: Vm) -> None:
        entry.doom = LOST
        await vm.kill(machine.files)  # `_died` does the rest

    @contextlib.asynccontextmanager
    async def layers_in_use(self) -> AsyncIterator[None]:
        """In the body, layers that nothing names yet are not collected; what should have been is, afterwards."""
        self._saving += 1
        try:
            yield
        finally:
            self._saving -= 1
            if not self._saving and self._uncollected:
                self.spawn(self.collect())

    def needed_layers(self) -> frozenset[str]:
        """Those that snapshots and machines stand on, also machines that a lost database does not name any more."""
        points = {layer for each in list(self.snapshots.values()) for layer in each.layers}
        running = {record.memory_layer for each in list(self.entries.values()) for record in each.records}
        disks_on = {layer for path in self.state.machines.iterdir() for layer in disks.layers_of(MachineDir(root=path))}
        return frozenset((points | running | disks_on | images.layers(self.state)) - {""})

    async def collect(self) -> None:
        """Remove the layers that no snapshot and no machine needs."""
        try:
            freed = await self.gc()
        except RametError as error:
            log.warning("layers that nothing needs could not be removed: %s", error.message)
        else:
            if freed.layers:
                log.info("removed %d layers, %s", len(freed.layers), format_size(freed.bytes))

    async def gc(self, *, dry_run: bool = False) -> Freed:
        """The same, and what went, or would. While something is saved it is left for afterwards."""
        if self._saving:
            self._uncollected |= not dry_run
            return Freed(postponed=("no layers were removed: something is being saved, pushed or pulled",))
        async with self.collecting:  # one that meets another would leave the blobs to it, which may have looked too early
            freed = await asyncio.to_thread(self.store.gc, self.needed_layers, dry_run=dry_run)
        if not dry_run:
            self._uncollected = bool(freed.postponed)
            self.layers.forget()  # else its workers keep removed files open
        return freed

    async def evict(self, excess: int, in_use: Callable[[], Iterable[str]], *, dry_run: bool = False) -> Evicted:
        """Give up so many bytes of chunks that a registry has too; none while something is saved."""
        if self._saving:
            return Evicted(postponed=("no chunks were given up: something is being saved, pushed or pulled",))
        async with self.collecting:
            return await asyncio.to_thread(self.store.evict, excess, in_use, dry_run=dry_run)

    async def drop(self, entry: Entry) -> None:
        """Delete a machine, whatever it is doing."""
        await self.cancel(entry)
        if entry.record.id in self.entries:
            await self.perform(entry, Operation.DELETE, self.remove)

    async def remove(self, entry: Entry) -> None:
        """End it, delete its directory, forget it; in an order in which a crash leaves a record to go on from."""
        await self.end(entry)
        root = self.state.machine(entry.record.id).root
        if root.exists():
            doomed = root.with_name(f".deleting-{root.name}")
            root.rename(doomed)
            await asyncio.to_thread(bringup.remove_tree, doomed)
        await self.db.delete(entry.record.id)
        self.entries.pop(entry.record.id, None)
        self.bus.publish(Event(at=time.time(), kind="removed", machine=entry.record.name))

    # what happens by itself

    def watch(self, entry: Entry, machine: Vm) -> None:
        machine.on_agent_lost = lambda: self.keep(asyncio.create_task(self._lost(entry, machine)))
        machine.on_stuck = lambda: self.on_stuck(entry, machine)
        self.spawn(self._died(entry, machine))

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do something in the background, until the daemon's end."""
        task = asyncio.create_task(work)
        self.keep(task)
        return task

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Have a task ended with the daemon, and its error logged."""
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(retrieve)

    async def settle(self, entry: Entry) -> None:
        """Wait until nothing is being done to the machine."""
        while entry.task and not entry.task.done():
            await asyncio.wait({entry.task})

    async def _died(self, entry: Entry, machine: Vm) -> None:
        """QEMU ended: by itself (unless an operation ended it), so say why."""
        await asyncio.shield(machine.dead)
        await self.settle(entry)
        if entry.vm is not machine:
            return
        await self.end(entry)
        death = vm.postmortem(machine.files)
        since = entry.started or entry.record.started_at or 0.0
        reason = entry.doom or mounting.unserved(self.state.store, entry.record.memory_layer, since) or death.reason
        entry.doom = ""
        log.warning("%s ended: %s", entry.record.name, reason)
        await self.set(entry, state=State.STOPPED if death.clean and not entry.record.pool else State.FAILED, reason=reason)
        self.on_end(entry)

    async def _lost(self, entry: Entry, machine: Vm) -> None:
        """The agent's line broke while QEMU runs: connect again, unless it is dying anyway or the agent is gone for good."""
        why = machine.lost_because
        await asyncio.wait({machine.dead}, timeout=_DYING if machine.agent_closed else 0)
        await self.settle(entry)
        if machine.dead.done() or entry.vm is not machine or machine.still:
            return
        log.warning("%s: the agent's line broke: %s", entry.record.name, why)
        if not machine.agent_closed:
            try:
                await machine.connect_agent(deadline=vm.BOOT_DEADLINE / 3, resync=True)
            except MachineFailedError as error:
                why = error.message
            else:
                return
            await asyncio.wait({machine.dead}, timeout=_DYING)  # a QEMU that ends closes its sockets first
        if not machine.dead.done() and entry.vm is machine and entry.operation is None:
            await self.set(entry, state=State.FAILED, reason=f"the guest's agent is gone ({why}); QEMU still runs")

    # the end

    async def close(self) -> None:
        """Let go of every machine; what is being done is ended and cleaned up."""
        for entry in list(self.entries.values()):
            await self.cancel(entry)
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        for entry in list(self.entries.values()):
            await self.let_go(entry)
        served = locks.is_held(self.state.store.lock) or mounting.is_mounted(self.state.store)
        if served and not any(vm.is_alive(self.state.machine(each)) for each in self.entries):
            await self.layers.stop()  # nobody needs it
        self.layers.release()


def retrieve(task: asyncio.Task[Any]) -> None:
    """Keep an error whose caller is gone from being lost."""
    if not task.cancelled() and (error := task.exception()) and not isinstance(error, RametError):
        log.error("unexpected", exc_info=error)
