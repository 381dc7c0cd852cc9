"""After an accident: what must be true of machines, snapshots, layers, processes and mounts; and a program in the guest that tells whether it went on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ramet import disks, images, locks, process
from ramet.engine import Engine
from ramet.errors import RametError
from ramet.model import Command, Machine, Snapshot, SnapshotState, State
from ramet.operations import Entry
from ramet.paths import StateDir
from ramet.store import garbage
from ramet.vm import capture, disk
from ramet.vm import machine as vm
from tests.fixtures import Box

DEADLINE = 240.0
WATCHES = ("Operations._died", "Operations._layers_died", "Fetchwatch._follow", "Fetchwatch._ask")  # wait for what may never come
ROOT = Path(__file__).parents[2]
TICKER = "echo $$ > /run/pid; n=0; while :; do n=$((n+1)); echo $n > /run/n.new; mv /run/n.new /run/n; usleep 200000; done"
GOES_ON = 'kill -0 $(cat /run/pid) || exit 1; a=$(cat /run/n); while [ "$a" = "$(cat /run/n)" ]; do usleep 20000; done; cat /run/n'


@dataclass
class Nursery:
    """A process that has one engine after the other do something and die. See `doomed`."""

    process: asyncio.subprocess.Process

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls) -> AsyncIterator[Nursery]:
        words = [sys.executable, "-m", "tests.machine.doomed"]
        async with process.running(words, cwd=ROOT, stdin=asyncio.subprocess.PIPE, env=process.confided()) as child:
            yield cls(child)

    async def begin(self, state: StateDir, moment: str, verb: str, **arguments: Any) -> int:
        """The pid of an engine that is at it."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps([str(state.root), moment, verb, json.dumps(arguments)]).encode() + b"\n")
        return int((await self._line("pid ")).split()[1])

    async def die(self, state: StateDir, moment: str, verb: str, **arguments: Any) -> None:
        """Let an engine do something and die at a moment; AssertionError when it does not come to that."""
        pid = await self.begin(state, moment, verb, **arguments)
        if (line := await self._line("ended ", "done")) != f"ended -{signal.SIGKILL.value}":
            if line == "done":
                await self.end(pid)
            raise AssertionError(f"{verb} did not come to {moment}: {line}")

    async def survive(self, state: StateDir, verb: str, **arguments: Any) -> None:
        """Let an engine do something, and kill it when it is idle."""
        pid = await self.begin(state, "never", verb, **arguments)
        await self._line("done")
        await self.end(pid)

    async def moments(self, state: StateDir, verb: str, **arguments: Any) -> list[str]:
        """What a good run passes; its engine is killed when it is idle."""
        pid = await self.begin(state, "list", verb, **arguments)
        passed: list[str] = json.loads(await self._line("["))
        await self._line("done")
        await self.end(pid)
        return passed

    async def end(self, pid: int) -> None:
        """Kill an engine that is at it, or idle."""
        os.kill(pid, signal.SIGKILL)
        await self._line("ended ")

    async def _line(self, *starts: str) -> str:
        """The next line that begins so; an end that is not waited for is an error, as what was said before tells."""
        assert self.process.stdout
        heard = []
        async with asyncio.timeout(DEADLINE):
            while line := (await self.process.stdout.readline()).decode().rstrip("\n"):
                heard.append(line)
                if line.startswith(starts) and line != "ended 1":
                    return line
                if line.startswith("ended "):
                    break
        raise AssertionError("\n".join(heard[-12:]))


@dataclass
class Trouble:
    """What went wrong at which moment: the others are looked at all the same, and what stays wrong is told once."""

    found: list[str] = field(default_factory=list)
    _told: set[str] = field(default_factory=set)

    @contextlib.contextmanager
    def at(self, moment: str) -> Iterator[None]:
        try:
            yield
        except (AssertionError, RametError, OSError) as error:  # a TimeoutError is an OSError
            where = [f"{Path(each.filename).name}:{each.lineno}" for each in traceback.extract_tb(error.__traceback__)]
            new = [str(each) for each in error.args or [f"nothing more at {moment}"] if str(each) not in self._told]
            self._told |= set(new)
            self.found += [f"{moment}: {each} ({type(error).__name__}, {' < '.join(reversed(where[1:]))})" for each in new]

    def check(self) -> None:
        assert not self.found, "\n".join(["", *self.found])


