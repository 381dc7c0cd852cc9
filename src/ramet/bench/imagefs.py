"""Reading a sealed memory layer through the image file system, beside a copy of the same bytes from tmpfs in the same run."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import mmap
import os
import random
import signal
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ramet import __version__, process
from ramet.bench import bed
from ramet.bench.figures import Figure, Report, distribution
from ramet.errors import HostError
from ramet.paths import StateDir, StoreDir
from ramet.store import mounting
from ramet.store.layer import Kind, Layer
from ramet.store.mounting import ImageFs
from ramet.store.runs import Runs
from ramet.store.store import Store

GOAL = 1.5  # GB/s
MEBIBYTES, ROUNDS, FAULTS = 256, 5, 400
PIECE, PAGE, BLOCK = 65536, 4096, 1 << 20
ZEROS, OF = 6, 8  # so many pieces of 8 are zero; of a booted guest's 512 MiB it is 7 of 8
STOP_PATIENCE = 10.0
SHARED = Path("/dev/shm")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mebibytes", type=int, default=MEBIBYTES, help="size of the memory that is read (default: %(default)s)")
    parser.add_argument(
        "--zeros", type=int, default=ZEROS, choices=range(OF), help="of 8 pieces of it, how many are zero (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="readings of each kind (default: %(default)s)")
    parser.add_argument("--faults", type=int, default=FAULTS, help="single page faults (default: %(default)s)")


@dataclass(frozen=True, kw_only=True)
class Rate:
    """GB/s, and the cpu seconds that a GB took: of the reader, of the workers."""

    speed: float
    reader: float
    workers: float


def pieces() -> Iterator[bytes]:
    """64 KiB each of what fills memories: this host's programs and Python's library, over and over."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [_over_and_over(Path("/usr/bin"), "*"), _over_and_over(library, "*.py")]
    while True:
        for source in sources:
            yield next(source)


def _over_and_over(place: Path, pattern: str) -> Iterator[bytes]:
    """The files of a directory one after the other, cut into pieces."""
    files = [path for path in sorted(place.rglob(pattern)) if path.is_file() and not path.is_symlink()]
    rest, found = b"", True
    while found:
        found = False
        for path in files:
            try:
                rest += path.read_bytes()
            except OSError:
                continue  # some are for root only
            whole = len(rest) // PIECE * PIECE
            for at in range(0, whole, PIECE):
                found = True
                yield rest[at : at + PIECE]
            rest = rest[whole:]
    raise HostError(f"no {PIECE // 1024} KiB can be read in {place}")


