"""Layers whose blobs are elsewhere, served by the image file system on the real kernel: its readers wait, and nothing else happens to them."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import hashlib
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from ramet import process, sockets
from ramet.errors import HostError
from ramet.paths import StoreDir
from ramet.store import keeper, mounting, tracing, wanting
from ramet.store.layer import CHUNK, PAGE, Kind, Layer
from ramet.store.mounting import ImageFs
from ramet.store.runs import Runs
from ramet.store.store import Store
from tests.host.conftest import opened
from tests.unit.faraway import drop, give_away

HERE = Path(__file__).parent
COMMAND = (sys.executable, "-P", str(HERE / "lazylayers.py"))
SIZE = 8 << 20
DEADLINE = 60.0
PARKED = 80  # reads that wait at once: more than the kernel would have under way for all files together before
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
async def served(files: StoreDir, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ImageFs]:
    """A file system that runs, with two workers. Its parameter: what `lazylayers` is to pretend."""
    if pretended := getattr(request, "param", ""):
        (files.root / pretended).touch()
    fs = ImageFs(files, COMMAND)
    await fs.ensure()
    try:
        yield fs
    finally:
        say(files, "")
        await fs.stop()


def make(files: StoreDir, seed: int, kind: Kind = Kind.MEMORY, *, base: str = "", pages: int = SIZE // PAGE) -> tuple[Layer, bytes]:
    """A sealed layer, and its content."""
    data = random.Random(seed).randbytes(pages * PAGE)
    store = Store(files)
    with store.draft(kind, SIZE, base=base) as draft:
        path = files.root / f"raw-{seed}"
        path.write_bytes(data)
        with open(path, "rb") as raw:
            made = store.publish_sealed(draft, raw.fileno(), Runs.build([(0, pages, 0)]))
        path.unlink()
    return made, data


def say(files: StoreDir, words: str) -> None:
    """Tell the fetcher how to behave."""
    staged = files.root / "control.new"
    staged.write_text(words)
    staged.rename(files.root / "control")


def pids(files: StoreDir, role: str) -> list[int]:
    return [int(line.split()[1]) for line in files.pids.read_text().splitlines() if line.startswith(role)]


def wanted(files: StoreDir) -> list[list[str]]:
    """Of each want that the fetcher got: its pid, the layer, whether it is of a memory, how many frames."""
    with contextlib.suppress(FileNotFoundError):
        return [line.split() for line in (files.root / "wanted").read_text().splitlines()]
    return []


async def until(condition: Callable[[], bool], what: str) -> None:
    """For what tells nobody."""
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert condition(), what


def piece(path: Path, offset: int, length: int) -> bytes:
    """Not by the page cache, and without reading ahead."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
        got = b""
        while len(got) < length and (more := os.pread(fd, length - len(got), offset + len(got))):
            got += more
        return got
    finally:
        os.close(fd)


class Waiting:
    """Reads of a file, each in a thread of its own: what came, or the error."""

    def __init__(self, path: Path, offsets: list[int], length: int = PAGE) -> None:
        self.found: dict[int, bytes | OSError] = {}
        self._threads = [threading.Thread(target=self._read, args=(path, offset, length)) for offset in offsets]
        for thread in self._threads:
            thread.start()

    def _read(self, path: Path, offset: int, length: int) -> None:
        try:
            self.found[offset] = piece(path, offset, length)
        except OSError as error:
            self.found[offset] = error

    async def all(self) -> dict[int, bytes | OSError]:
        for thread in self._threads:
            await asyncio.to_thread(thread.join, DEADLINE)
            assert not thread.is_alive()
        return self.found


def chunks(count: int) -> list[int]:
    """Offsets of so many pages, each in a chunk of its own."""
    return [number * CHUNK + PAGE for number in range(count)]


@pytest.fixture
def reading(files: StoreDir) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a Python program that has the layer's file as `path`."""
    started: list[subprocess.Popen[str]] = []

    def start(layer: Layer, script: str) -> subprocess.Popen[str]:
        head = "import mmap, os, signal, sys, threading, time\npath = sys.argv[1]\n"
        command = [sys.executable, "-c", head + script, str(files.served(layer.id))]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.wait(DEADLINE)
        if each.stdout:
            each.stdout.close()


