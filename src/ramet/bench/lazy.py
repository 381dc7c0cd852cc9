"""What is in a registry, started before it is here: how soon, after how many bytes, against fetching all of it first; behind a line of a known speed."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ramet import process
from ramet.bench import bed, bulk, link, members
from ramet.bench.bed import Bed
from ramet.bench.figures import Figure, Report, at_least, limit
from ramet.bench.link import Link
from ramet.errors import SpecError
from ramet.model import Spec
from ramet.paths import StoreDir
from ramet.store import garbage, remote, stock
from ramet.store.fetching import Fetcher

SHARE, SOONER, TRACED, SPEED = 8.0, 1 / 10, 2 / 3, 70.0
ONCE = 1.1  # what lies between two chunks that are fetched together comes along and is thrown away
SLOW, FAST = 100_000_000, 1_000_000_000  # bits a second
_MIB = 1 << 20
_PIECE = 1 << 20
_DROPPED = 16 << 20  # bytes that a reader keeps in the page cache at most
_SAMPLE = 2.0  # seconds for which it is looked at what others do on this host


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="everything small and few, to try it: its figures mean nothing")
    parser.add_argument(
        "--large", default="", metavar="IMAGE", help="the large image (default: 2 GB of Debian's packages, made once; --quick: --image)"
    )
    parser.add_argument(
        "--link", choices=link.KINDS, default="auto", help="what makes the line slow (default: tc as root, else a token bucket)"
    )
    parser.add_argument(
        "--latency",
        type=float,
        default=0.0,
        metavar="MS",
        help="the registry is so many milliseconds away, there and back, by the token bucket (default: on this host)",
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=tuple(PARTS),
        help="measure this and nothing else; may be given several times (default: everything)",
    )


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured. rounds: starts of each kind; memory: MiB of the machine that is saved, of which so many mebibytes are filled."""

    rounds: int
    memory: int
    mebibytes: int
    machines: int


_FULL = Size(rounds=3, memory=1536, mebibytes=1024, machines=10)
_QUICK = Size(rounds=1, memory=256, mebibytes=48, machines=3)


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """A snapshot in the registry. size: bytes of the whole artifact; blobs: of its largest layer."""

    reference: str
    size: int
    blobs: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Run:
    """One run of the bench. image: of the machine that is saved; large: the one that is converted, empty: the one of Debian's packages."""

    link: Link
    image: str
    large: str
    size: Size
    scratch: Path
    header: str = ""
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    template: Pushed | None = None
    hosts: int = 0

    def say(self, *figures: Figure) -> None:
        self.figures.extend(figures)

    @contextlib.asynccontextmanager
    async def home(self) -> AsyncIterator[Bed]:
        """The host on which things are made. It keeps its images."""
        images = bulk.place() / "images"
        images.mkdir(parents=True, exist_ok=True, mode=0o700)
        async with self._opened(images) as found:
            yield found

    @contextlib.asynccontextmanager
    async def elsewhere(self) -> AsyncIterator[Bed]:
        """A host that has Ramet and nothing else."""
        self.hosts += 1
        images = self.scratch / f"images-{self.hosts}"
        images.mkdir()
        async with self._opened(images) as found:
            yield found

    @contextlib.asynccontextmanager
    async def _opened(self, images: Path) -> AsyncIterator[Bed]:
        async with bed.place(images) as state, bed.opened(state) as found:
            self.header = self.header or found.header
            yield found


# A start


@dataclass(frozen=True, kw_only=True)
class Deed:
    """What is done in a machine first, and what figures call it."""

    title: str
    script: str


