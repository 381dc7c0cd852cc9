"""Forks: how long the parent stands still, how soon a child answers, from a pool too, at depth 20, and what 50 generations leave behind."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import statistics
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from ramet import bringup, disks, network
from ramet.bench import bed, members
from ramet.bench.bed import Bed
from ramet.bench.figures import Figure, Report, distribution, limit
from ramet.bench.members import MB, Share
from ramet.errors import HostError
from ramet.guest import Guest
from ramet.identity import Identity
from ramet.model import Snapshot, SnapshotState
from ramet.vm import machine as vm
from ramet.vm.machine import Vm

ANSWERED, COMMAND, COLD_SHARE, POOLED = 0.15, 0.25, 1 / 8, 0.03
PAUSE, PAUSE_MB = 15.0, 2.0  # milliseconds, and for each MB written
DEEPER = 1.5
COUNT, COLD, PAUSES, DEPTH, GENERATIONS, LARGE = 15, 3, 5, 20, 50, 4096
WRITTEN = (0, 8, 64)  # MiB, one after the other
_GROWTH = 1024  # KiB: the allocator keeps what it once had, in steps
_WARM_UP = 3  # generations that do not count: modules are imported, tables grow to their size
_ROUNDS = 5  # forks at each end of the depth
_PARENT, _CHILD, _POOL = "bench-parent", "bench-child", "bench-pool:latest"
_MIB = 1 << 20


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=COUNT, help="forks, and claims from the pool (default: %(default)s)")
    parser.add_argument("--cold", type=int, default=COLD, help="cold boots (default: %(default)s)")
    parser.add_argument("--pauses", type=int, default=PAUSES, help="forks for each pause (default: %(default)s)")
    parser.add_argument(
        "--large", type=int, default=LARGE, help="MiB of the larger machine whose pause is measured; 0: none (default: %(default)s)"
    )
    parser.add_argument("--depth", type=int, default=DEPTH, help="forks of forks (default: %(default)s)")
    parser.add_argument(
        "--generations", type=int, default=GENERATIONS, help="forks, each of the last one, which is deleted (default: %(default)s)"
    )


# how soon a child answers


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Seconds from the request to fork.

    up: the child's agent answered; forked: the request was answered; first: the child's first command was, second: how long the next one took.
    pause: of the parent. steps: when each began; the two machines' go on side by side.
    """

    up: float
    forked: float
    first: float
    second: float
    pause: float
    steps: dict[str, float]


async def sample(found: Bed, parent: str, name: str) -> Sample:
    """Fork a machine and run a command in the child."""
    engine = found.engine
    await members.settled(engine)
    async with members.watched(engine) as marks:
        wall, began = time.time(), time.perf_counter()
        child = await members.forked(engine, parent, name)
        forked = time.perf_counter() - began
        await members.first_command(engine, name)
        first = time.perf_counter() - began
        await members.first_command(engine, name)
        second = time.perf_counter() - began - first
    assert child.started_at
    up = child.started_at - wall
    saved = await members.last_saved(engine, parent)
    steps: dict[str, float] = {}
    for mark in marks:
        steps.setdefault(f"the {'child' if mark.machine == name else 'parent'}: {mark.step}", mark.at)
    return Sample(up=up, forked=forked, first=first, second=second, pause=saved.pause or 0.0, steps=steps)


async def by_hand(found: Bed, saved: Snapshot) -> dict[str, float]:
    """Seconds of what is done for a child, without the engine and its records."""
    files = found.state.machine("by-hand")
    who = Identity(hostname="by-hand", machine_id=os.urandom(16).hex(), generation=str(uuid.uuid4()))
    try:
        made = await disks.make(found.state, files, saved.spec, saved.disk_layers)
        where = disks.arguments(found.state, files, made, saved.image_digest, found.boot.disk_io)
        config = bringup.config(saved.spec, found.boot, network.USER, disks=where, memory_file=found.state.store.served(saved.memory_layer))
        began = time.perf_counter()
        times = {}
        machine = await Vm.launch(files, config, found.boot.binaries.shim)
        times["QEMU's start, until its monitor answers"] = time.perf_counter()
        try:
            guest = await Guest.reach(files.agent)
            await machine.load(found.state.snapshot(saved.id).state)
            times["loading the devices"] = time.perf_counter()
            guest.greet(resync=False, identity=who)
            await machine.monitor("cont")
            await guest.answered(members.DEADLINE)
            times["the agent, until it has its new identity and answers"] = time.perf_counter()
            guest.abort("measured")
        finally:
            await machine.kill()
    finally:
        await vm.kill(files)
        bringup.remove_tree(files.root)
    ends = [began, *times.values()]
    return {step: ends[number + 1] - ends[number] for number, step in enumerate(times)}