def memory(size: int, zeros: int) -> Iterator[bytes]:
    """Pieces of a memory of `size` bytes, so many of 8 zero. No two of the others are alike, so that each is stored."""
    source = pieces()
    for number in range(size // PIECE):
        if number % OF < zeros:
            yield bytes(PIECE)
        else:
            piece = bytearray(next(source))
            piece[:8] = number.to_bytes(8, "little")
            yield bytes(piece)


def seal(files: StoreDir, copy: Path, size: int, zeros: int) -> Layer:
    """A sealed layer, and the same bytes in a plain file."""
    store = Store(files)
    with store.draft(Kind.MEMORY, size) as draft:
        with open(draft.spool, "wb") as spool, open(copy, "wb") as plain:
            for piece in memory(size, zeros):
                spool.write(piece)
                plain.write(piece)
        store.publish(draft, Runs.build([(0, size // PAGE, 0)]), durable=False)
    return store.seal(draft.id)


def cpu(pids: Sequence[int]) -> float:
    """Seconds, in steps of a hundredth."""
    return sum(map(process.cpu_time, pids))


@contextlib.contextmanager
def _only_first(pids: Sequence[int]) -> Iterator[Sequence[int]]:
    """Only the first of the workers works: the others are stopped while they have nothing to do, which leaves every request to it."""
    deadline = time.monotonic() + STOP_PATIENCE
    try:
        for pid in pids[1:]:
            os.kill(pid, signal.SIGSTOP)
            while _state(pid) != "T":  # until then it may still take a request, and keep it; only its parent would be told
                if time.monotonic() > deadline:
                    raise HostError("a worker of the image file system does not stop")
                time.sleep(0.001)
        yield pids[:1]
    finally:
        for pid in pids[1:]:
            os.kill(pid, signal.SIGCONT)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def read_by_one(path: Path, pids: Sequence[int], cores: tuple[int, int]) -> Rate:
    """As `read`, with one worker."""
    with _only_first(pids) as one:
        return read(path, one, cores)


def read(path: Path, pids: Sequence[int], cores: tuple[int, int] | None) -> Rate:
    """Read a file from its begin to its end, by 1 MiB, with nothing of it cached where it is not tmpfs. cores: of the reader (a thread), of the workers."""
    buffer = memoryview(bytearray(BLOCK))
    mine = os.sched_getaffinity(0)
    theirs = [(pid, os.sched_getaffinity(pid)) for pid in pids]
    try:
        if cores:
            os.sched_setaffinity(0, {cores[0]})
            for pid in pids:
                os.sched_setaffinity(pid, {cores[1]})
        with open(path, "rb", buffering=0) as file:
            for advice in (os.POSIX_FADV_DONTNEED, os.POSIX_FADV_SEQUENTIAL):
                os.posix_fadvise(file.fileno(), 0, 0, advice)
            before, began, spent = cpu(pids), time.perf_counter(), time.thread_time()
            got = 0
            while count := file.readinto(buffer):
                got += count
            took, spent = time.perf_counter() - began, time.thread_time() - spent
        gigabytes = got / 1e9
        return Rate(speed=gigabytes / took, reader=spent / gigabytes, workers=(cpu(pids) - before) / gigabytes)
    finally:
        os.sched_setaffinity(0, mine)
        for pid, its in theirs:
            os.sched_setaffinity(pid, its)


def fault(path: Path, offsets: Sequence[int], *, alone: bool) -> list[float]:
    """Microseconds of each first touch of a page, through a private mapping as QEMU's. alone: without what the kernel reads around it."""
    samples = []
    with open(path, "r+b") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
            if alone:
                mapped.madvise(mmap.MADV_RANDOM)
            for offset in offsets:
                began = time.perf_counter()
                mapped[offset]
                samples.append((time.perf_counter() - began) * 1e6)
    return samples


def scattered(size: int, count: int) -> list[int]:
    """Pages so far apart that the kernel does not read one with another."""
    blocks = range(0, size, BLOCK)
    return [at + random.randrange(BLOCK // 4, BLOCK // 2, PAGE) for at in random.sample(blocks, min(count, len(blocks)))]


def _middle(rates: Sequence[Rate]) -> Rate:
    return sorted(rates, key=lambda rate: rate.speed)[len(rates) // 2]


def _rate(what: str, rate: Rate, *, goal: bool = False, applies: bool = True) -> list[Figure]:
    holds = None if not goal else True if rate.speed >= GOAL else False if applies else None
    found = [Figure(figure=what, value=rate.speed, unit="GB/s", goal=f">= {GOAL:g}" if goal else "", holds=holds)]
    found.append(Figure(figure="  cpu of the reader, for each GB", value=rate.reader, unit="s"))
    if rate.workers:
        found.append(Figure(figure="  cpu of the server, for each GB", value=rate.workers, unit="s"))
    return found


async def measure(files: StoreDir, layers: dict[str, tuple[Layer, Path]], rounds: int, faults: int) -> tuple[list[Figure], bed.Others]:
    keeper, workers = mounting.pids(files)
    others = bed.Others((keeper, *workers))
    cores = sorted(os.sched_getaffinity(0))
    first, last = cores[0], cores[-1]
    mixed, dense = layers["mixed"], layers["dense"]
    works: dict[str, Callable[[], Rate]] = {
        "a copy from tmpfs": lambda: read(mixed[1], (), (first, first)),
        "free": lambda: read(files.served(mixed[0].id), workers, None),
        "one": lambda: read_by_one(files.served(mixed[0].id), workers, (first, last)),
        "all on one": lambda: read_by_one(files.served(mixed[0].id), workers, (first, first)),
        "dense": lambda: read_by_one(files.served(dense[0].id), workers, (first, last)),
    }
    samples: dict[str, list[Rate]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            samples[name].append(await asyncio.to_thread(work))
    found = {name: _middle(rates[1:]) for name, rates in samples.items()}
    applies = others.share() <= bed.IDLE
    size = dense[0].size
    around = await asyncio.to_thread(fault, files.served(dense[0].id), scattered(size, faults), alone=False)
    alone = await asyncio.to_thread(fault, files.served(dense[0].id), scattered(size, faults), alone=True)
    return [
        *_rate(
            "sequential read of a memory layer, one worker on one core, the reader on another", found["one"], goal=True, applies=applies
        ),
        Figure(figure="what one core can serve of it, by the server's cpu time", value=1 / max(found["one"].workers, 1e-9), unit="GB/s"),
        *_rate("the same, all workers, wherever they like", found["free"]),
        *_rate("the same, reader and one worker on one core", found["all on one"]),
        *_rate("the same of a layer without zero pages, one worker on one core, the reader on another", found["dense"]),
        *_rate("copy of the memory from " + ("tmpfs" if mixed[1].is_relative_to(SHARED) else "the page cache"), found["a copy from tmpfs"]),
        Figure(figure="read as a share of the copy", value=found["one"].speed / found["a copy from tmpfs"].speed, unit="x"),
        distribution("page fault, cold, with what the kernel reads around it", around, "us"),
        distribution("page fault, cold, of that page alone (MADV_RANDOM)", alone, "us"),
    ], others


async def run(arguments: argparse.Namespace) -> Report:
    if reason := mounting.usable():
        raise HostError(f"the image file system cannot be used: {reason}")
    size = max(1, arguments.mebibytes) << 20
    beside = SHARED if os.access(SHARED, os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="ramet-bench-") as place,
        tempfile.TemporaryDirectory(prefix="ramet-bench-", dir=beside) as copies,
    ):
        state = StateDir(root=Path(place))
        state.create()
        layers = {}
        for name, zeros in (("mixed", arguments.zeros), ("dense", 0)):
            copy = Path(copies) / name
            layers[name] = (await asyncio.to_thread(seal, state.store, copy, size, zeros), copy)
        fs = ImageFs(state.store)
        await fs.ensure()
        try:
            measured, others = await measure(state.store, layers, max(1, arguments.rounds), max(1, arguments.faults))
            memory_use = [_pss(pid) for pid in (mounting.pids(state.store)[0], *mounting.pids(state.store)[1])]
        finally:
            await fs.stop()
    measured.append(Figure(figure="memory of the keeper (PSS)", value=memory_use[0], unit="MiB"))
    measured.append(
        Figure(figure=f"memory of each of {len(memory_use) - 1} workers (PSS)", value=statistics.mean(memory_use[1:]), unit="MiB")
    )
    header = (
        f"On {len(os.sched_getaffinity(0))} cores, Linux {os.uname().release}, Ramet {__version__}, {arguments.mebibytes} MiB of memory."
    )
    return Report(header=header, figures=tuple(measured), notes=tuple(_notes(layers, arguments.zeros, others.share())))


def _pss(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def _notes(layers: dict[str, tuple[Layer, Path]], zeros: int, share: float) -> list[str]:
    mixed, dense = (layers[name][0] for name in ("mixed", "dense"))
    data = (
        f"The memory is made of this host's programs and Python's library in pieces of 64 KiB, {zeros} of {OF} replaced by zeros (a "
        f"booted guest of 512 MiB has 7 of 8). Compressed, it is 1/{mixed.size / max(1, mixed.stored_bytes):.1f} of its size; without "
        f"the zeros 1/{dense.size / max(1, dense.stored_bytes):.1f}."
    )
    how = (
        "Read by 1 MiB and in advance (POSIX_FADV_SEQUENTIAL, as cat does) with an empty page cache; the compressed blobs are in it. The "
        "copy has nothing to decompress and no page cache to fill. Medians of the rounds, made in turn."
    )
    return [data, how, *filter(None, [bed.idleness(share)])]