ANSWER = Deed(title="first command", script="true")
# It needs what the image is for: a compiler, a linker, headers and libraries.
COMPILE = Deed(
    title="first compilation",
    script="command -v gcc >/dev/null || exit 0; echo 'int main(void) { return 0; }' > /tmp/a.c && gcc -o /tmp/a /tmp/a.c && /tmp/a",
)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Seconds from the request until something was done, and the bytes that came over the line until then."""

    seconds: float
    fetched: int


Start = tuple[Mark, ...]  # one for each deed


async def _lazily(run: Run, found: Bed, pushed: Pushed, deeds: Sequence[Deed]) -> Start:
    return await _started(run, found, pushed, deeds, [])


async def _after_all(run: Run, found: Bed, pushed: Pushed, deeds: Sequence[Deed]) -> Start:
    return await _started(run, found, pushed, deeds, [lambda: found.engine.pull(pushed.reference)])


async def _started(run: Run, found: Bed, pushed: Pushed, deeds: Sequence[Deed], before: Sequence[Callable[[], Awaitable[object]]]) -> Start:
    """A machine from a snapshot, and what is done in it. before: what is done with the snapshot first."""
    fetched, began = await run.link.received(), time.perf_counter()
    for work in before:
        await work()
    await found.engine.create_from(pushed.reference, "machine")
    marks = []
    for deed in deeds:
        await members.shell(found.engine, "machine", deed.script)
        marks.append(Mark(seconds=time.perf_counter() - began, fetched=await run.link.received() - fetched))
    return tuple(marks)


Kind = Callable[[Run, Bed, Pushed, Sequence[Deed]], Awaitable[Start]]


async def _one(run: Run, pushed: Pushed, kind: Kind, deeds: Sequence[Deed]) -> Start:
    """A start on a host of its own."""
    async with run.elsewhere() as host:
        return await kind(run, host, pushed, deeds)


async def _traced(run: Run, pushed: Pushed, deeds: Sequence[Deed]) -> Pushed:
    """The same snapshot, with the trace of a lazy start of it on another host."""
    await run.link.shape(FAST)
    async with run.elsewhere() as found:
        await _lazily(run, found, pushed, deeds)
        snapshot = await found.engine.get_snapshot(pushed.reference)

        async def noted() -> bool:
            return any(found.state.store.layer(layer).trace.exists() for layer in snapshot.layers)

        await members.until("noting what a start touches", noted)
        reference = f"{pushed.reference}-traced"
        done = await found.engine.push(snapshot.name, reference)
    return Pushed(reference=reference, size=done.size)


async def _figures(run: Run, what: str, plain: Pushed, deeds: Sequence[Deed]) -> None:
    """The starts from a snapshot: at the slow speed with goals, then at the fast one."""
    traced = await _traced(run, plain, deeds)
    run.say(Figure(figure=f"{what}: its artifact", value=plain.size / _MIB, unit="MiB"))
    for rate in (SLOW, FAST):
        await run.link.shape(rate)
        lazy, ahead = [], []
        for _ in range(run.size.rounds):  # in turn, for whatever else the host does
            lazy.append(await _one(run, plain, _lazily, deeds))
            ahead.append(await _one(run, traced, _lazily, deeds))
        full = await _one(run, plain, _after_all, deeds)
        for number, deed in enumerate(deeds):
            marks = Marks(lazy=[each[number] for each in lazy], ahead=[each[number] for each in ahead], full=full[number])
            title = f"{what}, {rate // 10**6} Mbit/s, {deed.title}"
            run.say(*compared(title, plain.size, marks, goals=rate == SLOW, trace=deed is deeds[-1]))


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Of one deed: started lazily, lazily with a trace, and after everything was fetched."""

    lazy: list[Mark]
    ahead: list[Mark]
    full: Mark