async def children(found: Bed, arguments: argparse.Namespace, share: Share) -> list[Figure]:
    """Cold boots, then forks with a warm page cache."""
    colds = [await members.cold(found.engine, _PARENT) for _ in range(max(1, arguments.cold) + 1)][1:]
    samples, hands = [], []
    for _ in range(max(1, arguments.count) + 1):
        samples.append(await sample(found, _PARENT, _CHILD))
        await share.drop(_CHILD)
        await members.settled(found.engine)
        hands.append(await by_hand(found, await members.last_saved(found.engine, _PARENT)))
    samples, hands = samples[1:], hands[1:]  # the first one warms up
    applies = share.now() <= bed.IDLE
    first = [each.first for each in samples]
    return [
        distribution("fork, until the child's agent answered", [each.up for each in samples], "s", ANSWERED, applies=applies),
        distribution("fork, until the child's first command (a new process) answered", first, "s", COMMAND, applies=applies),
        limit("the same, as a share of a cold boot's", statistics.median(first) / statistics.median(colds), "x", COLD_SHARE),
        distribution("first command answered after a cold boot", colds, "s"),
        distribution("pause of the parent", [each.pause for each in samples], "s"),
        *_steps(samples),
        distribution("the request answered, after the agent", [each.forked - each.up for each in samples], "s"),
        distribution("the command, after that", [each.first - each.forked for each in samples], "s"),
        distribution("a second command of the child", [each.second for each in samples], "s"),
        *(distribution(f"without the engine: {step}", [each[step] for each in hands], "s") for step in hands[0]),
    ]


def _steps(samples: list[Sample]) -> list[Figure]:
    begins: dict[str, list[float]] = {}
    for each in samples:
        for step, at in each.steps.items():
            begins.setdefault(step, []).append(at)
    order = sorted(begins, key=lambda step: statistics.median(begins[step]))
    return [distribution(f"when it began: {step}", begins[step], "s") for step in order]


async def pool(found: Bed, arguments: argparse.Namespace, share: Share) -> list[Figure]:
    """Machines that were restored, ran one command and were parked before."""
    engine = found.engine
    saved = await engine.snapshot(_PARENT, "pool", test=False)

    async def ready() -> bool:
        return (await engine.get_snapshot(saved.id)).state is SnapshotState.READY

    await members.until("compressing", ready)
    await engine.template(saved.id, label=_POOL, pool=1)
    claimed, first = [], []
    for _ in range(max(1, arguments.count)):
        await members.parked(engine, _POOL, 1)
        began = time.perf_counter()
        await engine.create_from(_POOL, _CHILD)
        claimed.append(time.perf_counter() - began)
        await members.first_command(engine, _CHILD)
        first.append(time.perf_counter() - began)
        await share.drop(_CHILD)
    await engine.delete_snapshot(_POOL, cascade=True)
    applies = share.now() <= bed.IDLE
    return [
        distribution("from the warm pool, until the first command answered", first, "s", POOLED, applies=applies),
        distribution("of it: the request's answer", claimed, "s"),
    ]


# the parent's pause


async def pauses(found: Bed, arguments: argparse.Namespace, memory: int) -> tuple[list[Figure], list[str]]:
    """Of machines with so many MiB: booted cold, and restored, after writing more and more."""
    engine, name = found.engine, f"bench-{memory}"
    if (available := (await engine.info()).memory_available) < memory << 20:
        return [], [f"The pause of a machine with {memory} MiB was not measured: this host has {available // _MIB} MiB of free memory."]
    share = Share(found)
    await engine.create(dataclasses.replace(bed.spec(name, arguments.image), memory=memory << 20))
    child = f"{name}-restored"
    await members.forked(engine, name, child)
    seen: list[tuple[str, list[float], float]] = []
    for parent, what in ((child, "restored"), (name, "cold-booted")):
        for number, mebibytes in enumerate(WRITTEN):
            if more := mebibytes - WRITTEN[number - 1] if number else mebibytes:
                await members.written(engine, parent, more)
            took, megabytes = await _paused(found, parent, max(1, arguments.pauses), share)
            seen.append(
                (
                    f"pause of a {what} machine of {memory} MiB that had written {megabytes:.0f} MB",
                    took,
                    round(PAUSE + PAUSE_MB * megabytes),
                )
            )
    applies = share.now() <= bed.IDLE
    await share.drop(child, name)
    return [distribution(text, took, "ms", goal, applies=applies) for text, took, goal in seen], []


async def _paused(found: Bed, parent: str, count: int, share: Share) -> tuple[list[float], float]:
    """Milliseconds that several forks took of their parent, and the MB that they copied."""
    took, copied = [], []
    for _ in range(count):
        await members.settled(found.engine)
        await members.forked(found.engine, parent, _CHILD)
        saved = await members.last_saved(found.engine, parent)
        layer = await found.engine.get_layer(saved.memory_layer)
        took.append(1000 * (saved.pause or 0.0))
        if not layer.sealed:  # sealing drops zero pages and those that are as before
            copied.append(layer.data / MB)
        await share.drop(_CHILD)
    if not copied:
        raise HostError("the memory was compressed before it could be seen what was copied")
    return took, statistics.median(copied)


# depth, generations


