"""What a guest no longer needs goes back to the host: how much, how soon, at what cost; and the picture of it over time."""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from ramet.bench import bed, idle, members, picture, plot, returned
from ramet.bench.bed import Bed
from ramet.bench.figures import Figure, Report, at_least, distribution, limit
from ramet.bench.returned import Back, Work
from ramet.errors import HostError
from ramet.model import Reclaim
from ramet.storage import LayerInfo

FREED, COLD, DELETED = (0.95, 5.0), (0.8, 60.0), (0.95, 15.0)  # the share that is to be back, within so many seconds
SLOWDOWN = 1.05
SLIM = 1 / 3
GROWTH = 0.01  # of a deleted file, in the overlay of a fork that did not write it: what ext4 and qcow2 note about it
MEMORY, MEBIBYTES, FILE, PAIRS, ROUNDS = 1024, 300, 1000, 3, 30
_MIB = 1 << 20
PICTURE = "giveback"
TITLE = "What a machine with {memory} MiB of memory costs its host during a build and after it"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path(), help=f"directory for {PICTURE}.csv, .png and .svg (default: the current one)")
    parser.add_argument("--quick", action="store_true", help="everything small and short, to try it: its figures mean nothing")
    parser.add_argument("--memory", type=int, default=MEMORY, help="MiB of each machine (default: %(default)s)")
    parser.add_argument(
        "--only",
        action="append",
        choices=tuple(PARTS),
        help="measure this and nothing else; may be given several times (default: everything)",
    )


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured. mebibytes: freed, and read; file: deleted, in MiB; lines: that the timed work sorts; idle, settle: seconds."""

    mebibytes: int
    file: int
    pairs: int
    rounds: int
    lines: int
    idle: float
    settle: float
    pace: picture.Pace
    limits: tuple[float, float, float]


_FULL = Size(
    mebibytes=MEBIBYTES,
    file=FILE,
    pairs=PAIRS,
    rounds=ROUNDS,
    lines=1_000_000,
    idle=idle.SECONDS,
    settle=idle.SETTLE,
    pace=picture.FULL,
    limits=(FREED[1], COLD[1], DELETED[1]),
)
_QUICK = Size(mebibytes=48, file=64, pairs=1, rounds=1, lines=50_000, idle=3, settle=1, pace=picture.QUICK, limits=(5, 5, 5))


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the bench."""

    found: Bed
    image: str
    memory: int
    size: Size
    out: Path
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def say(self, *figures: Figure) -> None:
        self.figures.extend(figures)

    async def machine(self, name: str, policy: Reclaim) -> str:
        await self.found.engine.create(picture.spec(name, self.image, self.memory, policy))
        return name

    async def drop(self, *names: str) -> None:
        for name in names:
            await self.found.engine.delete(name)


async def _picture(run: Run) -> None:
    """The build in three machines, drawn."""
    points = await picture.runs(run.found, run.image, run.memory, run.size.pace)
    written = {f"{PICTURE}.csv": plot.as_csv(points).encode()}
    drawn = await asyncio.to_thread(plot.draw, points, TITLE.format(memory=run.memory))
    written |= {f"{PICTURE}.{ending}": data for ending, data in drawn.items()}
    for name, data in written.items():
        (run.out / name).write_bytes(data)
    for title, own in plot.machines(points).items():
        peak, end = max(point.memory for point in own), own[-1]
        run.say(
            Figure(figure=f"build, {title}: most memory", value=peak / _MIB, unit="MiB"),
            Figure(figure=f"build, {title}: memory in the end", value=end.memory / _MIB, unit="MiB"),
            Figure(figure=f"build, {title}: disk in the end", value=end.disk / _MIB, unit="MiB"),
        )
    run.notes.append(
        f"The build was run in three machines in turn, each looked at once a second (PSS of QEMU, blocks of its overlay): {', '.join(written)} are in "
        f"{run.out.resolve()}. Features off: no balloon's driver and so no reporting of free pages, no discard, no reclaim."
    )


def came_back(figure: str, back: Back, goal: float | None, seconds: float) -> list[Figure]:
    """The share that came back, and when nearly all of it had."""
    title = f"{figure}: back on the host within {seconds:g} s"
    share = Figure(figure=title, value=back.share * 100, unit="%") if goal is None else at_least(title, back.share * 100, "%", goal * 100)
    when = [] if back.seconds is None or goal is None else [Figure(figure=f"of that: {goal:.0%} after", value=back.seconds, unit="s")]
    return [share, *when]


async def _freed(run: Run) -> None:
    """Memory that programs freed."""
    seconds, size = run.size.limits[0], run.size.mebibytes
    cold = await run.machine("cold", Reclaim.GENTLE)
    await members.forked(run.found.engine, cold, "fork")
    await members.forked(run.found.engine, "fork", "second")
    await members.settled(run.found.engine)
    for name, title in ((cold, "cold-booted"), ("fork", "fork"), ("second", "fork of a fork")):
        run.say(*came_back(f"{size} MiB freed, {title}", await returned.freed(run.found, name, size, seconds), FREED[0], seconds))
    await run.drop("second", "fork")
    await picture.without(run.found, cold)
    run.say(*came_back(f"{size} MiB freed, features off", await returned.freed(run.found, cold, size, seconds), None, seconds))
    await run.drop(cold)