def compared(title: str, size: int, marks: Marks, *, goals: bool, trace: bool) -> list[Figure]:
    """Figures of one deed. size: bytes of the artifact; goals: whether they apply; trace: also the one for traces."""

    def middle(of: list[Mark]) -> Mark:
        return Mark(seconds=statistics.median(each.seconds for each in of), fetched=round(statistics.median(each.fetched for each in of)))

    lazy, ahead, full = middle(marks.lazy), middle(marks.ahead), marks.full
    ratios = (
        (f"{title}: fetched before, of the artifact", lazy.fetched / size * 100, "%", SHARE, goals),
        (f"{title}: as a multiple of that after a full pull", lazy.seconds / full.seconds, "x", SOONER, goals),
        (f"{title}: with a trace, as a multiple of without", ahead.seconds / lazy.seconds, "x", TRACED, goals and trace),
    )
    figures = [
        limit(name, value, unit, goal) if applies else Figure(figure=name, value=value, unit=unit)
        for name, value, unit, goal, applies in ratios
    ]
    for name, mark in (("lazy", lazy), ("lazy, with a trace", ahead), ("after a full pull", full)):
        figures.append(Figure(figure=f"{title}: {name}", value=mark.seconds, unit="s"))
        figures.append(Figure(figure=f"{title}: fetched, {name}", value=mark.fetched / _MIB, unit="MiB"))
    return figures


# The parts


async def _template(run: Run) -> Pushed:
    """The large image as a template in the registry; made once in a run."""
    if run.template is None:
        _tell("converting and pushing the large image")
        image = run.large or await bulk.image(_tell)
        await run.link.shape(0)
        async with run.home() as found:
            made = await found.engine.convert(image, "large")
            done = await found.engine.push(made.name, f"{run.link.address}/bench/image:plain")
            largest = max(await found.engine.layers(), key=lambda layer: layer.stored)
        run.template = Pushed(reference=done.reference, size=done.size, blobs=largest.blobs)
        run.say(Figure(figure="the image: what is on its disk", value=largest.data / _MIB, unit="MiB"))
    return run.template


async def _image(run: Run) -> None:
    """A machine that is booted from a large image."""
    await _figures(run, "image", await _template(run), (ANSWER, COMPILE))


async def _memory(run: Run) -> None:
    """A machine that goes on, of which much memory is in use."""
    _tell("filling a machine's memory and pushing it")
    await run.link.shape(0)
    async with run.home() as found:
        await found.engine.create(Spec(name="full", image=run.image, memory=run.size.memory * _MIB))
        await members.filled(found.engine, "full", run.size.mebibytes)
        saved = await found.engine.snapshot("full", "memory", test=False)
        done = await found.engine.push(saved.name, f"{run.link.address}/bench/memory:plain")
        await found.engine.delete("full")
    run.say(Figure(figure="memory: what was saved of it", value=saved.saved / _MIB, unit="MiB"))
    await _figures(run, "memory", Pushed(reference=done.reference, size=done.size), (ANSWER,))


async def _reading(run: Run) -> None:
    """The image's disk, read from its begin to its end."""
    pushed = await _template(run)
    await run.link.shape(FAST)
    repository = pushed.reference.partition("/")[2].rpartition(":")[0]
    urls = [f"http://{run.link.address}/v2/{repository}/blobs/{digest}" for digest in pushed.blobs]
    lazy, plain, spent = [], [], []
    for _ in range(run.size.rounds):
        plain.append(await _speed(run, _curl(urls)))
        async with run.elsewhere() as found:
            await found.engine.pull(pushed.reference, lazy=True)
            layer = max(await found.engine.layers(), key=lambda each: each.absent)
            pids = members.processes(found.state)
            before = sum(map(process.cpu_time, pids))
            lazy.append(await _speed(run, asyncio.to_thread(_read, found.state.store.served(layer.id))))
            spent.append((sum(map(process.cpu_time, pids)) - before) / layer.absent * 1e9)
    curl, ours = statistics.median(plain), statistics.median(lazy)
    title = f"sequential read of the image's disk at {FAST // 10**9} Gbit/s, bytes over the line a second, as a share of curl's"
    run.say(
        at_least(title, ours / curl * 100, "%", SPEED),
        Figure(figure="the same, lazily", value=ours / 1e6, unit="MB/s"),
        Figure(figure="the same, curl of the same blobs", value=curl / 1e6, unit="MB/s"),
        Figure(figure="cpu of fetching, verifying and serving it, for each GB", value=statistics.median(spent), unit="s"),
    )