async def busy(box: Box) -> None:
    """Start the program that counts."""
    command = Command(argv=("sh", "-c", TICKER), detach=True, label="ticker")
    async with contextlib.aclosing(box.engine.execute(box.name, command)) as events:
        await anext(events)
    await box.sh("while ! [ -s /run/n ]; do usleep 10000; done")


async def goes_on(box: Box) -> int:
    """How far the program has counted; it is the same one, and counts on."""
    return int(await box.text(GOES_ON, timeout=120))


async def went_on(box: Box, count: int) -> int:
    """The same, from `count` and not from anew."""
    now = await goes_on(box)
    if now <= count:
        raise AssertionError(f"it has counted to {now}, and had been at {count} before")
    return now


async def note(box: Box, name: str) -> None:
    """Write a file that is known again."""
    await box.sh(f"echo {name} > /srv/{name}; sync")


async def notes(box: Box) -> list[str]:
    """The files that were noted, by the disk and not by the page cache; each must be whole."""
    await box.sh("echo 3 > /proc/sys/vm/drop_caches; cd /srv; for f in *; do [ $f = $(cat $f) ] || exit 1; done")
    return (await box.text("ls /srv")).split()


async def settled(engine: Engine) -> None:
    """Wait until nothing is done to any machine or snapshot, in the foreground or behind it."""

    def pending() -> set[asyncio.Task[None]]:
        ops = engine._ops
        behind = {task for task in ops._background if getattr(task.get_coro(), "__qualname__", "") not in WATCHES}
        return {task for task in behind | {each.task for each in ops.entries.values() if each.task} if not task.done()}

    async with asyncio.timeout(DEADLINE):
        while tasks := pending():
            await asyncio.wait(tasks)


async def sound(engine: Engine, *, unsettled: bool = False) -> dict[str, Machine]:
    """Everything is as the engine tells it, and nothing is there that it does not tell. The machines, by name.

    unsettled: a machine may write to an overlay that its next save or start is to give its place.
    """
    await settled(engine)
    wrong: list[str] = []
    for snapshot in engine._ops.snapshots.values():
        wrong += await _whole(engine, snapshot)
    for entry in engine._ops.entries.values():
        wrong += [f"{entry.record.name}: {each}" for each in await _true(engine, entry, unsettled)]
    wrong += _alone(engine)
    if wrong:
        raise AssertionError(*wrong)
    return {machine.name: machine for machine in await engine.list()}


async def _whole(engine: Engine, snapshot: Snapshot) -> list[str]:
    """What is wrong with a snapshot that nothing is done to any more."""
    if snapshot.state is not SnapshotState.READY:
        return [f"snapshot {snapshot.title} is {snapshot.state}: {snapshot.reason}"]
    wrong = []
    for layer in snapshot.layers:
        if not engine._ops.store.get(layer).sealed:
            wrong.append(f"layer {layer} of {snapshot.title} is not sealed")
        wrong += await engine.verify_layer(layer)
    return wrong


async def _true(engine: Engine, entry: Entry, unsettled: bool) -> list[str]:
    """In what a machine is not as its record says."""
    record, files, wrong = entry.record, engine._ops.state.machine(entry.record.id), []
    live = record.state in (State.RUNNING, State.PAUSED)
    if not live and record.state not in (State.STOPPED, State.FAILED, State.HIBERNATED):
        wrong.append(f"it is {record.state}, for ever")
    if vm.is_alive(files) is not live:
        wrong.append(f"it is {record.state}, and {'lives' if vm.is_alive(files) else 'is dead'}")
    if record.state is State.FAILED and not record.reason:
        wrong.append("it failed for no reason")
    there = sorted(path.name for path in files.root.iterdir()) if files.root.is_dir() else []
    found = disk.read(files)
    numbers = {at: each.number for at, each in enumerate(found)}
    if found and not (unsettled and all(disk.others(files, each) == [each.number + 1] for each in found)):
        overlays = {name for name in there if name.startswith("disk-")}
        active = await capture.active_overlays(entry.vm) if live and entry.vm else numbers
        if overlays != {files.overlay(each.number, each.name).name for each in found} or active != numbers:
            wrong.append(f"its disk is {found}, it has {overlays}, and writes to {active}")
    if left := {name for name in there if name.endswith(".new")} - {".exit.new"}:  # which the shim has ready
        wrong.append(f"left behind: {left}")
    if live and entry.vm is None:
        wrong.append(f"it is {record.state}, and not connected")
    elif live and entry.vm:
        if await entry.vm.running() is not (record.state is State.RUNNING):
            wrong.append(f"it is {record.state}, and that is not so")
        elif record.state is State.RUNNING and not record.pool and (name := await Box(engine, record.name).text("hostname")) != record.name:
            wrong.append(f"it thinks that it is {name}")
    return wrong


