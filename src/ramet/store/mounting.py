"""The daemon's half of the image file system: mount it, start its keeper or adopt one that runs, notice its death, take it down.

The keeper outlives the daemon. `imagefs.lock` is held = it lives; `imagefs.pids` says whom to signal. Mounting is done here and the descriptor handed over, for
without root it is fusermount3 who does it. One ensure() at a time for a store, over all processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import functools
import mmap
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ramet import locks, process, sockets
from ramet.errors import HostError
from ramet.paths import StoreDir
from ramet.store import fuse, keeper, wanting, warming

START_DEADLINE = 30.0
END_GRACE = 5.0  # seconds between SIGTERM and SIGKILL
MOUNT_DEADLINE = 20.0
_INHERITED = 5.0  # seconds that a worker may hold the lock of a keeper that was killed as it forked
_GAP = 64 << 10
TAIL = 4096  # bytes of the keeper's log that an error shows
_HELP = "`ramet setup` says what is missing: without root the package fuse3, and the kernel's FUSE (`modprobe fuse`)."
_MS_NOSUID, _MS_NODEV, _MS_NOATIME = 2, 4, 1024  # include/uapi/linux/mount.h
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that could not be served: a line of faults.log. time: Unix, seconds; offset: bytes from the file's begin."""

    time: float
    layer: str
    offset: int
    message: str


