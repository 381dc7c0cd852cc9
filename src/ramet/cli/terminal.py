"""This end of a remote process: our terminal in raw mode, our stdin as it comes, our signals passed on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from typing import Any

from ramet.errors import RametError
from ramet.model import Size
from ramet.streams import AsyncInput, AsyncProcess, AsyncTerminal

CHUNK = 64 << 10
STDIN, STDOUT, STDERR = 0, 1, 2
_PASSING = 2.0  # seconds that the daemon gets to pass a signal on before we leave


def interactive() -> bool:
    """Whether a person sits at both ends of this program."""
    return os.isatty(STDIN) and os.isatty(STDOUT)


def has_input() -> bool:
    """Whether stdin is something to be sent on: a pipe, a file, a socket; neither a terminal nor /dev/null."""
    try:
        mode = os.fstat(STDIN).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def size() -> Size:
    """Of our terminal."""
    with contextlib.suppress(OSError):
        found = os.get_terminal_size(STDIN)
        if found.lines and found.columns:
            return Size(rows=found.lines, columns=found.columns)
    return Size()


@contextlib.contextmanager
def raw() -> Iterator[None]:
    """Our terminal passes every key on, Ctrl-C too. Restored whatever happens, signals that end us included."""
    before = termios.tcgetattr(STDIN)
    handlers: dict[signal.Signals, Any] = {}

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            handlers[number] = signal.signal(number, leave)
        tty.setraw(STDIN, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(STDIN, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Reader:
    """stdin as chunks. Not through threads: one that is stuck in a read would keep the program from ending."""

    def __init__(self, fd: int = STDIN) -> None:
        self._fd = fd
        self._file = stat.S_ISREG(os.fstat(fd).st_mode)  # never makes one wait, and cannot be polled

    async def read(self) -> bytes:
        """The next bytes, empty at the end."""
        if not self._file:
            loop = asyncio.get_running_loop()
            ready = asyncio.Event()
            loop.add_reader(self._fd, ready.set)
            try:
                await ready.wait()
            finally:
                loop.remove_reader(self._fd)
        try:
            return os.read(self._fd, CHUNK)
        except OSError:  # the terminal is gone
            return b""


async def feed(stdin: AsyncInput, reader: Reader) -> None:
    """Send our stdin on. A process that ended, or closed its own, needs no more."""
    with contextlib.suppress(RametError):
        while data := await reader.read():
            await stdin.write(data)
        await stdin.close()


def printer(fd: int) -> Callable[[bytes], Any]:
    """A listener that writes to a descriptor, in a thread: whoever reads us may be slow, and signals must still be heard."""

    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:  # a descriptor that somebody else made non-blocking
                import select

                select.select([], [fd], [])

    async def listen(data: bytes) -> None:
        await asyncio.to_thread(write, data)

    return listen


class Interrupts:
    """Ctrl-C at this end: SIGINT to the remote group, at the second SIGKILL, at the third we leave. SIGTERM and SIGHUP are passed on, then we leave."""

    def __init__(self, process: AsyncProcess) -> None:
        self._process = process
        self._count = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.left = asyncio.Event()

    def __enter__(self) -> Interrupts:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._come, number)
        return self

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)

    def _come(self, number: signal.Signals) -> None:
        self._count += 1
        if number is not signal.SIGINT or self._count > 2:
            self.left.set()
        task = asyncio.ensure_future(self._send(number if self._count == 1 else signal.SIGKILL))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def sent(self) -> None:
        """Wait, for a moment, until the daemon has what it was to pass on: that we leave kills the command, too."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_PASSING)

    async def _send(self, number: int) -> None:
        with contextlib.suppress(RametError):
            await self._process.signal(number)


async def follow(process: AsyncProcess, *, stdin: bool, signals: bool = True) -> int:
    """Send our stdin, wait for the end. signals: pass ours on; else they only end us. The status to leave with."""
    feeder = asyncio.create_task(feed(process.stdin, Reader())) if stdin else None
    try:
        if not signals:
            return (await process.wait()).status
        with Interrupts(process) as interrupts:
            ended = asyncio.create_task(process.wait())
            left = asyncio.create_task(interrupts.left.wait())
            try:
                await asyncio.wait({ended, left}, return_when=asyncio.FIRST_COMPLETED)
                if ended.done():
                    return (await ended).status
                await interrupts.sent()
                return 128 + signal.SIGINT
            finally:
                for task in (ended, left):
                    task.cancel()
                await asyncio.gather(ended, left, return_exceptions=True)
    finally:
        if feeder:
            feeder.cancel()
            await asyncio.gather(feeder, return_exceptions=True)
        await process.close()


async def sit(terminal: AsyncTerminal) -> int:
    """Our terminal as the remote one, until its process ends. Its status."""
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()

    async def resize() -> None:
        while True:
            await changed.wait()
            changed.clear()
            now = size()
            with contextlib.suppress(RametError):
                await terminal.resize(now.rows, now.columns)

    async def show() -> None:
        write = printer(STDOUT)
        async for data in terminal.stdout:
            await write(data)

    with raw():
        tasks = [asyncio.create_task(work) for work in (feed(terminal.stdin, Reader()), resize(), show())]
        loop.add_signal_handler(signal.SIGWINCH, changed.set)
        try:
            status = (await terminal.wait()).status
            await tasks[2]
            return status
        finally:
            loop.remove_signal_handler(signal.SIGWINCH)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await terminal.close()
            sys.stdout.flush()
