"""Fork, pause, hibernate, resume, snapshot, rewind: each a few lines over one way to save and one way to start."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence

from ramet import bringup, compacting, lineage, recovery, restoring, rewinding, saving, slimming, snapshot
from ramet import spec as specs
from ramet.db import Record
from ramet.errors import DependentsError, ExistsError, MachineFailedError, NoCapacityError, RametError, SpecError
from ramet.lifecycle import Operation
from ramet.model import Port, Snapshot, SnapshotState, Spec, State
from ramet.operations import Entry, Operations, log
from ramet.sealing import Sealer

MOST = 1000  # children of one fork
_AT_ONCE = 4  # children that are started at the same time; more would only wait for each other
_EARLY = 1  # children whose QEMUs start before the parent is saved: more would take the processor from the pause


class Forks:
    """What can be done with instants of machines."""

    def __init__(self, ops: Operations) -> None:
        self._ops = ops
        self.sealer = Sealer(ops, self.refill)
        self._refills: dict[str, asyncio.Task[None]] = {}
        self._short: set[str] = set()  # snapshots whose pools the host had no room for
        self.scarce = False  # the host runs low on memory: none is parked
        ops.on_end = self._ended

    # saving

    async def snapshot(self, entry: Entry, label: str, *, memory: bool, test: bool) -> Snapshot:
        """A named one."""
        name = snapshot.label(entry.record.name, label or time.strftime("%Y%m%d-%H%M%S"))
        self._untaken(name)
        if memory and entry.record.state is State.STOPPED:
            raise SpecError(f"{entry.record.name} is stopped: there is no memory to save", hint="`--no-memory` saves its disk.")
        made: list[Snapshot] = []

        async def work(held: Entry) -> None:
            made.append(await saving.save(self._ops, held, name=name, memory=memory))

        await self._saved(entry, Operation.SNAPSHOT, work)
        self.sealer.add(made[0], test=test)
        return self._ops.snapshots[made[0].id]

    def _untaken(self, name: str, *, but: str = "") -> None:
        """ExistsError where a snapshot, other than that with the id `but`, has the name."""
        if any(each.name == name and each.id != but for each in self._ops.snapshots.values()):
            raise ExistsError(f"there is a snapshot {name} already", hint="Name this one otherwise, or `ramet delete` that one.")

    async def fork(self, entry: Entry, names: Sequence[str]) -> dict[str, Entry | RametError]:
        """Machines that go on from this one's present instant; what became of each."""
        self.require_free(names)
        gate = asyncio.Semaphore(_AT_ONCE)
        children: dict[str, asyncio.Task[Entry | RametError]] = {}
        made: list[Snapshot] = []

        async def work(held: Entry) -> None:
            whole: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            async with saving.live(self._ops, held) as save:
                made.append(save.snapshot)
                early = names[:_EARLY]  # their QEMUs start while the parent is saved
                children.update({name: self._ops.spawn(self._child(save.snapshot, name, gate, whole)) for name in early})
                try:
                    await save.catch()
                    await save.keep()
                except BaseException as error:
                    whole.set_exception(error if isinstance(error, RametError) else MachineFailedError("the fork was interrupted"))
                    whole.exception()  # taken here: there may be nobody who waits
                    raise
                whole.set_result(None)
                self._ops.spawn(self._warm(held, save.snapshot))
                children.update({name: self._ops.spawn(self._child(save.snapshot, name, gate, whole)) for name in names[_EARLY:]})
                try:
                    await save.settle()
                except RametError as error:
                    # The children are whole. The next save or start puts the parent's disk right before it does anything else.
                    log.error("the disk of %s: %s", held.record.name, error.message)

        try:
            await self._ops.perform(entry, Operation.FORK, work)
        finally:
            if children:
                await asyncio.wait(children.values())
            if made and made[0].id in self._ops.snapshots:
                self.sealer.add(made[0], test=False)
            self._ops.spawn(self.sweep())
        outcomes = {name: children[name].result() for name in names}
        if not entry.touched:
            with contextlib.suppress(OSError):
                entry.touched = await self._ops.layers.touched(made[0].memory_layer)
        return outcomes

    async def compact(self, entry: Entry) -> int:
        """Bytes that the host's disk got back."""
        given: list[int] = []

        async def work(held: Entry) -> None:
            given.append(await compacting.compact(self._ops, self.sealer, held))

        await self._saved(entry, Operation.COMPACT, work)
        return given[0]

    async def _saved(self, entry: Entry, operation: Operation, work: Callable[[Entry], Awaitable[None]]) -> None:
        """Perform it, and remove afterwards what nobody needs any more, or what a failure has left."""
        try:
            await self._ops.perform(entry, operation, work)
        finally:
            self._ops.spawn(self.sweep())

    async def _warm(self, entry: Entry, found: Snapshot) -> None:
        """A child's first instructions fault on the same pages as those of its elder siblings: 60 faults of 0.4 ms each, one after the other."""
        await self._ops.layers.prefetch(found.memory_layer, entry.touched)

    async def _child(self, found: Snapshot, name: str, gate: asyncio.Semaphore, whole: asyncio.Future[None]) -> Entry | RametError:
        async with gate:
            try:
                return await self._create(found, name, whole)
            except RametError as error:
                return error
            except Exception as error:  # its siblings' outcomes count all the same
                log.error("the start of %s", name, exc_info=error)
                return MachineFailedError(f"{name} did not start: {error!r}")

    def children(self, entry: Entry, count: int) -> list[str]:
        """Names for children: NAME-1, NAME-2…, those that are free."""
        if not 1 <= count <= MOST:
            raise SpecError(f"a fork has 1 to {MOST} children, not {count}")
        taken = {each.record.name for each in self._ops.entries.values()}
        free = (f"{entry.record.name}-{number}" for number in range(1, len(taken) + count + 1))
        return [name for name in free if name not in taken][:count]

    def require_free(self, names: Sequence[str]) -> None:
        """SpecError, ExistsError: machines cannot be called so."""
        taken = {each.record.name for each in self._ops.entries.values()}
        for name in names:
            specs.check(Spec(name=name))
            if name in taken or names.count(name) > 1:
                raise ExistsError(f"there is a machine {name} already", hint="Name the children otherwise.")

    # starting

    async def create_from(self, found: Snapshot, name: str, *, disk_only: bool = False) -> Entry:
        """A new machine from a snapshot: a parked one where there is one."""
        self.require_free([name])
        if not disk_only and (parked := self._parked(found)):
            return await self._claim(parked[0], found, name)
        return await self._create(dataclasses.replace(found, memory=False, memory_layer="") if disk_only else found, name)

    async def _create(self, found: Snapshot, name: str, whole: asyncio.Future[None] | None = None) -> Entry:
        if not whole:  # else it is being made, by what runs here
            await restoring.check(self._ops, found)
        entry = self._ops.add(await self._child_record(found, name))
        try:
            await self._ops.perform(entry, Operation.CREATE, lambda held: restoring.bring_back(self._ops, held, found, whole))
        except BaseException:
            self._ops.spawn(self.sweep())  # what it stood on may be nobody's now
            raise
        return entry

    async def _child_record(self, found: Snapshot, name: str) -> Record:
        boot = await self._ops.host.boot(fresh=False)
        return Record(
            id=os.urandom(6).hex(),
            name=name,
            state=State.CREATING,
            spec=_spec(found, name),
            created_at=time.time(),
            image_digest=found.image_digest,
            initialised=True,
            accelerator=boot.probe.accelerator,
            kernel=found.compatibility.kernel if found.compatibility else "",
            source_id=found.id,
            snapshot_id=found.id,
            memory_layer=found.memory_layer,
            memory_limit=found.memory_limit,
        )

    async def restore(self, entry: Entry, name: str) -> None:
        """Rewind it in place. It is what it was when that fails."""
        found = self._point(entry, name)
        await restoring.check(self._ops, found)
        was = entry.record

        async def work(held: Entry) -> None:
            try:
                async with rewinding.aside(self._ops, held, was):
                    await restoring.bring_back(self._ops, held, found)
            except Exception as error:
                await recovery.recover(self._ops, held)  # it goes on as what it was
                if isinstance(error, RametError):
                    as_before = ", as before" if held.record.state is was.state else ""
                    error.hint = f"{held.record.name} is {held.record.state}{as_before}. {error.hint}".strip()
                raise

        await self._saved(entry, Operation.RESTORE, work)

    def _point(self, entry: Entry, name: str) -> Snapshot:
        """Of the machine itself, or the one that it was made from."""
        if not name:
            if entry.record.snapshot_id in self._ops.snapshots:
                return self._ops.snapshots[entry.record.snapshot_id]
            raise SpecError(f"{entry.record.name} has no snapshot to go back to", hint=f"`ramet snapshot {entry.record.name}` makes one.")
        own = f"{entry.record.name}@{name}"
        found = lineage.find(self._ops.snapshots, own if any(own == each.name for each in self._ops.snapshots.values()) else name)
        if found.machine != entry.record.name and found.id not in (entry.record.snapshot_id, entry.record.source_id):
            raise SpecError(
                f"{found.title} is a snapshot of {found.machine}, not of {entry.record.name}",
                hint=f"`ramet create --from {found.title} NAME` makes another machine from it.",
            )
        return found

    async def pause(self, entry: Entry, *, reason: str = "") -> None:
        """reason: why, where nobody asked for it."""

        async def work(held: Entry) -> None:
            assert held.vm
            await held.vm.pause()
            if reason:
                self._ops.note(held, reason=reason)

        await self._ops.perform(entry, Operation.PAUSE, work)

    async def hibernate(self, entry: Entry, *, slim: bool = True, reason: str = "") -> None:
        """reason: why, where nobody asked for it."""

        async def work(held: Entry) -> None:
            given = await slimming.slim(self._ops, held) if slim else 0
            await saving.hibernate(self._ops, held, slimmed=given)
            await self._ops.end(held)
            self._ops.note(held, reason=reason)

        await self._saved(entry, Operation.HIBERNATE, work)
        self.sealer.add(self._ops.snapshots[entry.record.snapshot_id], test=False)

    async def resume(self, entry: Entry) -> None:
        if entry.record.state is not State.HIBERNATED:
            await self._ops.perform(entry, Operation.UNPAUSE, self._unpause)
            return
        found = self._point(entry, "")
        await restoring.check(self._ops, found)
        await self._ops.perform(entry, Operation.RESUME, lambda held: restoring.bring_back(self._ops, held, found))

    async def _unpause(self, entry: Entry) -> None:
        assert entry.vm
        await entry.vm.unpause()
        self._ops.note(entry, reason="")
        await restoring.open_ports(self._ops, entry)  # those that an earlier daemon held

    # templates, and machines that are parked for them

    async def template(self, found: Snapshot, label: str, pool: int) -> Snapshot:
        """Name a snapshot, and say how many machines are to be parked."""
        name = snapshot.template_name(label) if label else found.name
        if not name:
            raise SpecError("an automatic snapshot needs a name to be a template", hint="`ramet template ID shop:1.0` gives it one.")
        if not 0 <= pool <= MOST:
            raise SpecError(f"a pool has 0 to {MOST} machines, not {pool}")
        if pool and not found.memory:
            raise SpecError(f"{name} has no memory: its machines would have to boot", hint="Make a snapshot with memory.")
        self._untaken(name, but=found.id)
        changed = await self._ops.snapshots.change(found.id, name=name, template=True, pool=pool)
        self.refill(changed)
        return changed

    def refill(self, found: Snapshot) -> None:
        """Make the pool what it should be, in the background."""
        running = self._refills.get(found.id)
        if found.template and found.state is SnapshotState.READY and (running is None or running.done()):
            self._refills[found.id] = self._ops.spawn(self._refill(found.id))  # one that runs looks again before it ends

    async def _refill(self, snapshot_id: str) -> None:
        while (found := self._ops.snapshots.get(snapshot_id)) and found.state is SnapshotState.READY:
            of_it = [
                each for each in self._ops.entries.values() if each.record.pool == snapshot_id and each.operation is not Operation.CLAIM
            ]
            dead = [each for each in of_it if each.record.state is not State.PAUSED and not each.operation]
            if dead or len(of_it) > found.pool:
                await self._ops.drop((dead or of_it)[-1])
            elif len(of_it) == found.pool:
                return
            elif self.scarce:
                self._short.add(snapshot_id)
                return
            else:
                try:
                    await self._park(found)
                except NoCapacityError as error:
                    log.info("%s has fewer machines parked than it should: %s", found.title, error.message)
                    self._short.add(snapshot_id)
                    return

    def replenish(self) -> None:
        """Try again to fill the pools that the host had no room for."""
        while self._short:
            if found := self._ops.snapshots.get(self._short.pop()):
                self.refill(found)

    async def give_up(self, entry: Entry) -> None:
        """End a parked machine. Its pool is filled again when the host has room."""
        if entry.record.pool and not entry.operation:
            log.warning(
                "a machine that is parked for %s is ended, for the host runs low on memory", self._ops.snapshots[entry.record.pool].title
            )
            self._short.add(entry.record.pool)
            await self._ops.drop(entry)

    async def _park(self, found: Snapshot) -> None:
        await restoring.check(self._ops, found)
        record = await self._child_record(found, f"pool-{os.urandom(6).hex()}")
        entry = self._ops.add(dataclasses.replace(record, spec=dataclasses.replace(record.spec, ports=()), pool=found.id))

        async def work(held: Entry) -> None:
            await restoring.bring_back(self._ops, held, found)
            assert held.vm
            await restoring.warm_up(held.vm)
            await held.vm.pause()

        await self._ops.perform(entry, Operation.PARK, work)

    def _ended(self, entry: Entry) -> None:
        """A parked machine that died is replaced."""
        if entry.record.pool:
            self._ops.spawn(self._replace(entry))

    async def _replace(self, entry: Entry) -> None:
        found = self._ops.snapshots.get(entry.record.pool)
        await self._ops.drop(entry)
        if found:
            self.refill(found)

    def _parked(self, found: Snapshot) -> list[Entry]:
        return [
            each
            for each in self._ops.entries.values()
            if each.record.pool == found.id and each.record.state is State.PAUSED and each.vm and not each.operation
        ]

    async def _claim(self, entry: Entry, found: Snapshot, name: str) -> Entry:
        """A parked machine becomes somebody's: it goes on under the new name."""
        began = time.monotonic()

        async def work(held: Entry) -> None:
            assert held.vm
            await self._ops.set(held, name=name, spec=_spec(found, name), pool="", created_at=time.time())
            await held.vm.unpause(restoring.identity(held))
            self._ops.note(held, started_at=time.time(), boot_time=time.monotonic() - began)
            await restoring.open_ports(self._ops, held)

        try:
            await self._ops.perform(entry, Operation.CLAIM, work)
        finally:
            self.refill(found)
        return entry

    # deleting

    async def delete(self, found: Snapshot, *, cascade: bool, dry_run: bool) -> list[str]:
        """Remove a snapshot, and with `cascade` all that stands on it; returns names, in the order in which they go."""
        records = [each.record for each in self._ops.entries.values()]
        doomed_machines, doomed_snapshots = _closure(found, records, list(self._ops.snapshots.values()))
        names = [each.name for each in doomed_machines] + [each.title for each in doomed_snapshots]
        if len(names) > 1 and not cascade:
            others = [name for name in names if name not in (found.name, found.id)]
            raise DependentsError(
                f"{found.title} is needed by {', '.join(others)}",
                hint="Delete those first, or all with `--cascade`; `--dry-run` shows what would go.",
                details={"dependents": others},
            )
        if dry_run:
            return names
        for record in doomed_machines:
            await self._ops.drop(self._ops.entries[record.id])
        for each in doomed_snapshots:
            await self._forget(each)
        await self.sweep()
        return names

    async def _forget(self, found: Snapshot) -> None:
        for entry in [each for each in self._ops.entries.values() if each.record.pool == found.id]:
            await self._ops.drop(entry)
        place = self._ops.state.snapshot(found.id).root
        doomed = place.with_name(f".deleting-{place.name}")
        with contextlib.suppress(FileNotFoundError):
            place.rename(doomed)  # first: a directory that the database does not know is taken for a snapshot that was being recorded
        await self._ops.snapshots.forget(found)
        await asyncio.to_thread(shutil.rmtree, doomed, True)

    async def sweep(self) -> None:
        """Remove automatic snapshots that nobody stands on, then layers that nobody needs."""
        while doomed := lineage.unneeded(
            [record for each in self._ops.entries.values() for record in each.records], self._ops.snapshots.values()
        ):
            for each in doomed:
                await self._forget(each)
        await self._ops.collect()

    async def recover(self) -> None:
        """After a restart of the daemon: finish what the old one had begun."""
        for files in restoring.tests_left(self._ops.state.machines):
            log.info("a test of a snapshot was cut off: %s", files.root.name)
            await bringup.clear(files)
        for entry in list(self._ops.entries.values()):
            record = entry.record
            # The snapshot of a fork that was cut off was never recorded, and its child never ran.
            unborn = record.source_id and record.source_id not in self._ops.snapshots and record.started_at is None
            if unborn or (record.pool and record.state is not State.PAUSED):
                await self._ops.drop(entry)
        for found in list(self._ops.snapshots.values()):
            if found.state in (SnapshotState.SAVING, SnapshotState.TESTING):
                self.sealer.add(found, test=bool(found.name))
            elif found.pool:
                self.refill(found)
        self._ops.spawn(compacting.finish(self._ops, self.sealer))
        await self.sweep()


def _spec(found: Snapshot, name: str) -> Spec:
    """Of a machine that is made from it. The host's side of its ports is taken, or will be, so any free ones do."""
    return dataclasses.replace(found.spec, name=name, ports=tuple(Port(guest=port.guest) for port in found.spec.ports))


def _closure(found: Snapshot, machines: list[Record], snapshots: list[Snapshot]) -> tuple[list[Record], list[Snapshot]]:
    """All that goes with a snapshot: machines, and snapshots, those that stand on others first."""
    doomed, going, queue = [], [found], [found]
    while queue:
        each = queue.pop()
        for record in lineage.machines_on(each, machines):
            if record not in doomed:
                doomed.append(record)
        for other in lineage.snapshots_on(each, snapshots):
            if other not in going:
                going.append(other)
                queue.append(other)
    return doomed, list(reversed(going))
