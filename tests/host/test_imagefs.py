"""The image file system on the real kernel: what it serves, and what happens to its readers when its processes die."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from ramet import locks, process
from ramet.paths import StoreDir
from ramet.store import keeper, mounting
from ramet.store.mounting import ImageFs

from .conftest import User, need, opened
from .rawlayers import content, publish, save

HERE = Path(__file__).parent
COMMAND = (sys.executable, "-P", str(HERE / "rawlayers.py"))
ID, OTHER = "00000000000000aa", "7fffffffffffffff"
SIZE = 8 << 20
DEADLINE = 30.0
KILLS = 240
PUNCH_HOLE, KEEP_SIZE = 2, 1
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
async def served(files: StoreDir, request: pytest.FixtureRequest) -> AsyncIterator[ImageFs]:
    """A file system that runs; gone afterwards, with all of it. Its parameter: what `rawlayers` is to pretend."""
    if pretended := getattr(request, "param", ""):
        (files.root / pretended).touch()
    fs = ImageFs(files, COMMAND)
    await fs.ensure()
    try:
        yield fs
    finally:
        await fs.stop()
        assert mounted(files) == 0
        assert not locks.is_held(files.lock)


@pytest.fixture
def reading(files: StoreDir) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts programs that read and compare."""
    started: list[subprocess.Popen[str]] = []

    def start(layer: str, mode: str = "file", least: int = 0) -> subprocess.Popen[str]:
        raw = files.layer(layer).root / "raw"
        command = [sys.executable, str(HERE / "imagereader.py"), mode, str(files.served(layer)), str(raw), str(least)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        assert (out := started[-1].stdout) and out.readline() == "reading\n"
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.wait(DEADLINE)
        if each.stdout:
            each.stdout.close()


def mounted(files: StoreDir) -> int:
    return Path("/proc/self/mountinfo").read_text().count(f" {files.mount} ")


def pids(files: StoreDir) -> tuple[int, list[int]]:
    """The keeper's, the workers'."""
    lines = [line.split() for line in files.pids.read_text().splitlines()]
    assert lines[0][0] == "keeper" and {line[0] for line in lines[1:]} == {"worker"}
    return int(lines[0][1]), [int(line[1]) for line in lines[1:]]


async def until(condition: Callable[[], bool], what: str, deadline: float = DEADLINE) -> None:
    """For what tells nobody."""
    async with asyncio.timeout(deadline):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert condition(), what


async def replaced(files: StoreDir, worker: int) -> None:
    await until(lambda: worker not in pids(files)[1] and len(pids(files)[1]) == keeper.workers(), f"{worker} was replaced")


def control(files: StoreDir, words: str = "") -> None:
    """Tell the test's layers how to behave."""
    staged = files.root / "control.new"
    staged.write_text(words)
    staged.rename(files.root / "control")


def fresh(path: Path) -> bytes:
    """What a file has, from the file system and not from the page cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


async def test_serves_layers_as_files(served: ImageFs, files: StoreDir) -> None:
    wanted = {layer: publish(files, layer, content(seed, SIZE + seed)) for seed, layer in enumerate([OTHER, ID], 7)}
    assert sorted(path.name for path in files.mount.iterdir()) == [ID, OTHER]
    for layer, data in wanted.items():
        found = files.served(layer).stat()
        assert (found.st_size, found.st_uid, found.st_mode & 0o777) == (len(data), os.geteuid(), 0o600)
        assert fresh(files.served(layer)) == data
    table = next(line for line in Path("/proc/self/mounts").read_text().splitlines() if str(files.mount) in line)
    assert {"rw", "nosuid", "nodev", "noatime", "max_read=1048576"} <= set(table.split()[3].split(","))
    assert os.statvfs(files.mount).f_bavail == 0


async def test_a_missing_layer_is_not_remembered_as_missing(served: ImageFs, files: StoreDir) -> None:
    for name in (ID, "readme", "00000000000000AA", "0000000000000001", "ffffffffffffffff", "a" * 300):
        with pytest.raises(OSError) as caught:
            files.served(name).stat()
        assert caught.value.errno in (errno.ENOENT, errno.ENAMETOOLONG)
    data = publish(files, ID, content(1, SIZE))
    assert fresh(files.served(ID)) == data


async def test_a_layer_that_is_being_saved_has_its_size_and_later_its_bytes(served: ImageFs, files: StoreDir) -> None:
    save(files, ID, SIZE)
    with open(files.served(ID), "r+b", buffering=0) as file:
        assert os.fstat(file.fileno()).st_size == SIZE
        with pytest.raises(OSError) as caught:
            file.read(1)
        assert caught.value.errno == errno.EIO
        assert {fault.message for fault in mounting.faults(files, ID)} == {f"the layer {ID} is still being saved"}
        data = content(3, SIZE)
        (files.draft(ID).root / "raw").write_bytes(data)
        files.draft(ID).root.rename(files.layer(ID).root)
        assert os.pread(file.fileno(), SIZE, 0) == data


async def test_nothing_changes_a_layer(served: ImageFs, files: StoreDir) -> None:
    data = publish(files, ID, content(1, SIZE))
    path = files.served(ID)
    with open(path, "r+b", buffering=0) as file:
        with pytest.raises(OSError) as caught:
            file.write(b"x" * 10_000)
        assert caught.value.errno == errno.EROFS
        for size in (0, SIZE + 1):
            with pytest.raises(OSError) as caught:
                file.truncate(size)
            assert caught.value.errno == errno.EPERM
        path.chmod(0o777)
        assert path.stat().st_mode & 0o777 == 0o600
    for change in (path.unlink, (files.mount / "new").touch, (files.mount / "new").mkdir, lambda: path.rename(files.mount / OTHER)):
        with pytest.raises(OSError):
            change()
    assert path.stat().st_size == SIZE
    assert fresh(path) == data


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """0 or the errno."""
    return ctypes.get_errno() if libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)) else 0


async def test_punching_a_hole_succeeds_and_changes_nothing(served: ImageFs, files: StoreDir) -> None:
    data = publish(files, ID, content(1, SIZE))
    fd = os.open(files.served(ID), os.O_RDWR)
    try:
        with mmap.mmap(fd, SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as memory:
            memory[4096:12288] = b"x" * 8192
            assert fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 8192, 65536) == 0
            assert fallocate(fd, KEEP_SIZE, 0, SIZE) == 0
            assert fallocate(fd, 0, 0, SIZE) == 0
            assert fallocate(fd, 0, 0, SIZE + 1) == errno.EPERM
            assert memory[4096:12288] == b"x" * 8192  # a private page is the mapping's own
            memory.madvise(mmap.MADV_DONTNEED, 4096, 8192)
            assert memory[:] == data
        assert os.fstat(fd).st_size == SIZE
    finally:
        os.close(fd)
    assert fresh(files.served(ID)) == data


async def test_damage_is_an_error_and_a_line_never_wrong_bytes(served: ImageFs, files: StoreDir) -> None:
    data = publish(files, ID, content(1, SIZE))
    control(files, "damage 3000000")
    before = time.time()
    with open(files.served(ID), "rb", buffering=0) as file:
        assert os.pread(file.fileno(), 65536, 65536) == data[65536:131072]
        with pytest.raises(OSError) as caught:
            os.pread(file.fileno(), 4096, 3_000_000 // 4096 * 4096)
        assert caught.value.errno == errno.EIO
    fault = mounting.faults(files, ID)[-1]
    assert fault.message == f"the layer {ID} is damaged: blob sha256-abc, chunk 45"
    assert before - 1 < fault.time < time.time() + 1 and fault.offset <= 3_000_000
    assert mounting.faults(files, OTHER) == [] == mounting.faults(files, ID, since=time.time() + 1)
    script = "import mmap,sys; f = open(sys.argv[1], 'rb'); mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)[3000000]"
    touched = await process.run([sys.executable, "-c", script, str(files.served(ID))], deadline=DEADLINE)
    assert touched.returncode == -signal.SIGBUS
    control(files)
    assert fresh(files.served(ID)) == data  # mended: the failure is not remembered


@pytest.mark.parametrize("served", ["", "no-clones"], indirect=True)
async def test_killed_workers_are_replaced_and_readers_never_notice(
    served: ImageFs, files: StoreDir, reading: Callable[..., subprocess.Popen[str]]
) -> None:
    readers = []
    for number, mode in enumerate(["file", "map", "file", "map"]):
        publish(files, f"{number + 16:016x}", content(number, SIZE))
        readers.append(reading(f"{number + 16:016x}", mode, 4 * SIZE))
    rng = random.Random(1)
    keeper_pid = pids(files)[0]
    killed = 0
    while killed < KILLS:
        if killed % 30 < 2:
            control(files, "stall" if killed % 60 < 2 else "")
        workers = pids(files)[1]
        victims = workers[:2] if rng.random() < 0.2 else [rng.choice(workers)]
        for victim in victims:
            await asyncio.sleep(rng.random() * 0.01)
            if rng.random() < 0.2:
                os.kill(victim, signal.SIGSTOP)
                await asyncio.sleep(0.005)
            os.kill(victim, signal.SIGKILL)
            killed += 1
        for victim in victims:
            await replaced(files, victim)
    control(files)
    await asyncio.sleep(0.2)
    for reader in readers:
        reader.terminate()
    said = [await asyncio.to_thread(reader.communicate, timeout=4 * DEADLINE) for reader in readers]
    assert [reader.returncode for reader in readers] == [0] * 4, said
    assert pids(files)[0] == keeper_pid and not served.dead.done()
    assert mounting.faults(files) == []


async def test_a_stopped_worker_that_holds_a_request_is_no_end_for_its_reader(
    served: ImageFs, files: StoreDir, reading: Callable[..., subprocess.Popen[str]]
) -> None:
    publish(files, ID, content(1, SIZE))
    control(files, "hold")
    reader = reading(ID)
    held = files.root / "held"
    await until(held.exists, "a worker holds a request")
    worker = int(held.read_text())
    os.kill(worker, signal.SIGSTOP)
    control(files)
    os.kill(worker, signal.SIGKILL)
    await replaced(files, worker)
    # The other worker may hold its share of the read-ahead as well.
    for other in pids(files)[1]:
        os.kill(other, signal.SIGKILL)
        await replaced(files, other)
    await asyncio.sleep(0.3)
    reader.terminate()
    said, _ = await asyncio.to_thread(reader.communicate, timeout=DEADLINE)
    assert reader.returncode == 0 and int(said) > 0, said


@pytest.mark.parametrize("mode", ["file", "map"])
async def test_a_killed_keeper_is_known_at_once_and_another_starts(
    served: ImageFs, files: StoreDir, reading: Callable[..., subprocess.Popen[str]], mode: str
) -> None:
    data = publish(files, ID, content(1, SIZE))
    control(files, "stall")
    reader = reading(ID, mode)
    old, workers = pids(files)
    os.kill(workers[0], signal.SIGSTOP)
    os.kill(old, signal.SIGKILL)
    await asyncio.wait_for(asyncio.shield(served.dead), DEADLINE)
    said, _ = await asyncio.to_thread(reader.communicate, timeout=DEADLINE)
    expected = {"file": (2,), "map": (-signal.SIGBUS, 2)}[mode]
    assert reader.returncode in expected, said
    control(files)
    await served.ensure()
    assert pids(files)[0] != old and mounted(files) == 1
    assert not any(process.start_time(pid) for pid in workers)
    assert fresh(files.served(ID)) == data
    assert not served.dead.done()


async def test_a_kernel_that_cannot_send_again_ends_it_rather_than_hang(
    files: StoreDir, reading: Callable[..., subprocess.Popen[str]]
) -> None:
    (files.root / "old-kernel").touch()
    publish(files, ID, content(1, SIZE))
    fs = ImageFs(files, COMMAND)
    await fs.ensure()
    try:
        control(files, "stall")
        reader = reading(ID)
        os.kill(pids(files)[1][0], signal.SIGKILL)
        assert "this kernel cannot send requests again" in await asyncio.wait_for(asyncio.shield(fs.dead), DEADLINE)
        said, _ = await asyncio.to_thread(reader.communicate, timeout=DEADLINE)
        assert reader.returncode == 2, said
        assert not files.pids.exists()
    finally:
        await fs.stop()


async def test_workers_that_crash_again_and_again_end_it(
    served: ImageFs, files: StoreDir, reading: Callable[..., subprocess.Popen[str]]
) -> None:
    publish(files, ID, content(1, SIZE))
    control(files, "crash")
    reader = reading(ID)
    assert "giving up: 5 workers in a row crashed" in await asyncio.wait_for(asyncio.shield(served.dead), DEADLINE)
    said, _ = await asyncio.to_thread(reader.communicate, timeout=DEADLINE)
    assert reader.returncode == 2, said


_ENSURE = """
import asyncio, pathlib, sys
from ramet.paths import StoreDir
from ramet.store.mounting import ImageFs
async def main():
    await ImageFs(StoreDir(root=pathlib.Path(sys.argv[1])), sys.argv[2:]).ensure()
sys.stdin.readline()
asyncio.run(main())
"""


async def test_two_daemons_start_one_and_it_outlives_them(files: StoreDir) -> None:
    data = publish(files, ID, content(1, SIZE))
    command = [sys.executable, "-c", _ENSURE, str(files.root), *COMMAND]
    daemons = [subprocess.Popen(command, stdin=subprocess.PIPE, text=True) for _ in range(2)]  # noqa: ASYNC220
    fs = ImageFs(files, COMMAND)
    try:
        for daemon in daemons:
            assert daemon.stdin
            daemon.stdin.write("\n")
            daemon.stdin.flush()
        for daemon in daemons:
            await asyncio.to_thread(daemon.communicate, timeout=DEADLINE)
        assert [daemon.returncode for daemon in daemons] == [0, 0]
        first = pids(files)[0]
        assert mounted(files) == 1 and files.log.read_text().count("serving") == 1
        await fs.ensure()
        await fs.ensure()
        assert pids(files)[0] == first and fresh(files.served(ID)) == data
        fs.release()
        assert process.start_time(first)
        await fs.ensure()
        os.kill(first, signal.SIGTERM)
        await asyncio.wait_for(asyncio.shield(fs.dead), DEADLINE)  # noticed though it is no child of ours
        assert mounted(files) == (0 if os.geteuid() == 0 else 1)
    finally:
        await fs.stop()
    assert mounted(files) == 0 and not files.pids.exists()


async def test_what_somebody_unmounted_is_mounted_again(served: ImageFs, files: StoreDir) -> None:
    data = publish(files, ID, content(1, SIZE))
    fd = os.open(files.served(ID), os.O_RDONLY)  # keeps the old one alive, detached
    if os.geteuid() == 0:
        keeper.unmount(files.mount)
    else:
        await process.run(["fusermount3", "-u", "-z", str(files.mount)], deadline=DEADLINE)
    old = pids(files)[0]
    assert process.start_time(old)
    await served.ensure()
    assert fresh(files.served(ID)) == data
    assert not process.start_time(old)
    with contextlib.suppress(OSError):  # ENOTCONN: nobody is there to be told
        os.close(fd)


async def test_forget_lets_go_of_removed_layers(served: ImageFs, files: StoreDir) -> None:
    publish(files, ID, content(1, SIZE))
    fresh(files.served(ID))
    assert opened(pids(files)[1], ID)
    served.forget()
    await until(lambda: not opened(pids(files)[1], ID), "the layer is closed")


async def test_prefetched_bytes_are_there_before_they_are_asked_for(served: ImageFs, files: StoreDir) -> None:
    publish(files, ID, content(1, SIZE))
    await served.prefetch(ID, [(1 << 20, 65536), (4 << 20, 4096)])
    control(files, "damage 0")
    with open(files.served(ID), "rb", buffering=0) as file:
        assert os.pread(file.fileno(), 4096, 4 << 20) == content(1, SIZE)[4 << 20 :][:4096]


async def test_the_processes_are_small(served: ImageFs, files: StoreDir) -> None:
    script = "import sys, ramet.store.imagefs, ramet.store.chain; print(*sorted(sys.modules))"
    found = (await process.output([sys.executable, "-P", "-c", script], deadline=DEADLINE)).split()
    assert not {"asyncio", "pydantic", "sqlalchemy", "subprocess", "ramet.process", "ramet.locks"} & set(found)
    publish(files, ID, content(1, SIZE))
    fresh(files.served(ID))
    keeper_pid, workers = pids(files)
    for pid in (keeper_pid, *workers):
        line = next(x for x in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if x.startswith("Pss:"))
        assert int(line.split()[1]) < 16_384, line


_AS_USER = """
import asyncio, contextlib, os, pathlib, signal, sys
from ramet.errors import HostError
from ramet.paths import StateDir
from ramet.store import mounting
sys.path.insert(0, sys.argv[1])
import rawlayers

def pids(files):
    return [int(line.split()[1]) for line in files.pids.read_text().splitlines()]

def fresh(path):
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()

async def main():
    state = StateDir(root=pathlib.Path(sys.argv[2]))
    state.create()
    files = state.store
    # setpriv starts even a Python in root's home, which this user cannot start again.
    python = sys.executable if os.access(sys.executable, os.X_OK) else "/usr/bin/python3.%d" % sys.version_info.minor
    assert os.geteuid() != 0 and mounting.usable() == "", mounting.usable()
    fs = mounting.ImageFs(files, ["env", "PYTHONPATH=" + ":".join(sys.path), python, sys.argv[1] + "/rawlayers.py"])
    try:
        await fs.ensure()
    except HostError as error:
        sys.exit(f"{error} {error.details}")
    data = rawlayers.publish(files, "00000000000000aa", rawlayers.content(1, 4 << 20))
    served = files.served("00000000000000aa")
    assert fresh(served) == data
    assert served.stat().st_uid == os.geteuid()
    for _ in range(20):
        task = asyncio.create_task(asyncio.to_thread(fresh, served))
        await asyncio.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):  # the one of the last round: its successor is not written down yet
            os.kill(pids(files)[-1], signal.SIGKILL)
        assert await task == data
    os.kill(pids(files)[0], signal.SIGKILL)
    await asyncio.wait_for(asyncio.shield(fs.dead), 30)
    await fs.ensure()
    assert fresh(served) == data
    await fs.stop()
    assert str(files.mount) not in pathlib.Path("/proc/self/mountinfo").read_text()
    print("as a user: all right")

asyncio.run(main())
"""


@pytest.fixture
def device_of_everybody() -> Iterator[None]:
    """As distributions have it."""
    device = Path(keeper.DEVICE)
    mode = device.stat().st_mode & 0o777
    device.chmod(0o666)
    yield
    device.chmod(mode)


def test_without_root(user: User, device_of_everybody: None) -> None:
    need("fusermount3")
    finished = user.python(_AS_USER, str(HERE), str(user.home / "state"), timeout=180)
    assert finished.stdout == "as a user: all right\n", finished.stdout + finished.stderr


def test_usable_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "DEVICE", "/dev/fuse-that-is-not-there")
    assert "modprobe fuse" in mounting.usable()
    monkeypatch.setattr(keeper, "DEVICE", "/")
    assert "cannot be opened" in mounting.usable()
    monkeypatch.setattr(keeper, "DEVICE", "/dev/null")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(process, "find", lambda program: None)
    assert "fuse3" in mounting.usable()
