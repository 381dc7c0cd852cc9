"""The verbs on this host: one operation at a time for each machine, everything found again after a crash."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import functools
import os
import signal as signals
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator

from ramet import (
    caretaker,
    checking,
    collecting,
    commands,
    converting,
    guestfs,
    images,
    lifecycle,
    lineage,
    pulling,
    pushing,
    recovery,
    updating,
    views,
)
from ramet import reference as references
from ramet import spec as specs
from ramet.accounting import Accounts
from ramet.caretaker import Caretaker
from ramet.db import Database, Record
from ramet.errors import BusyError, ExistsError, ImageError, LayerError, NotFoundError, RametError, SpecError
from ramet.fetchwatch import Fetchwatch
from ramet.forks import Forks
from ramet.guest import Guest, Stream
from ramet.host import Host
from ramet.host import sample as sample_host
from ramet.lifecycle import Operation
from ramet.model import (
    Command,
    Event,
    FileInfo,
    ForkOutcome,
    HostInfo,
    Machine,
    Port,
    Process,
    ProcessEvent,
    Reclaim,
    Result,
    Snapshot,
    Spec,
    Started,
    State,
    TreeNode,
    Usage,
)
from ramet.operations import Entry, Operations
from ramet.paths import StateDir
from ramet.spacewatch import Spacewatch
from ramet.storage import Collected, LayerInfo, Transfer
from ramet.store import fetching, remote
from ramet.store.chain import Chain
from ramet.verbs import WRITE_FLAGS
from ramet.vm import machine as vm

_LOGS = ("console", "qemu")
_PIECE = 1 << 20  # bytes of a layer that are exported at a time


class Engine:
    """Implements `Verbs`. Use `Engine.open`."""

    def __init__(self, operations: Operations) -> None:
        self._ops = operations
        self._forks = Forks(operations)
        self._fetchwatch = Fetchwatch(operations, self._forks.resume)
        self._spacewatch = Spacewatch(operations, self._forks.resume)
        self._accounts = Accounts(operations)
        self._awaited: list[str] = []  # names of machines whose snapshots are being pulled

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, state: StateDir) -> AsyncIterator[Engine]:
        """Make what should be (the database) and what is (the directories, the processes) agree, then serve. Machines stay when it closes."""
        state.create()
        host = Host(state)
        await host.open()
        async with Database.open(state.database) as database:
            operations = Operations(state, database, host)
            try:
                await recovery.reconcile(operations)
                engine = cls(operations)
                engine._fetchwatch.begin()
                engine._spacewatch.begin()
                await engine._forks.recover()
                sample = sample_host if caretaker.wanted(os.environ) else None
                async with Caretaker(operations, engine._forks, sample=sample, budget=caretaker.budget(os.environ)).working():
                    yield engine
            finally:
                await operations.close()

    # machines

    async def info(self) -> HostInfo:
        entries = self._ops.entries.values()
        parked = sum(bool(e.record.pool) for e in entries)
        running = sum(e.record.state is State.RUNNING for e in entries)
        committed = sum(has.memory for e in entries if (has := e.claim()))
        return await self._ops.host.info(len(entries) - parked, running, parked, committed)

    async def create(self, spec: Spec) -> Machine:
        spec = specs.check(spec)
        if any(entry.record.name == spec.name for entry in self._ops.entries.values()):
            raise ExistsError(
                f"there is a machine {spec.name} already", hint=f"`ramet show {spec.name}` shows it; name the new one otherwise."
            )
        record = Record(id=os.urandom(6).hex(), name=spec.name, state=State.CREATING, spec=spec, created_at=time.time())
        entry = self._ops.add(record)
        await self._ops.perform(entry, Operation.CREATE, self._ops.bring_up)
        return await self._view(entry)

    async def list(self) -> builtins.list[Machine]:
        entries = [entry for entry in self._ops.entries.values() if not entry.record.pool]
        usage = await self._accounts.of(entries)
        return [views.machine(self._ops, entry, usage.get(entry.record.id, Usage())) for entry in entries]

    async def get(self, name: str) -> Machine:
        entry = self._entry(name)
        return views.machine(self._ops, entry, await self._accounts.one(entry, ask=True))

    async def start(self, name: str) -> Machine:
        entry = self._entry(name)
        await self._ops.perform(entry, Operation.START, self._ops.bring_up)
        return await self._view(entry)

    async def stop(self, name: str, *, force: bool = False) -> Machine:
        entry = self._entry(name)
        if force and entry.sought:
            await self._ops.cancel(entry)
        await self._ops.perform(entry, Operation.STOP, lambda e: self._ops.take_down(e, force=force))
        return await self._view(entry)

    async def update(self, name: str, *, memory: int | None = None, reclaim: Reclaim | None = None) -> Machine:
        entry = self._entry(name)
        await updating.update(self._ops, entry, memory=memory, reclaim=reclaim)
        return await self._view(entry)

    async def delete(self, name: str) -> None:
        entry = self._entry(name)
        if entry.operation is Operation.DELETE:
            raise BusyError(f"{entry.record.name} is busy: delete")
        await self._ops.drop(entry)
        await self._forks.sweep()

    # snapshots

    async def fork(self, name: str, *, count: int = 1, names: tuple[str, ...] = ()) -> builtins.list[ForkOutcome]:
        entry = self._entry(name)
        outcomes = await self._forks.fork(entry, names or self._forks.children(entry, count))
        return [
            ForkOutcome(name=child, error={"code": made.code, "message": made.message, "hint": made.hint})
            if isinstance(made, RametError)
            else ForkOutcome(name=child, machine=views.machine(self._ops, made))
            for child, made in outcomes.items()
        ]

    async def pause(self, name: str) -> Machine:
        entry = self._entry(name)
        await self._forks.pause(entry)
        return await self._view(entry)

    async def resume(self, name: str) -> Machine:
        entry = self._entry(name)
        self._spacewatch.require_room(entry)
        await (self._fetchwatch.hurry if entry.waiting else self._forks.resume)(entry)
        return await self._view(entry)

    async def hibernate(self, name: str, *, slim: bool = True) -> Machine:
        entry = self._entry(name)
        await self._forks.hibernate(entry, slim=slim)
        return await self._view(entry)

    async def compact(self, name: str) -> int:
        return await self._forks.compact(self._entry(name))

    async def snapshot(self, name: str, label: str = "", *, memory: bool = True, test: bool = True) -> Snapshot:
        return await self._saved(await self._forks.snapshot(self._entry(name), label, memory=memory, test=test))

    async def snapshots(self, name: str = "") -> builtins.list[Snapshot]:
        wanted = self._entry_or_gone(name)
        found = builtins.list(self._ops.snapshots.values())
        return [await self._saved(each) for each in found if (each.machine == wanted if wanted else each.name)]

    async def get_snapshot(self, snapshot: str) -> Snapshot:
        return await self._saved(lineage.find(self._ops.snapshots, snapshot))

    async def restore(self, name: str, snapshot: str = "") -> Machine:
        entry = self._entry(name)
        await self._forks.restore(entry, snapshot)
        return await self._view(entry)

    async def create_from(self, snapshot: str, name: str, *, disk_only: bool = False) -> Machine:
        self._forks.require_free([name])
        found = await self._here(snapshot, name)
        return views.machine(self._ops, await self._forks.create_from(found, name, disk_only=disk_only))

    async def _here(self, name: str, machine: str) -> Snapshot:
        """The snapshot of this name, pulled where only a registry can have it: lazily, for a machine that is to be made."""
        try:
            return lineage.find(self._ops.snapshots, name)
        except NotFoundError:
            if not _in_registry(name):
                raise
        self._awaited.append(machine)
        try:
            done = await pulling.pull(self._ops, name, lazy=True, say=self._ops.bus.teller("pull", machine))
        finally:
            self._awaited.remove(machine)
        return lineage.find(self._ops.snapshots, done.snapshot)

    async def template(self, snapshot: str, *, label: str = "", pool: int = 0) -> Snapshot:
        return await self._saved(await self._forks.template(lineage.find(self._ops.snapshots, snapshot), label, pool))

    async def delete_snapshot(self, snapshot: str, *, cascade: bool = False, dry_run: bool = False) -> builtins.list[str]:
        return await self._forks.delete(lineage.find(self._ops.snapshots, snapshot), cascade=cascade, dry_run=dry_run)

    async def tree(self) -> builtins.list[TreeNode]:
        entries = self._ops.entries
        usage = await self._accounts.of(entries.values())
        saved = {each.id: await self._saved(each) for each in builtins.list(self._ops.snapshots.values())}
        names = {image.digest: image.reference for image in await asyncio.to_thread(images.known, self._ops.state)}
        records = {entry.record.id: entry.record for entry in entries.values()}
        return lineage.tree(records, saved, usage, names)

    async def layers(self) -> builtins.list[LayerInfo]:
        found = await asyncio.to_thread(self._ops.store.layers)
        oldest = sorted(found, key=lambda each: each.created_at)
        return await asyncio.to_thread(views.layers, self._ops, oldest)

    async def get_layer(self, layer: str) -> LayerInfo:
        return (await asyncio.to_thread(lambda: views.layers(self._ops, [self._ops.store.get(layer)])))[0]

    async def verify_layer(self, layer: str) -> builtins.list[str]:
        return await asyncio.to_thread(self._ops.store.verify, layer)

    async def export_layer(self, layer: str) -> AsyncIterator[bytes]:
        files = self._ops.store.files
        fetch = functools.partial(fetching.fetch_now, files, layer, nudge=self._ops.layers.nudge)
        if (await asyncio.to_thread(self._ops.store.get, layer)).origin:
            await self._ops.use_layers()  # with the file system there is somebody who fetches
        chain = await asyncio.to_thread(Chain.open, files, layer, fetch=fetch)
        try:
            for offset in range(0, chain.size, _PIECE):
                yield b"".join(await asyncio.to_thread(chain.read, offset, _PIECE))
        finally:
            chain.close()

    # registries, and what is kept

    async def push(self, snapshot: str, reference: str) -> Transfer:
        found = lineage.find(self._ops.snapshots, snapshot)
        return await pushing.push(self._ops, self._forks.sealer, found, reference, self._ops.bus.teller("push", reference))

    async def pull(self, reference: str, *, lazy: bool = False) -> Transfer:
        return await pulling.pull(self._ops, reference, lazy=lazy, say=self._ops.bus.teller("pull", reference))

    async def convert(self, image: str, name: str = "") -> Snapshot:
        return await self._saved(await converting.convert(self._ops, image, name, self._ops.bus.teller("convert", image)))

    async def gc(self, *, budget: int | None = None, dry_run: bool = False) -> Collected:
        return await collecting.collect(self._ops, budget=budget, dry_run=dry_run)

    async def fsck(self, *, repair: bool = False) -> builtins.list[str]:
        return await checking.check(self._ops, repair=repair)

    async def read_blob(self, digest: str, *, offset: int = 0, length: int = -1) -> AsyncIterator[bytes]:
        fd, end = await asyncio.to_thread(remote.lend, self._ops.store.files, digest, offset, length)
        try:
            while offset < end:
                piece = await asyncio.to_thread(os.pread, fd, min(_PIECE, end - offset), offset)
                if not piece:
                    raise LayerError(f"blob {digest} is cut short")
                yield piece
                offset += len(piece)
        finally:
            os.close(fd)

    # logs

    async def logs(self, name: str, *, source: str = "console", lines: int = 200) -> bytes:
        entry = self._entry(name)
        if source not in _LOGS:
            raise SpecError(f"there is no log {source!r}: write {' or '.join(_LOGS)}")
        files = self._ops.state.machine(entry.record.id)
        text = await asyncio.to_thread(vm.tail, files.console if source == "console" else files.qemu_log, 2 * vm.LOG_CAP)
        return "".join(text.splitlines(keepends=True)[-lines:] if lines > 0 else []).encode()

    async def metrics(self, name: str) -> dict[str, float]:
        guest = await self._guest(name, use=False).metrics()
        return guest | await self._accounts.metrics(self._entry(name))

    async def ping(self, name: str) -> None:
        """The least that the line to a guest can do, for benches to compare with."""
        await self._guest(name, use=False).ping()

    # commands

    async def run(self, name: str, command: Command, stdin: bytes = b"") -> Result:
        entry = self._running(name)
        return await commands.run(self._guest(name), self._effective(entry, command), stdin)

    async def execute(self, name: str, command: Command) -> AsyncGenerator[ProcessEvent, None]:
        entry = self._running(name)
        stream = self._guest(name).execute(self._effective(entry, command))
        async with contextlib.aclosing(self._streamed(entry, stream)) as events:
            async for event in events:
                yield event

    async def attach(self, name: str, process: int) -> AsyncGenerator[ProcessEvent, None]:
        entry = self._running(name)
        stream = self._guest(name).attach(process)
        async with contextlib.aclosing(self._streamed(entry, stream)) as events:
            async for event in events:
                yield event

    async def _streamed(self, entry: Entry, stream: Stream) -> AsyncGenerator[ProcessEvent, None]:
        """Pass events on; meanwhile the process takes input by its number."""
        number = 0
        try:
            async with contextlib.aclosing(stream.events()) as events:
                async for event in events:
                    if isinstance(event, Started):
                        number = event.process
                        entry.streams[number] = stream
                    yield event
        finally:
            if entry.streams.get(number) is stream:
                del entry.streams[number]

    async def processes(self, name: str) -> builtins.list[Process]:
        return await self._guest(name).processes()

    async def send_input(self, name: str, process: int, data: bytes, *, eof: bool = False) -> None:
        stream = self._running(name).streams.get(process)
        if stream is None:
            raise NotFoundError(
                f"nobody is attached to process {process} of {name}", hint="`ramet attach` first; input goes where output is seen."
            )
        await stream.write(data)
        if eof:
            stream.eof()

    async def signal(self, name: str, process: int, signal: int) -> None:
        if signal not in signals.valid_signals():
            raise SpecError(f"{signal} is not a signal's number")
        await self._guest(name).signal(process, signal)

    async def resize(self, name: str, process: int, rows: int, columns: int) -> None:
        if not (0 < rows < 1 << 16 and 0 < columns < 1 << 16):
            raise SpecError("a terminal has 1 to 65535 rows and columns")
        await self._guest(name).resize(process, rows, columns)

    async def forget(self, name: str, process: int) -> None:
        await self._guest(name).forget_process(process)

    # files

    def read_file(self, name: str, path: str, *, offset: int = 0, length: int = -1, user: str = "") -> AsyncIterator[bytes]:
        return guestfs.read(self._guest(name), path, offset, length, self._user(name, user))

    async def write_file(
        self,
        name: str,
        path: str,
        data: AsyncIterable[bytes],
        *,
        mode: int = 0o644,
        offset: int = 0,
        flags: str = WRITE_FLAGS,
        user: str = "",
    ) -> None:
        await guestfs.write(self._guest(name), path, data, mode=mode, offset=offset, flags=flags, user=self._user(name, user))

    async def stat_file(self, name: str, path: str, *, user: str = "") -> FileInfo:
        return await guestfs.stat(self._guest(name), path, self._user(name, user))

    async def list_files(self, name: str, path: str, *, user: str = "") -> builtins.list[FileInfo]:
        return await guestfs.entries(self._guest(name), path, self._user(name, user))

    async def remove_file(self, name: str, path: str, *, recursive: bool = False, user: str = "") -> None:
        await guestfs.remove(self._guest(name), path, recursive=recursive, user=self._user(name, user))

    async def rename_file(self, name: str, path: str, target: str, *, user: str = "") -> None:
        await guestfs.rename(self._guest(name), path, target, self._user(name, user))

    async def make_dir(self, name: str, path: str, *, mode: int = 0o755, parents: bool = True, user: str = "") -> None:
        await guestfs.make_dir(self._guest(name), path, mode=mode, parents=parents, user=self._user(name, user))

    def pack(self, name: str, path: str, *, user: str = "") -> AsyncIterator[bytes]:
        return guestfs.pack(self._guest(name), path, self._user(name, user))

    async def unpack(self, name: str, path: str, data: AsyncIterable[bytes], *, owners: bool = False, user: str = "") -> None:
        await guestfs.unpack(self._guest(name), path, data, owners=owners, user=self._user(name, user))

    # ports, events

    async def open_port(self, name: str, port: Port) -> Port:
        return await self._ops.open_port(self._running(name), port)

    async def close_port(self, name: str, guest: int) -> None:
        forward = self._running(name).forwards.pop(guest, None)
        if forward is None:
            raise NotFoundError(f"port {guest} of {name} is not open on this host")
        await forward.close()

    def events(self, name: str = "") -> AsyncIterator[Event]:
        # What is pushed, pulled and converted has a name that no machine can have.
        known = name in ("", *self._awaited) or any(mark in name for mark in "@:/")
        return self._ops.bus.subscribe(name if known else self._entry(name).record.name)

    # lookups

    def _entry(self, name: str) -> Entry:
        for entry in self._ops.entries.values():
            if name in (entry.record.name, entry.record.id) and not entry.record.pool:
                return entry
        raise NotFoundError(f"there is no machine {name!r}", hint="`ramet list` shows the machines there are.")

    def _running(self, name: str, *, use: bool = True) -> Entry:
        """use: whether somebody works with the machine, and does not only look at it."""
        entry = self._entry(name)
        lifecycle.require(entry.record.name, entry.record.state, {State.RUNNING}, "use")
        if use:
            entry.last_used = time.monotonic()
        return entry

    def _guest(self, name: str, *, use: bool = True) -> Guest:
        entry = self._running(name, use=use)
        entry.require_found()
        if entry.vm is None:
            raise BusyError(f"{name} has just ended", hint="`ramet list` shows why.")
        return entry.vm.guest

    def _user(self, name: str, user: str) -> str:
        """Files belong to the machine's user, unless another is named."""
        entry = self._entry(name)
        return user or entry.record.spec.user or entry.image.user

    def _effective(self, entry: Entry, command: Command) -> Command:
        if not command.argv:
            raise SpecError("a command needs at least a program's name")
        return commands.effective(entry.record.spec, entry.image, command)

    def _entry_or_gone(self, name: str) -> str:
        """The name of a machine, or of one that is gone and has left snapshots."""
        if not name or any(each.machine == name for each in self._ops.snapshots.values()):
            return name
        return self._entry(name).record.name

    async def _view(self, entry: Entry) -> Machine:
        """The machine as users see it, with what it costs now."""
        return views.machine(self._ops, entry, await self._accounts.one(entry))

    async def _saved(self, snapshot: Snapshot) -> Snapshot:
        return await asyncio.to_thread(views.snapshot, self._ops, snapshot)


def _in_registry(name: str) -> bool:
    """Whether a snapshot's name is one that a registry could have it by."""
    with contextlib.suppress(ImageError):
        return "/" in name and isinstance(references.parse(name), references.Registry)
    return False