@pytest.mark.parametrize("served", ["", "no-clones"], indirect=True)
async def test_what_is_elsewhere_is_fetched_when_it_is_read_and_once(served: ImageFs, files: StoreDir) -> None:
    made, data = make(files, 1)
    [digest] = give_away(files, made)
    assert await asyncio.to_thread(piece, files.served(made.id), 5 * CHUNK + 100, 2 * CHUNK) == data[5 * CHUNK + 100 : 7 * CHUNK + 100]
    assert files.blob(digest).stat().st_blocks * 512 < 6 * CHUNK
    before = len(wanted(files))
    assert before and {(line[1], line[2]) for line in wanted(files)} == {(made.id, "True")}
    await asyncio.to_thread(piece, files.served(made.id), 5 * CHUNK, 2 * CHUNK)
    assert len(wanted(files)) == before
    assert await asyncio.to_thread(piece, files.served(made.id), 0, SIZE) == data
    assert mounting.faults(files) == []


async def test_a_page_fault_waits_too_also_through_a_base(served: ImageFs, files: StoreDir) -> None:
    below, data = make(files, 1, Kind.DISK)
    above, over = make(files, 2, Kind.DISK, base=f"layer:{below.id}", pages=100)
    give_away(files, below, above)

    def touch() -> bytes:
        with open(files.served(above.id), "r+b") as file, mmap.mmap(file.fileno(), SIZE, flags=mmap.MAP_PRIVATE) as memory:
            return memory[:]

    assert await asyncio.to_thread(touch) == over + data[100 * PAGE :]
    assert {line[1] for line in wanted(files)} == {above.id}


