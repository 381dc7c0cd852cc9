"""A process of a guest, held by whoever started it: its input, its output, its end."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import inspect
import signal as signals
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Self

from ramet.errors import OutcomeUnknownError, RametError
from ramet.model import Channel, Exit, Output, ProcessEvent, Started
from ramet.rest import PIECE
from ramet.verbs import Verbs

KEPT = 1 << 20  # bytes of a stream that are held for a reader

Listener = Callable[[bytes], Awaitable[None] | None]


class AsyncOutput:
    """stdout or stderr. Iterate over it, `read()` it, or take its `lines()`.

    While somebody reads, nothing is lost: a slow reader holds the process back. What nobody reads does not: its last MiB is
    kept for whoever comes, and `dropped` counts the bytes before that.
    """

    def __init__(self, listener: Listener | None = None) -> None:
        self.dropped = 0
        self._listener = listener
        self._parts: deque[bytes] = deque()
        self._size = 0
        self._readers = 0
        self._ended = False
        self._error: RametError | None = None
        self._filled = asyncio.Event()
        self._drained = asyncio.Event()

    async def put(self, data: bytes) -> None:
        """Take what the process wrote; for the process's own pump."""
        if self._listener:
            waiting = self._listener(data)
            if inspect.isawaitable(waiting):
                await waiting
            return
        self._parts.append(data)
        self._size += len(data)
        self._filled.set()
        while self._readers and self._size > KEPT:
            self._drained.clear()
            await self._drained.wait()
        while self._size > KEPT:
            self.dropped += len(self._take())

    def end(self, error: RametError | None) -> None:
        """Nothing follows; readers get `error` after what there is."""
        self._ended, self._error = True, error
        self._filled.set()

    def _take(self) -> bytes:
        part = self._parts.popleft()
        self._size -= len(part)
        self._drained.set()
        return part

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self._readers += 1
        try:
            while True:
                while self._parts:
                    yield self._take()
                if self._ended:
                    break
                self._filled.clear()
                await self._filled.wait()
        finally:
            self._readers -= 1
            self._drained.set()
        if self._error:
            raise self._error

    async def read(self) -> bytes:
        """All there is to come, to the end."""
        return b"".join([part async for part in self])

    async def lines(self) -> AsyncIterator[str]:
        """Lines as text, without their ends; bytes that are not UTF-8 are replaced."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        rest = ""
        async for part in self:
            *whole, rest = (rest + decoder.decode(part)).split("\n")
            for line in whole:
                yield line.removesuffix("\r")
        rest += decoder.decode(b"", final=True)
        if rest:
            yield rest


class AsyncInput:
    """stdin. Each write returns when the guest has taken it."""

    def __init__(self, verbs: Verbs, machine: str, process: int) -> None:
        self._verbs, self._machine, self._process = verbs, machine, process

    async def write(self, data: bytes | str) -> None:
        view = memoryview(data.encode() if isinstance(data, str) else data)
        for at in range(0, len(view), PIECE):
            await self._verbs.send_input(self._machine, self._process, bytes(view[at : at + PIECE]))

    async def close(self) -> None:
        """End of file."""
        await self._verbs.send_input(self._machine, self._process, b"", eof=True)


class AsyncProcess:
    """A running process. Leaving its `async with`, or `close()`, kills it unless it was started detached; so does the end of the program."""

    def __init__(
        self,
        verbs: Verbs,
        machine: str,
        events: AsyncIterator[ProcessEvent],
        started: Started,
        on_stdout: Listener | None = None,
        on_stderr: Listener | None = None,
    ) -> None:
        self.id = started.process
        self.pid = started.pid
        self.stdin = AsyncInput(verbs, machine, self.id)
        self.stdout = AsyncOutput(on_stdout)
        self.stderr = AsyncOutput(on_stderr)
        self._verbs, self._machine, self._events = verbs, machine, events
        self._exit: Exit | None = None
        self._error: RametError | None = None
        self._pump = asyncio.create_task(self._run(), name=f"process {self.id} of {machine}")

    @classmethod
    async def open(
        cls,
        verbs: Verbs,
        machine: str,
        events: AsyncIterator[ProcessEvent],
        on_stdout: Listener | None = None,
        on_stderr: Listener | None = None,
    ) -> Self:
        """Follow what `Verbs.execute` or `attach` yields. Returns when the process has started; raises what it could not start for."""
        async for event in events:
            if isinstance(event, Started):
                return cls(verbs, machine, events, event, on_stdout, on_stderr)
        raise OutcomeUnknownError("the process ended without having started")

    async def _run(self) -> None:
        """Pass on what comes, until the end."""
        try:
            async for event in self._events:
                if isinstance(event, Output):
                    await (self.stdout if event.channel is Channel.STDOUT else self.stderr).put(event.data)
                elif isinstance(event, Exit):
                    self._exit = event
            if not self._exit:
                self._error = OutcomeUnknownError(f"the outcome of process {self.id} is unknown: its stream ended")
        except RametError as error:
            self._error = error
        finally:
            if not self._exit and not self._error:  # cancelled, or a listener failed
                self._error = OutcomeUnknownError(f"process {self.id} is no longer followed")
            for stream in (self.stdout, self.stderr):
                stream.end(self._error)
            if ending := getattr(self._events, "aclose", None):
                await ending()

    @property
    def exit(self) -> Exit | None:
        """How it ended, None while it runs."""
        return self._exit

    async def wait(self, timeout: float | None = None) -> Exit:
        """How it ended. TimeoutError when it has not within `timeout` seconds (it runs on); what a listener raised."""
        done, _ = await asyncio.wait({self._pump}, timeout=timeout)
        if not done:
            raise TimeoutError(f"process {self.id} runs on after {timeout} s")
        if not self._pump.cancelled() and (error := self._pump.exception()):
            raise error
        if self._exit:
            return self._exit
        assert self._error
        raise self._error

    async def signal(self, number: int) -> None:
        """Signal its whole group."""
        await self._verbs.signal(self._machine, self.id, number)

    async def kill(self) -> None:
        """SIGKILL to its whole group; `wait()` tells when it is gone."""
        await self.signal(signals.SIGKILL)

    async def close(self) -> None:
        """Stop following it: it is killed, unless it was started detached."""
        self._pump.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await self._pump

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncTerminal(AsyncProcess):
    """A process on a terminal of its own. Its output is `stdout`; nothing comes on `stderr`."""

    async def write(self, data: bytes | str) -> None:
        """Type."""
        await self.stdin.write(data)

    async def resize(self, rows: int, columns: int) -> None:
        await self._verbs.resize(self._machine, self.id, rows, columns)