def faults(files: StoreDir, layer_id: str = "", since: float = 0.0) -> list[Fault]:
    """What could not be served, oldest first; of one layer only, where named."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in files.faults.read_text(errors="replace").splitlines():
            words = line.split(" ", 3)
            with contextlib.suppress(ValueError, IndexError):  # a line that a full disk cut short
                found.append(Fault(time=float(words[0]), layer=words[1], offset=int(words[2]), message=words[3]))
    return [fault for fault in found if fault.time >= since and layer_id in ("", fault.layer)]


def unserved(files: StoreDir, layer_id: str, since: float) -> str:
    """Why a QEMU got SIGBUS instead of its memory: what could not be read of a layer, in a sentence that names it. since: Unix time."""
    found = faults(files, layer_id, since) if layer_id else []
    return f"its memory could not be read: {found[-1].message}" if found else ""


def pids(files: StoreDir) -> tuple[int, list[int]]:
    """The keeper's and its workers'. FileNotFoundError when none serves the store."""
    roles = [line.split()[:2] for line in files.pids.read_text().splitlines()]
    return int(roles[0][1]), [int(pid) for role, pid in roles if role == "worker"]


def usable() -> str:
    """Why there can be no image file system here; empty when there can."""
    if not Path(keeper.DEVICE).exists():
        return f"there is no {keeper.DEVICE} (`modprobe fuse`)"
    try:
        os.close(os.open(keeper.DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:  # distributions give it to everybody (0666)
        return f"{keeper.DEVICE} cannot be opened: {error.strerror}"
    if os.geteuid() == 0:
        return ""
    return "" if process.find("fusermount3") else "the program fusermount3 is not installed (package fuse3), which mounts without root"


def is_mounted(files: StoreDir) -> bool:
    """Whether anything is mounted for the store, served or not."""
    return bool(_mounts(files.mount))


class ImageFs:
    """The image file system of a store. command: what runs the keeper, for tests with sources of their own.

    dead: done once the keeper has ended, with the end of its log; there from the first ensure() on.
    """

    dead: asyncio.Future[str]

    def __init__(self, files: StoreDir, command: Sequence[str] = (sys.executable, "-P", "-m", "ramet.store.imagefs")) -> None:
        self._files = files
        self._command = tuple(command)
        self._pidfd = -1

    async def ensure(self) -> None:
        """Serve the store: adopt the keeper that runs, else start one. HostError says why it cannot be, and what to do."""
        if self._pidfd >= 0 and not self.dead.done() and _mounts(self._files.mount):
            return
        self.release()
        if reason := usable():
            raise HostError(f"the image file system cannot be used: {reason}", hint=_HELP)
        async with self._alone():
            pidfd = await self._running()
            if pidfd is None:
                pidfd = await self._start()
        self._follow(pidfd)

    async def stop(self) -> None:
        """Take it down, whoever started it: what is still mapped or open fails. Nothing is left."""
        async with self._alone():
            self.release()
            if (pidfd := _keeper(self._files)) is not None:
                try:
                    await _end(pidfd)
                finally:
                    os.close(pidfd)
            await _clean(self._files)

    def release(self) -> None:
        """Let go of it; it goes on."""
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def forget(self) -> None:
        """Layers were removed: the workers close what they have open, so that the disk's space is free."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGHUP)

    def nudge(self) -> None:
        """Have a fetcher run: whoever connects to `fetch.sock` is answered. HostError when nothing serves the store, or what does cannot fetch."""
        if self._pidfd < 0:
            raise HostError("the image file system does not run, and nothing can be fetched without it")
        wanting.nudge(self._files, pids(self._files)[0])

    async def prefetch(self, layer_id: str, extents: Iterable[tuple[int, int]]) -> None:
        """Have parts of a file, (offset, length) in bytes, in the page cache soon; returns when the kernel has been asked for them."""
        await asyncio.to_thread(warming.ahead, self._files.served(layer_id), list(extents))

    async def touched(self, layer_id: str) -> list[tuple[int, int]]:
        """What of a file is in the page cache, (offset, length) in bytes: as machines that started from it have needed it. Gaps below 64 KiB count with it."""
        return await asyncio.to_thread(_resident, self._files.served(layer_id))

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        async with locks.exclusive(self._files.lock.with_name("imagefs.starting")):
            yield

    async def _running(self) -> int | None:
        """A pidfd of the keeper that serves the store. One that serves no mount (somebody unmounted it) is ended."""
        if (pidfd := _keeper(self._files)) is None:
            return None
        if _mounts(self._files.mount):
            return pidfd
        try:
            await _end(pidfd)
        finally:
            os.close(pidfd)
        return None

    async def _start(self) -> int:
        await _clean(self._files)
        self._files.mount.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock_fd = await asyncio.to_thread(functools.partial(locks.take, self._files.lock, patience=_INHERITED))
        if lock_fd is None:
            raise HostError(
                f"the image file system's lock {self._files.lock} is held, and {self._files.pids} does not say by whom",
                hint="`fuser -v` on the lock names the process; end it.",
            )
        try:
            fuse_fd = await _mount(self._files.mount)
            try:
                with sockets.listen(self._files.fetch) as listener:
                    return await self._spawn(fuse_fd, lock_fd, listener.fileno())
            except BaseException:
                await _clean(self._files)
                raise
            finally:
                os.close(fuse_fd)
        finally:
            os.close(lock_fd)

    async def _spawn(self, fuse_fd: int, lock_fd: int, fetch_fd: int) -> int:
        """Start the keeper and wait until it serves; returns its pidfd."""
        reader, writer = os.pipe()
        try:
            handed = (fuse_fd, lock_fd, writer, fetch_fd)
            try:
                command = [*self._command, str(self._files.root), *map(str, handed)]
                pid = process.spawn_detached(command, log=self._files.log, env=process.confided(), pass_fds=handed)
            finally:
                os.close(writer)
            pidfd = os.pidfd_open(pid)
            try:
                if await _first_byte(reader) != keeper.READY:
                    raise HostError("the image file system did not start", hint=f"See {self._files.log}.", details={"log": self._tail()})
            except BaseException:
                await _end(pidfd)
                os.close(pidfd)
                raise
            return pidfd
        finally:
            os.close(reader)

    def _follow(self, pidfd: int) -> None:
        loop = asyncio.get_running_loop()
        self._pidfd = pidfd
        self.dead = dead = loop.create_future()

        def ended() -> None:
            loop.remove_reader(pidfd)
            if not dead.done():
                dead.set_result(self._tail())

        loop.add_reader(pidfd, ended)

    def _tail(self) -> str:
        with contextlib.suppress(OSError), open(self._files.log, "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL))
            return log.read().decode(errors="replace").strip()
        return ""


def _keeper(files: StoreDir) -> int | None:
    """A pidfd of the keeper that holds the lock; None when it is not held, or the keeper cannot be told."""
    if not locks.is_held(files.lock):
        return None
    with contextlib.suppress(OSError, ValueError):
        role, pid, started = files.pids.read_text().splitlines()[0].split()
        pidfd = os.pidfd_open(int(pid))
        if role == "keeper" and process.start_time(int(pid)) == int(
            started
        ):  # asked after the pidfd is there, which names a process for good
            return pidfd
        os.close(pidfd)
    return None


async def _end(pidfd: int) -> None:
    """SIGTERM, a grace, SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)
        if await process.gone(pidfd, END_GRACE):
            return
    raise HostError("the image file system's keeper does not end", hint="It waits for the host's disks: see `dmesg`.")


async def _first_byte(fd: int) -> bytes:
    """What comes first through a pipe within the deadline; empty when its other end closes, or nothing comes."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        await asyncio.wait_for(readable.wait(), START_DEADLINE)
    except TimeoutError:
        return b""
    finally:
        loop.remove_reader(fd)
    return os.read(fd, 1)


def _mounts(path: Path) -> int:
    """How many file systems are mounted on a path. By the kernel's table: to look at the path itself would wait for a server that may be dead."""
    wanted = os.path.realpath(path.parent) + "/" + path.name
    escaped = "".join(f"\\{ord(c):03o}" if c in " \t\n\\" else c for c in wanted)
    table = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    return sum(line.split(" ", 5)[4] == escaped for line in table.splitlines())


async def _clean(files: StoreDir) -> None:
    """Detach the mounts that dead keepers left, and what they wrote of themselves."""
    while before := _mounts(files.mount):
        await _unmount(files.mount)
        if _mounts(files.mount) >= before:
            raise HostError(f"{files.mount} cannot be unmounted", hint="Unmount it as root: `umount -l`.")
    for path in (files.pids, files.fetch):
        path.unlink(missing_ok=True)


async def _unmount(path: Path) -> None:
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            keeper.unmount(path)
        return
    await process.run(["fusermount3", "-u", "-z", "--", str(path)], deadline=MOUNT_DEADLINE)


async def _mount(path: Path) -> int:
    """Mount on a directory; returns the descriptor that serves it."""
    return _mount_as_root(path) if os.geteuid() == 0 else await _mount_as_user(path)


def _mount_as_root(path: Path) -> int:
    fd = os.open(keeper.DEVICE, os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()},max_read={fuse.MAX_READ}"
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOATIME
    if _libc.mount(b"ramet", os.fsencode(path), b"fuse.ramet", ctypes.c_ulong(flags), options.encode()):
        number = ctypes.get_errno()
        os.close(fd)
        hint = "A container needs the capability SYS_ADMIN for this." if number == errno.EPERM else _HELP
        raise HostError(f"the image file system cannot be mounted on {path}: {os.strerror(number)}", hint=hint)
    return fd


async def _mount_as_user(path: Path) -> int:
    """fusermount3, which is set-uid root, mounts and sends the descriptor back."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        options = f"fsname=ramet,subtype=ramet,nosuid,nodev,noatime,max_read={fuse.MAX_READ}"
        finished = await process.run(
            ["fusermount3", "-o", options, "--", str(path)],
            deadline=MOUNT_DEADLINE,
            env={"_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
        )
        if finished.returncode:
            raise HostError(f"the image file system cannot be mounted on {path}: {finished.output.strip()}", hint=_HELP)
        ours.setblocking(False)  # it has ended: what it sent is there
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    if not fds:
        raise HostError(f"fusermount3 mounted nothing on {path}", hint=_HELP)
    os.set_inheritable(fds[0], False)
    return fds[0]


def _resident(path: Path) -> list[tuple[int, int]]:
    """By mincore(2)."""
    page = mmap.PAGESIZE
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapping:
        states = (ctypes.c_ubyte * -(-len(mapping) // page))()
        first = ctypes.c_char.from_buffer(mapping)
        try:
            if _libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapping)), states):
                raise OSError(ctypes.get_errno(), "mincore")
        finally:
            del first
    found: list[tuple[int, int]] = []
    bits = bytes(states)
    at = bits.find(1)
    while at >= 0:
        end = bits.find(0, at)
        end = len(bits) if end < 0 else end
        if found and at * page - sum(found[-1]) < _GAP:
            found[-1] = (found[-1][0], end * page - found[-1][0])
        else:
            found.append((at * page, (end - at) * page))
        at = bits.find(1, end)
    return found