@pytest.mark.parametrize("served", ["", "no-clones"], indirect=True)
async def test_reads_that_wait_do_not_hold_up_others(served: ImageFs, files: StoreDir) -> None:
    far, data = make(files, 1)
    near, others = make(files, 2)
    half, mixed = make(files, 3)
    give_away(files, far, half)
    await asyncio.to_thread(piece, files.served(half.id), 0, SIZE // 2)
    say(files, "hold")
    waiting = Waiting(files.served(far.id), chunks(PARKED))
    await until(lambda: sum(line[1] == far.id for line in wanted(files)) >= PARKED, "all of them wait")
    assert await asyncio.to_thread(piece, files.served(near.id), 0, SIZE) == others
    assert await asyncio.to_thread(piece, files.served(half.id), 0, SIZE // 2) == mixed[: SIZE // 2]
    assert sorted(path.name for path in files.mount.iterdir()) == sorted([far.id, near.id, half.id])
    assert waiting.found == {}
    say(files, "")
    assert await waiting.all() == {offset: data[offset : offset + PAGE] for offset in chunks(PARKED)}


async def test_read_ahead_that_waits_does_not_hold_up_others(served: ImageFs, files: StoreDir) -> None:
    """In the background the kernel sends only so many at a time, over all files."""
    far, data = make(files, 1, Kind.DISK)
    near, others = make(files, 2, Kind.DISK)
    give_away(files, far)
    say(files, "hold")
    await served.prefetch(far.id, [(0, SIZE)])
    await until(lambda: bool(wanted(files)), "some wait")
    await served.prefetch(near.id, [(0, SIZE)])
    assert await asyncio.to_thread(piece, files.served(near.id), 0, SIZE) == others
    say(files, "")
    assert await asyncio.to_thread(piece, files.served(far.id), 0, SIZE) == data


async def test_a_page_of_a_memory_waits_for_its_own_chunk_only(served: ImageFs, files: StoreDir) -> None:
    """The kernel reads 128 KiB around a fault. Where it lost all but one page of that meanwhile it asks for one, which looks like a fault: seldom."""
    made, data = make(files, 1)
    give_away(files, made)
    here = range(0, SIZE // CHUNK // 2, 2)
    seldom = len(here) * 3 // 2  # all that lies around would be twice as many

    def touch(offset: int) -> bytes:
        with open(files.served(made.id), "r+b") as file, mmap.mmap(file.fileno(), SIZE, flags=mmap.MAP_PRIVATE) as memory:
            return memory[offset : offset + 1]

    def frames() -> int:
        return sum(int(line[3]) for line in wanted(files))

    for number in here:
        assert await asyncio.to_thread(touch, number * CHUNK) == data[number * CHUNK : number * CHUNK + 1]
    assert len(here) <= frames() < seldom, "each chunk was asked for, and none beside it"
    say(files, "hold")
    for number in here:
        for page in range(16):
            offset = number * CHUNK + page * PAGE
            assert await asyncio.wait_for(asyncio.to_thread(touch, offset), DEADLINE) == data[offset : offset + 1]
    before = frames()
    assert before < seldom and mounting.faults(files) == []
    last = SIZE - CHUNK
    elsewhere = Waiting(files.served(made.id), [last])
    await until(lambda: frames() > before, "it waits")
    assert elsewhere.found == {}
    say(files, "")
    assert await elsewhere.all() == {last: data[last : last + PAGE]}


@pytest.mark.parametrize("served", ["", "no-clones"], indirect=True)
async def test_killed_workers_and_fetchers_are_not_noticed(served: ImageFs, files: StoreDir) -> None:
    made, data = make(files, 1)
    give_away(files, made)
    rng = random.Random(3)
    for number in range(8):
        offsets = [each + number % 4 * 16 * CHUNK for each in chunks(16)]
        drop(files, made.blobs)
        say(files, "hold" if number % 2 else "slow 0.05")
        enough = len(wanted(files)) + number % 3 * 5
        waiting = Waiting(files.served(made.id), offsets)
        while len(wanted(files)) <= enough:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        for role in rng.choice([["worker"], ["fetcher"], ["fetcher", "worker"], ["worker", "worker"]]):
            victims = pids(files, role)
            if victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(victims), signal.SIGKILL)
        say(files, "")
        found = await waiting.all()
        assert found == {offset: data[offset : offset + PAGE] for offset in offsets}
    assert mounting.faults(files) == []
    await until(lambda: len(pids(files, "worker")) == keeper.workers(), "all are there again")


async def test_a_fetcher_that_crashes_is_replaced_and_asked_again(served: ImageFs, files: StoreDir) -> None:
    made, data = make(files, 1)
    give_away(files, made)
    say(files, "crash")
    waiting = Waiting(files.served(made.id), chunks(4))
    await until(lambda: len({line[0] for line in wanted(files)}) >= 2, "a second one was asked")
    say(files, "")
    assert await waiting.all() == {offset: data[offset : offset + PAGE] for offset in chunks(4)}
    await until(lambda: len(pids(files, "fetcher")) == 1, "it is written down")
    assert mounting.faults(files) == []
    assert files.log.read_text().count("fetcher") >= 2


async def test_a_disk_gets_the_error_and_a_memory_waits_on(served: ImageFs, files: StoreDir) -> None:
    disk, data = make(files, 1, Kind.DISK)
    memory, content = make(files, 2)
    give_away(files, disk, memory)
    say(files, "refuse")
    waiting = Waiting(files.served(memory.id), chunks(3))
    refused = await Waiting(files.served(disk.id), chunks(2)).all()
    assert [error.errno for error in refused.values() if isinstance(error, OSError)] == [errno.EIO] * 2
    assert all("the registry is closed" in fault.message for fault in mounting.faults(files, disk.id))
    assert {fault.offset // CHUNK for fault in mounting.faults(files, disk.id)} == {0, 1}
    log = len(wanted(files))
    await until(lambda: len(wanted(files)) >= log + 3, "the memory is asked for again")
    assert waiting.found == {} and mounting.faults(files, memory.id) == []
    say(files, "")
    assert await waiting.all() == {offset: content[offset : offset + PAGE] for offset in chunks(3)}
    assert await asyncio.to_thread(piece, files.served(disk.id), 0, SIZE) == data


async def test_an_answer_that_is_not_true_is_asked_for_again(served: ImageFs, files: StoreDir) -> None:
    made, data = make(files, 1)
    give_away(files, made)
    say(files, "wrong")
    waiting = Waiting(files.served(made.id), chunks(1))
    await until(lambda: len(wanted(files)) > 6, "again and again")
    assert waiting.found == {}
    say(files, "")
    assert await waiting.all() == {PAGE: data[PAGE : 2 * PAGE]}


_READ = "fd = os.open(path, os.O_RDONLY)\nos.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)\nprint(os.pread(fd, 4096, 65536)[:4].hex())"
_TOUCH = (
    "file = open(path, 'r+b')\nmemory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)\nmemory.madvise(mmap.MADV_RANDOM)\n"
    "print(memory[65536:65540].hex())"
)


@pytest.mark.parametrize("script", [_READ, _TOUCH])
async def test_who_is_killed_while_he_waits_is_gone(
    served: ImageFs, files: StoreDir, reading: Callable[..., subprocess.Popen[str]], script: str
) -> None:
    made, data = make(files, 1)
    give_away(files, made)
    say(files, "hold")
    first, second = (reading(made, script) for _ in range(2))
    await until(lambda: bool(wanted(files)), "somebody waits")
    await asyncio.sleep(0.2)  # the second waits for the same page
    first.kill()
    assert await asyncio.to_thread(first.wait, DEADLINE) == -signal.SIGKILL
    assert second.poll() is None
    say(files, "")
    out, _ = await asyncio.to_thread(second.communicate, timeout=DEADLINE)
    assert (second.returncode, out.strip()) == (0, data[65536:65540].hex())
    assert mounting.faults(files) == []


@pytest.mark.parametrize("script", [_READ, _TOUCH])
async def test_a_signal_that_kills_nobody_fails_no_read(
    served: ImageFs, files: StoreDir, reading: Callable[..., subprocess.Popen[str]], script: str
) -> None:
    """As a processor of a machine is kicked while it waits for a page."""
    made, data = make(files, 1)
    give_away(files, made)
    say(files, "hold")
    reader = reading(made, "signal.signal(signal.SIGUSR1, lambda *_: None)\n" + script)
    await until(lambda: bool(wanted(files)), "it waits")
    for _ in range(20):
        reader.send_signal(signal.SIGUSR1)
        await asyncio.sleep(0.01)
    say(files, "")
    out, _ = await asyncio.to_thread(reader.communicate, timeout=DEADLINE)
    assert (reader.returncode, out.strip()) == (0, data[65536:65540].hex())


async def test_damage_of_what_can_be_fetched_heals(served: ImageFs, files: StoreDir) -> None:
    made, data = make(files, 1, Kind.DISK)
    [digest] = give_away(files, made)
    assert await asyncio.to_thread(piece, files.served(made.id), 0, SIZE) == data
    with open(files.blob(digest), "r+b") as file:
        for offset in range(1000, SIZE, SIZE // 50):
            os.pwrite(file.fileno(), b"damage", offset)
    assert Store(files).verify(made.id)
    got = await asyncio.to_thread(piece, files.served(made.id), 0, SIZE)
    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
    assert Store(files).verify(made.id) == [] and mounting.faults(files) == []


async def test_what_is_read_is_noted_while_somebody_asks_for_it(served: ImageFs, files: StoreDir) -> None:
    made, _ = make(files, 1)
    store = Store(files)
    await asyncio.to_thread(piece, files.served(made.id), 100 * CHUNK, PAGE)
    assert opened(pids(files, "worker"), files.blob(made.blobs[0]).name)
    store.begin_trace(made.id)
    served.forget()
    await until(lambda: not opened(pids(files, "worker"), files.blob(made.blobs[0]).name), "the workers have closed it, and look again")
    for number in (70, 3, 70, 50):
        await asyncio.to_thread(piece, files.served(made.id), number * CHUNK, CHUNK)
    found = store.end_trace(made.id)
    assert found == [70, 3, 50] == tracing.load(files, made.id)
    served.forget()
    await asyncio.to_thread(piece, files.served(made.id), 9 * CHUNK, PAGE)
    assert not files.layer(made.id).tracing.exists() and tracing.load(files, made.id) == found


async def test_a_fetcher_starts_when_it_is_wanted_and_ends_with_the_keeper(served: ImageFs, files: StoreDir) -> None:
    assert pids(files, "fetcher") == []
    with wanting.connect(files) as line:  # it waits for one to start
        line.settimeout(DEADLINE)
        line.sendall(wanting.message(1, "00000000000000aa", [], memory=True))
        served.nudge()
        assert await asyncio.to_thread(line.recv, 100) == b'{"id": 1, "ok": true}\n'
        await until(lambda: len(pids(files, "fetcher")) == 1, "it is written down")
        [first] = pids(files, "fetcher")
        assert mounting.pids(files) == (pids(files, "keeper")[0], pids(files, "worker"))
        served.nudge()
        os.kill(first, signal.SIGKILL)
        assert await asyncio.to_thread(line.recv, 100) == b""
    await until(lambda: pids(files, "fetcher") not in ([], [first]), "another runs")
    [second] = pids(files, "fetcher")
    os.kill(pids(files, "keeper")[0], signal.SIGKILL)
    await asyncio.wait_for(asyncio.shield(served.dead), DEADLINE)
    await until(lambda: process.start_time(second) is None, "it is gone with its keeper")


async def test_a_keeper_that_knows_of_no_fetcher_is_not_ended_by_the_question(served: ImageFs, files: StoreDir) -> None:
    with subprocess.Popen(["sleep", "60"]) as stranger:  # noqa: ASYNC220
        files.fetch.rename(files.fetch.with_suffix(".away"))
        with pytest.raises(HostError, match="has no fetcher"):
            wanting.nudge(files, stranger.pid)
        with socket.socket(socket.AF_UNIX) as dead, sockets.address(files.fetch) as short:
            dead.bind(short)
        with pytest.raises(HostError, match="has no fetcher") as caught:
            wanting.nudge(files, stranger.pid)
        assert "older Ramet" in caught.value.hint
        assert stranger.poll() is None
        stranger.kill()
    served.release()
    with pytest.raises(HostError, match="does not run"):
        served.nudge()