async def _cold(run: Run) -> None:
    """Page cache that nobody uses, and what the taking costs those who work."""
    seconds, size = run.size.limits[1], run.size.mebibytes
    policies = {policy: await run.machine(f"cold-{policy}", policy) for policy in (Reclaim.EAGER, Reclaim.GENTLE, Reclaim.OFF)}
    backs = await asyncio.gather(*(returned.cold(run.found, name, size, seconds) for name in policies.values()))
    for policy, back in zip(policies, backs, strict=True):
        run.say(*came_back(f"{size} MiB read once, reclaim {policy}", back, COLD[0] if policy is Reclaim.EAGER else None, seconds))
    await run.drop(*list(policies.values())[1:])
    work = await returned.slowdown(run.found, policies[Reclaim.EAGER], run.size.lines, run.size.rounds, run.size.pairs)
    run.say(*slowdown(work))
    run.notes.append(
        "The work beside the cold page cache sorts a file and computes checksums, one cpu busy. Both policies in turn in the same machine; the time is "
        "by the guest's clock, and other programs of the host are in it: the cpu's time is not touched by them as much. "
        "The ratio of times is that of the shortest ones."
    )
    await run.drop(policies[Reclaim.EAGER])


def slowdown(work: Work) -> list[Figure]:
    ratio = min(work.eager) / min(work.off)  # the least disturbed by whatever else the host does
    cpu = statistics.median(work.eager_cpu) / statistics.median(work.off_cpu)
    return [
        limit("work beside cold page cache: time under reclaim eager, as a multiple of off", ratio, "x", SLOWDOWN),
        Figure(figure="the same, of QEMU's cpu", value=cpu, unit="x"),
        distribution("the work, reclaim off", work.off, "s"),
        distribution("the work, reclaim eager", work.eager, "s"),
    ]


async def _deleted(run: Run) -> None:
    """Files that are deleted, also one that was written before a fork."""
    seconds, size = run.size.limits[2], run.size.file
    cold = await run.machine("cold", Reclaim.GENTLE)
    await returned.keep(run.found, cold, 1, size)
    await members.forked(run.found.engine, cold, "fork")
    await members.settled(run.found.engine)
    _, growth = await returned.deleted(run.found, "fork", 1, size, seconds)
    title = f"{size} MiB file written before a fork, deleted in the fork: growth of its overlay"
    grown = limit(title, growth / _MIB, "MiB", GROWTH * size)
    for name, words in (("fork", "written and deleted in a fork"), (cold, "cold-booted")):
        await returned.keep(run.found, name, 2, size)
        back, _ = await returned.deleted(run.found, name, 2, size, seconds)
        run.say(*came_back(f"{size} MiB file, {words}", back, DELETED[0], seconds))
    run.say(grown)
    await run.drop("fork")
    await picture.without(run.found, cold)
    await returned.keep(run.found, cold, 3, size)
    back, _ = await returned.deleted(run.found, cold, 3, size, seconds)
    run.say(*came_back(f"{size} MiB file, features off", back, None, seconds))
    await run.drop(cold)


async def _hibernated(run: Run) -> None:
    """The same build in two machines; each hibernated another way."""
    saved: dict[bool, tuple[LayerInfo, LayerInfo]] = {}
    for slim in (False, True):
        name = await run.machine("slim" if slim else "whole", Reclaim.GENTLE)
        await picture.fill(run.found, name, run.size.mebibytes)
        await picture.free(run.found, name)
        await members.reported(run.found.engine, name)
        await run.found.engine.hibernate(name, slim=slim)
        await members.settled(run.found.engine)
        snapshot = await members.last_saved(run.found.engine, name)
        saved[slim] = (await run.found.engine.get_layer(snapshot.memory_layer), await run.found.engine.get_layer(snapshot.disk_layer))
        await run.drop(name)
    (memory, disk), (whole, _) = saved[True], saved[False]
    run.say(
        limit("hibernated after a build: memory stored with slimming, as a share of without", memory.stored / whole.stored, "x", SLIM),
        Figure(figure="with slimming: stored for the memory", value=memory.stored / _MIB, unit="MiB"),
        Figure(figure="without: stored for the memory", value=whole.stored / _MIB, unit="MiB"),
        Figure(figure="stored for the disk, with slimming", value=disk.stored / _MIB, unit="MiB"),
    )


async def _idle(run: Run) -> None:
    """Machines that do nothing."""
    run.say(*idle.report(await idle.measured(run.found, run.image, run.size.idle, run.size.settle)))
    run.notes.append(idle.note(run.size.idle))


PARTS: dict[str, Callable[[Run], Awaitable[None]]] = {
    "freed": _freed,
    "cold": _cold,
    "deleted": _deleted,
    "hibernated": _hibernated,
    "idle": _idle,
    "picture": _picture,
}


async def run(arguments: argparse.Namespace) -> Report:
    parts = arguments.only or list(PARTS)
    if "picture" in parts:
        plot.check()
        if not arguments.out.is_dir():
            raise HostError(f"{arguments.out} is no directory", hint="Name one that is there with --out.")
    async with bed.place() as state, bed.opened(state) as found:
        size = _QUICK if arguments.quick else _FULL
        measured = Run(found=found, image=arguments.image, memory=arguments.memory, size=size, out=arguments.out)
        for part in parts:
            await PARTS[part](measured)
        return Report(header=found.header, figures=tuple(measured.figures), notes=tuple(measured.notes))