async def deep(found: Bed, arguments: argparse.Namespace, share: Share) -> list[Figure]:
    """Forks of a machine that was restored itself, and then of one whose memory is a difference of a difference of…"""
    current = "deep-0"
    await members.forked(found.engine, _PARENT, current)
    first = await _several(found, current, share)
    for number in range(1, arguments.depth):
        below = f"deep-{number}"
        await sample(found, current, below)
        await share.drop(current)
        current = below
    last = await _several(found, current, share)
    await share.drop(current)
    return [
        limit(
            f"a fork at depth {arguments.depth}, as a multiple of one at depth 1",
            statistics.median(last) / statistics.median(first),
            "x",
            DEEPER,
        ),
        distribution("fork at depth 1, until the first command answered", first, "s"),
        distribution(f"fork at depth {arguments.depth}", last, "s"),
    ]


async def _several(found: Bed, parent: str, share: Share) -> list[float]:
    took = []
    for _ in range(_ROUNDS):
        took.append((await sample(found, parent, _CHILD)).first)
        await share.drop(_CHILD)
    return took


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """What there is on the host of this run's machines, and in this process. Memory in KiB."""

    processes: int
    mounts: int
    files: int
    layers: int
    descriptors: int
    tasks: int
    memory: int
    workers: int


async def holdings(found: Bed, current: str) -> Holdings:
    """Once nothing is compressed any more, and something was deleted after that: layers are collected only then."""
    await members.forked(found.engine, current, _CHILD)
    await members.settled(found.engine)
    await found.engine.delete(_CHILD)
    state = found.state
    files = sum(len(names) for place, _, names in os.walk(state.root) if not place.startswith(str(state.store.mount)))
    return Holdings(
        processes=len(members.processes(state)),
        mounts=len(Path("/proc/self/mountinfo").read_text().splitlines()),
        files=files,
        layers=len(await found.engine.layers()),
        descriptors=sum(1 for _ in Path("/proc/self/fd").iterdir()),
        tasks=len(asyncio.all_tasks()),
        memory=_resident("self"),
        workers=sum(map(_resident, members.served_by(state))),
    )


def _resident(pid: int | str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


async def generations(found: Bed, arguments: argparse.Namespace, share: Share) -> list[Figure]:
    """Fork, delete the parent, fork the child…"""
    current = "generation-0"
    await members.forked(found.engine, _PARENT, current)

    async def descend(numbers: range) -> None:
        nonlocal current
        for number in numbers:
            await members.forked(found.engine, current, child := f"generation-{number}")
            await members.first_command(found.engine, child)
            await share.drop(current)
            current = child

    await descend(range(1, _WARM_UP + 1))
    before = await holdings(found, current)
    await descend(range(_WARM_UP + 1, _WARM_UP + 1 + arguments.generations))
    after = await holdings(found, current)
    await share.drop(current)

    def more(what: str, name: str, unit: str, at_most: float) -> Figure:
        return limit(f"after {arguments.generations} generations, more {what}", getattr(after, name) - getattr(before, name), unit, at_most)

    return [
        more("processes", "processes", "", 0),
        more("mounts", "mounts", "", 0),
        more("files of the state directory", "files", "", 0),
        more("layers", "layers", "", 0),
        more("descriptors of the daemon's process", "descriptors", "", 0),
        more("tasks of its event loop", "tasks", "", 0),
        more("memory of it", "memory", "KiB", _GROWTH),
        more("memory of the image file system", "workers", "KiB", _GROWTH),
    ]


async def run(arguments: argparse.Namespace) -> Report:
    async with bed.place() as state, bed.opened(state) as found:
        share, notes = Share(found), []
        await found.engine.create(bed.spec(_PARENT, arguments.image))
        measured = [
            *await children(found, arguments, share),
            *await pool(found, arguments, share),
            *await deep(found, arguments, share),
            *await generations(found, arguments, share),
        ]
        await share.drop(_PARENT)
        for memory in filter(None, (bed.spec("", "").memory // _MIB, arguments.large)):
            figures, said = await pauses(found, arguments, memory)
            measured += figures
            notes += said
        return Report(header=found.header, figures=tuple(measured), notes=(*_notes(), *notes, *filter(None, [bed.idleness(share.now())])))


def _notes() -> list[str]:
    forks = (
        "A fork's times are from the request, with a warm page cache, and nothing being compressed; the rows `when it began` count from there, too: saving "
        "the parent and starting the child go on side by side. The rows `without the engine` are the same start from a saved instant, done by hand. A "
        "machine of the pool had run one command before it was parked, and the next one is made ready while the claimed one runs its first."
    )
    paused = (
        "What a machine had written is what its fork copied: private pages of QEMU's memory, before compression drops those that are zero. A "
        "cold-booted machine has written all that is in its memory."
    )
    depth = "The machine at depth 1 was restored itself. Each generation is a fork of the one before, which is then deleted."
    goal = "The goals in seconds and milliseconds are for an idle host of two cores without KVM; on one that is not idle they cannot fail."
    return [forks, paused, depth, goal]
