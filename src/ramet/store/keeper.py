"""The process that keeps the image file system: it holds the mount's descriptors and starts a new worker where one died.

Everything that stands on the mount stands as long as somebody holds its descriptor, so this process does next to nothing that could go wrong. Each
worker reads requests from a descriptor of its own (FUSE_DEV_IOC_CLONE), which the keeper holds too: closing one aborts the requests
under way on it. When a worker dies, another takes over its descriptor, and the kernel is asked to send again what was taken and not answered.

It also holds the socket on which the fetcher listens, from its own start to its end: whoever connects waits there for a fetcher, which the keeper starts
when SIGUSR1 says that one is wanted, and starts again where it died.

What cannot be kept is ended at once (the kernel cannot send again, workers crash again and again): readers then get an error instead of waiting for ever.

It must never look into the mount: it would wait for itself. No asyncio here, for the memory: `process` and `locks` have it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ramet.paths import StoreDir
from ramet.store import fuse

DEVICE = "/dev/fuse"
READY = b"1"
UNMOUNTED, FAILED = 0, 1  # exit statuses
INIT_PATIENCE = 10.0  # seconds for the kernel's first request, which mount(2) has queued already
RETRY = 1.0  # seconds until a fork that failed is tried again
CRASHES, SOON = 5, 1.0  # so many crashes in a row, each so many seconds after the worker's start, are one too many
FETCHER = (sys.executable, "-P", "-m", "ramet.store.fetcher")
LONGEST_PAUSE = 30.0  # seconds to which those between two starts of a fetcher double that ends again and again
BACKLOG = 1024  # connections that wait for a fetcher
_WATCHED = {signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
_MNT_DETACH = 2
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc
_KEPT = 16 << 20  # bytes of freed memory that a worker keeps: an answer's chunks, many times

_libc = ctypes.CDLL(None, use_errno=True)


def say(message: str) -> None:
    """A line in the log."""
    sys.stderr.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {message}\n")
    sys.stderr.flush()


def unmount(path: Path) -> None:
    """Take the topmost mount away from a path; what is open stays so. OSError: it is none (EINVAL), or we may not (EPERM)."""
    if _libc.umount2(os.fsencode(path), _MNT_DETACH):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))


@dataclass
class Slot:
    """A descriptor and the worker that serves it. pid 0: none."""

    fd: int
    pid: int = 0
    started: float = 0.0


class Fetcher:
    """The process that fetches, as a child: started when it is first wanted, and again whenever it fails. fd: the socket on which it listens."""

    def __init__(self, command: Sequence[str], fd: int) -> None:
        self.fd = fd
        self.pid = 0
        self._command = list(command)
        self._wanted = False
        self._me = os.getpid()
        self._started = -LONGEST_PAUSE
        self._pause = RETRY  # from one start to the next, at least
        with socket.socket(fileno=os.dup(fd)) as listener:
            listener.listen(BACKLOG)

    @property
    def due(self) -> bool:
        """Whether it is to be started, now or after a pause."""
        return self._wanted and not self.pid

    def want(self) -> None:
        self._wanted = True
        self.start()

    def start(self) -> None:
        """Start it if it is wanted; one that ended soon after its start not at once."""
        if not self.due or time.monotonic() - self._started < self._pause:
            return
        self._started = time.monotonic()
        try:
            pid = os.fork()
        except OSError as error:
            say(f"no fetcher for now: {error}")
            return
        if not pid:
            self._become()
        self.pid = pid

    def reap(self) -> bool:
        """Whether it has ended. One that ended by itself, with exit status 0, is wanted again only where somebody has connected meanwhile."""
        if not self.pid:
            return False
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return False
        say(f"fetcher {pid} ended: {_ending(status)}")
        self.pid = 0
        if not _is_killed(status):
            self._pause = RETRY if time.monotonic() - self._started > LONGEST_PAUSE else min(LONGEST_PAUSE, 2 * self._pause)
        self._wanted = status != 0 or bool(select.select([self.fd], [], [], 0)[0])
        self.start()
        return True

    def end(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def _become(self) -> None:
        """Be the program; does not return."""
        try:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != self._me:
                os._exit(FAILED)
            with contextlib.suppress(OSError):
                Path("/proc/self/oom_score_adj").write_text("0")  # it may go, and comes again
            os.set_inheritable(self.fd, True)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            os.execv(self._command[0], self._command)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(FAILED)


def keep(files: StoreDir, fuse_fd: int, lock_fd: int, ready_fd: int, serve: Callable[[int], None], fetcher: Fetcher) -> int:
    """Serve a mounted file system until SIGTERM, or until it is unmounted; returns the exit status.

    SIGHUP: the workers let go of what they have open. SIGUSR1: a fetcher is wanted.
    fuse_fd: mounted, INIT not yet answered. lock_fd: holds imagefs.lock. ready_fd: gets READY once everything runs. serve: what a worker does.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    for fd in (fuse_fd, lock_fd, ready_fd, fetcher.fd):
        os.set_inheritable(fd, False)
    with _pids(files):
        kernel = _agree(fuse_fd)
        say(
            f"serving {files.mount}, FUSE {kernel.major}.{kernel.minor}"
            + ("" if kernel.resends else ", which cannot replace a dead worker")
        )
        settle()
        keeper = Keeper(files, _descriptors(fuse_fd, workers()), {lock_fd, ready_fd}, serve, fetcher)
        try:
            keeper.start()
            os.write(ready_fd, READY)
            return keeper.watch()
        finally:
            keeper.end()