async def _speed(run: Run, work: Awaitable[None]) -> float:
    """Bytes a second over the line while something is done."""
    before, began = await run.link.received(), time.perf_counter()
    await work
    seconds = time.perf_counter() - began
    return (await run.link.received() - before) / seconds


async def _curl(urls: list[str]) -> None:
    argv = ["curl", "--silent", "--show-error", "--fail", "--noproxy", "*"]
    for url in urls:
        argv += ["--output", "/dev/null", url]
    (await process.run(argv, deadline=members.DEADLINE)).check()


def _read(path: Path) -> None:
    """What was read leaves the page cache, as `curl` keeps nothing: on a host that is a virtual machine itself a third of the time went into pages that it
    used for the first time (9 µs each)."""
    buffer = bytearray(_PIECE)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            if file.tell() % _DROPPED == 0:
                os.posix_fadvise(file.fileno(), 0, file.tell(), os.POSIX_FADV_DONTNEED)


async def _machines(run: Run) -> None:
    """Many machines from one lazy template at once."""
    pushed = await _template(run)
    await run.link.shape(SLOW)
    async with run.elsewhere() as found:
        await found.engine.pull(pushed.reference, lazy=True)

        async def one(name: str) -> None:
            await found.engine.create_from(pushed.reference, name)
            await members.shell(found.engine, name, COMPILE.script)

        began = time.perf_counter()
        await asyncio.gather(*(one(f"machine-{number}") for number in range(run.size.machines)))
        seconds = time.perf_counter() - began
        here = await asyncio.to_thread(_here, found.state.store)
        async with Fetcher.connect(found.state.store, lambda: None) as fetcher:
            status = await fetcher.status()  # after that: what comes meanwhile counts against us
    title = f"{run.size.machines} machines at once: bytes fetched, as a multiple of the chunks that are here then"
    run.say(
        limit(title, status.fetched / here, "x", ONCE),
        Figure(figure="the same: fetched", value=status.fetched / _MIB, unit="MiB"),
        Figure(figure="the same: all have compiled after", value=seconds, unit="s"),
    )


def _here(files: StoreDir) -> int:
    """Bytes of all chunks of remote blobs that are here."""
    records = garbage.readable(files)
    total = 0
    for digest in {digest for record in records for digest in record.blobs}:
        if remote.is_remote(files, digest):
            rows = stock.table(files, digest, records)
            fd = os.open(files.blob(digest), os.O_RDONLY | os.O_CLOEXEC)
            try:
                total += sum(rows.length[row] for row in range(len(rows)) if stock.is_here(fd, rows.want(row)))
            finally:
                os.close(fd)
    return total


PARTS: dict[str, Callable[[Run], Awaitable[None]]] = {
    "image": _image,
    "memory": _memory,
    "reading": _reading,
    "machines": _machines,
}


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")


async def run(arguments: argparse.Namespace) -> Report:
    if arguments.latency and arguments.link == "tc":
        raise SpecError("--latency needs the token bucket: tc's netem is not in every kernel", hint="Leave out --link tc.")
    others = bed.Others(())
    await asyncio.sleep(_SAMPLE)
    busy = bed.idleness(others.share())
    large = arguments.large or (arguments.image if arguments.quick else "")
    size = _QUICK if arguments.quick else _FULL
    with tempfile.TemporaryDirectory(prefix="ramet-bench-hosts-") as scratch:
        async with link.opened(arguments.link, arguments.latency / 1000) as line:
            measured = Run(link=line, image=arguments.image, large=large, size=size, scratch=Path(scratch))
            for part in arguments.only or PARTS:
                await PARTS[part](measured)
    notes = [f"The registry is docker-registry in {line.words}, on this host. Another host is a state directory with nothing in it."]
    return Report(header=measured.header, figures=tuple(measured.figures), notes=(*notes, *measured.notes, *filter(None, [busy])))