def _alone(engine: Engine) -> list[str]:
    """What is there and belongs to nobody; and what is not there."""
    ops, state = engine._ops, engine._ops.state
    layers, blobs = _needed(engine)
    wanted: dict[str, tuple[set[str], set[str]]] = {
        "machines": (_names(state.machines), {each for each in ops.entries if state.machine(each).root.exists()}),
        "snapshots": (_names(state.snapshots), set(ops.snapshots)),
        "layers": (_names(state.store.layers), layers),
        "blobs": (_names(state.store.blobs), blobs),
        "processes": (set(running(state)), set(owned(engine))),
        "mounts": (set(mounts(state)), {str(state.store.mount)} if mounts(state) else set()),
    }
    wrong = [f"{what} of nobody: {each}" for what, (found, due) in wanted.items() for each in found - due]
    return wrong + [f"{what} that are not there: {each}" for what, (found, due) in wanted.items() for each in due - found]


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def _needed(engine: Engine) -> tuple[set[str], set[str]]:
    """The layers and blobs that a snapshot, a machine or an image stands on."""
    ops = engine._ops
    layers = {each.id: each for each in ops.store.layers()}
    keep = images.layers(ops.state) & set(layers)  # which is only remembered, and perhaps by others who share the images
    keep |= {layer for each in ops.snapshots.values() for layer in each.layers}
    for entry in ops.entries.values():
        keep |= {entry.record.memory_layer, *disks.layers_of(ops.state.machine(entry.record.id))}
    needed = garbage.needed(layers, keep - {""})
    return needed, {blob.replace(":", "-") for name in needed & set(layers) for blob in layers[name].blobs}


def running(state: StateDir) -> dict[str, int]:
    """Every process of the system that was told of the state directory, but ours."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes()
            if os.fsencode(state.root) in words and int(path.name) != os.getpid():
                found[f"{path.name} {words.replace(bytes(1), b' ').decode()[:160]}"] = int(path.name)
    return found


def owned(engine: Engine) -> list[str]:
    """Those of them that should be: of machines that live, and of the image file system."""
    state = engine._ops.state
    wanted = {pid for each in engine._ops.entries.values() if each.vm for pid in vm.pids(each.vm.files).values()}
    if locks.is_held(state.store.lock):
        wanted |= {int(line.split()[1]) for line in state.store.pids.read_text().splitlines()}  # the fetcher too, if there is one
    names = {pid: name for name, pid in running(state).items()}
    return [names.get(pid, str(pid)) for pid in wanted]


def mounts(state: StateDir) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines if line.split()[4].startswith(f"{state.root}/")]


@contextlib.asynccontextmanager
async def swept(state: StateDir) -> AsyncIterator[Engine]:
    """An engine, at whose end machines and snapshots are gone, and with them every layer."""
    async with Engine.open(state) as engine:
        try:
            yield engine
        finally:
            for machine in await engine.list():
                await engine.delete(machine.name)
            for each in list(engine._ops.snapshots.values()):
                if each.id in engine._ops.snapshots:
                    await engine.delete_snapshot(each.id, cascade=True)
            await settled(engine)
    left = [path for place in (state.store.layers, state.store.blobs, state.snapshots, state.machines) for path in place.iterdir()]
    assert not left, left
    assert not running(state)
    assert not mounts(state)