def workers() -> int:
    return max(2, min(4, len(os.sched_getaffinity(0))))


def settle() -> None:
    """What workers inherit: all the descriptors that we may have, memory that is not given back and taken again with every answer, few pages to copy."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if tune := getattr(_libc, "mallopt", None):  # not in musl
        for what, value in ((_M_MMAP_THRESHOLD, _KEPT), (_M_TRIM_THRESHOLD, _KEPT), (_M_TOP_PAD, 1 << 20)):
            tune(what, value)
    with contextlib.suppress(OSError):  # root only: every machine of this host dies with the keeper, so it should not be the first to go
        Path("/proc/self/oom_score_adj").write_text("-900")
    gc.collect()
    gc.freeze()


def _agree(fd: int) -> fuse.Kernel:
    """Answer INIT, the first request of a mount. OSError, ValueError: there is none, or this kernel is too old."""
    if not select.select([fd], [], [], INIT_PATIENCE)[0]:
        raise OSError(errno.ETIMEDOUT, "the kernel does not greet")
    request = os.read(fd, fuse.BUFFER)
    _, opcode, unique, *_ = fuse.IN.unpack_from(request)
    if opcode != fuse.Opcode.INIT:
        raise OSError(errno.EPROTO, f"the kernel's first request is {opcode}")
    kernel = fuse.init_request(request[fuse.IN.size :])
    body = fuse.init_answer(kernel)
    os.writev(fd, fuse.answer(unique, [body], len(body)))
    return kernel


def _descriptors(fd: int, count: int) -> list[int]:
    """One for each worker. Where the device may not be opened again (it was fusermount3 who could), they share one: slower by the wait for its queue only."""
    found = [fd]
    try:
        while len(found) < count:
            clone = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
            found.append(clone)
            fcntl.ioctl(clone, fuse.CLONE, struct.pack("=I", fd))
    except OSError as error:
        say(f"the workers share one descriptor: {error}")
        for clone in found[1:]:
            os.close(clone)
        return [fd] * count
    return found


class Keeper:
    """own: descriptors that workers must not hold."""

    def __init__(self, files: StoreDir, fds: Sequence[int], own: set[int], serve: Callable[[int], None], fetcher: Fetcher) -> None:
        self._files = files
        self._slots = [Slot(fd) for fd in fds]
        self._own = {*own, fetcher.fd}
        self._fetcher = fetcher
        self._serve = serve
        self._me = os.getpid()
        self._crashes = 0

    def start(self) -> None:
        """Start the workers. OSError: not one could be."""
        if not self._fill():
            raise OSError(errno.EAGAIN, "no worker could be started")

    def watch(self) -> int:
        """Wait for what happens to the workers; returns when there is nothing left to keep."""
        while True:
            patience = RETRY if self._fetcher.due or not all(slot.pid for slot in self._slots) else None
            found = signal.sigtimedwait(_WATCHED, patience) if patience else signal.sigwaitinfo(_WATCHED)
            number = found.si_signo if found else signal.SIGCHLD
            if number == signal.SIGTERM:
                say("told to end")
                return UNMOUNTED
            if number == signal.SIGHUP:
                for slot in self._living():
                    os.kill(slot.pid, signal.SIGHUP)
            elif number == signal.SIGUSR1:
                self._fetcher.want()
                self._write_pids()
            elif (status := self._replace()) is not None:
                return status

    def end(self) -> None:
        """Unmount, and end the workers: what is under way fails with the last descriptor's closing, at our exit."""
        with contextlib.suppress(OSError):  # without root that is the daemon's to do, through fusermount3
            unmount(self._files.mount)
        for slot in self._living():
            os.kill(slot.pid, signal.SIGKILL)
            os.waitpid(slot.pid, 0)
        self._fetcher.end()

    def _living(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.pid]

    def _replace(self) -> int | None:
        """A new worker for each that ended, and a new fetcher; an exit status when the keeper is to end."""
        if self._fetcher.reap() or self._fetcher.due:
            self._fetcher.start()
            self._write_pids()
        for slot in self._living():
            pid, status = os.waitpid(slot.pid, os.WNOHANG)
            if not pid:
                continue
            slot.pid = 0
            if os.WIFEXITED(status) and os.WEXITSTATUS(status) == UNMOUNTED:
                say("unmounted")
                return UNMOUNTED
            say(f"worker {pid} ended: {_ending(status)}")
            self._count(slot, status)
        if self._crashes >= CRASHES:
            say(f"giving up: {self._crashes} workers in a row crashed within {SOON:g} s of their start")
            return FAILED
        return None if len(self._living()) == len(self._slots) or (self._fill() and self._resend()) else FAILED

    def _count(self, slot: Slot, status: int) -> None:
        if not _is_killed(status):
            self._crashes = self._crashes + 1 if time.monotonic() - slot.started < SOON else 0

    def _resend(self) -> bool:
        """After the dead are reaped: they take no more requests. What living workers have under way is sent again too, and their first answer is refused."""
        try:
            os.write(self._slots[0].fd, fuse.resend())
        except OSError as error:
            say(f"giving up: this kernel cannot send requests again (Linux 6.9 and newer can): {error}")
            return False
        return True

    def _fill(self) -> bool:
        """A worker for each slot that has none; whether there is any at all afterwards."""
        for slot in self._slots:
            if not slot.pid:
                try:
                    self._fork(slot)
                except OSError as error:
                    say(f"no new worker for now: {error}")
        self._write_pids()
        return bool(self._living())

    def _fork(self, slot: Slot) -> None:
        slot.started = time.monotonic()
        pid = os.fork()
        if not pid:
            self._work(slot)
        slot.pid = pid

    def _work(self, slot: Slot) -> None:
        """The worker's life; does not return."""
        status = FAILED
        try:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() == self._me:  # else the keeper died before the line above
                for fd in {*self._own, *(each.fd for each in self._slots)} - {slot.fd}:
                    os.close(fd)
                self._serve(slot.fd)
                status = UNMOUNTED
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _write_pids(self) -> None:
        roles = [("keeper", self._me), *(("worker", slot.pid) for slot in self._living())]
        if self._fetcher.pid:
            roles.append(("fetcher", self._fetcher.pid))
        lines = [f"{role} {pid} {started(pid)}" for role, pid in roles]
        staged = self._files.pids.with_suffix(".new")
        try:
            staged.write_text("\n".join(lines) + "\n")
            staged.rename(self._files.pids)
        except OSError as error:  # a full disk is no reason to let machines die: the lock tells that we live
            say(f"{self._files.pids} could not be written: {error}")


@contextlib.contextmanager
def _pids(files: StoreDir) -> Iterator[None]:
    try:
        yield
    finally:
        files.pids.unlink(missing_ok=True)


def _is_killed(status: int) -> bool:
    """SIGKILL comes from outside (an administrator, a host out of memory) and says nothing about the next process."""
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def _ending(status: int) -> str:
    return f"killed by {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else f"exit status {os.WEXITSTATUS(status)}"


def started(pid: int) -> int:
    """As `process.start_time`; 0 for a process that is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0
