"""One stream of the agent's line, as its user holds it: events with credit one way, input the other. See agent/PROTOCOL.md."""

from __future__ import annotations

import asyncio
import errno
import os
from collections import deque
from collections.abc import AsyncGenerator
from typing import Protocol

from ramet import agentwire
from ramet.agentwire import EndKind, Frame, Kind, ProtocolError
from ramet.errors import GuestError, GuestNotFoundError, RametError
from ramet.model import Channel, Ending, Exit, Output, ProcessEvent, Started

_CHANNELS = {1: Channel.STDOUT, 2: Channel.STDERR}
_ENDINGS = {
    EndKind.EXITED: Ending.EXITED,
    EndKind.SIGNALED: Ending.SIGNALED,
    EndKind.TIMEOUT: Ending.TIMEOUT,
    EndKind.DETACHED: Ending.DETACHED,
}

Event = Started | Output | agentwire.Eof | agentwire.End


def failed(end: agentwire.End) -> GuestError:
    """The error for an END of kind FAILED."""
    name = errno.errorcode.get(end.code, str(end.code))
    message = end.message or os.strerror(end.code)
    details = {"errno": name}
    if end.code in (errno.ENOENT, errno.ESRCH):
        return GuestNotFoundError(message, details=details)
    hint = {
        "EAGAIN": "The guest's process table is full: kill something in it, or `ramet stop` it.",
        "ENOMEM": "The guest is out of memory.",
        "ENOSPC": "The guest's disk is full.",
    }
    return GuestError(message, hint=hint.get(name, ""), details=details)


class Line(Protocol):
    """What a stream needs of its connection."""

    def send(self, data: bytes) -> None:
        """Queue a small control frame."""

    async def send_all(self, data: bytes) -> None:
        """Queue data, waiting while the line is full."""

    def forget(self, stream: Stream) -> None:
        """CLOSE."""


class Stream:
    """One stream: what the guest sends waits here, at most a window for each channel; credit goes back as it is taken."""

    def __init__(self, line: Line, number: int, what: str) -> None:
        self._line = line
        self.number = number
        self.what = what
        self._events: deque[Event] = deque()
        self._open = {1, 2}
        self._allowed = {1: agentwire.WINDOW, 2: agentwire.WINDOW}
        self._owed = {1: 0, 2: 0}
        self._credit = agentwire.WINDOW
        self._changed = asyncio.Event()
        self._started = False
        self._error: RametError | None = None
        self.ended = False

    def deliver(self, frame: Frame) -> None:
        """Take a frame from the connection; a guest that exceeds its credit or repeats itself breaks the protocol."""
        if self.ended:
            raise ProtocolError("the guest's agent sent a frame after END")
        match frame.kind:
            case Kind.DATA:
                left = self._allowed.get(frame.flags, -1) - len(frame.payload)
                if left < 0 or not frame.payload or frame.flags not in self._open:
                    raise ProtocolError("the guest's agent sent more than it may")
                self._allowed[frame.flags] = left
                self._events.append(Output(channel=_CHANNELS[frame.flags], data=frame.payload))
            case Kind.STARTED if not self._started:
                process, pid = agentwire.parse_pair(frame.payload)
                self._started = True
                self._events.append(Started(process=process, pid=pid))
            case Kind.END:
                self._events.append(agentwire.parse_end(frame.payload))
                self.ended = True  # after the line that may raise: else nobody would tell those who wait here
            case Kind.CREDIT:
                self._credit = min(self._credit + agentwire.parse_credit(frame.payload), 1 << 30)
            case Kind.EOF if frame.flags in self._open:
                self._open.discard(frame.flags)
                self._events.append(agentwire.Eof(frame.flags))
            case _:
                raise ProtocolError(f"the guest's agent sent {frame.kind.name} where it may not")
        self._changed.set()

    def fail(self, error: RametError) -> None:
        """The connection is gone; whoever waits here learns it after what has arrived."""
        if not self.ended:
            self.ended, self._error = True, error
            self._changed.set()

    async def next(self) -> Event:
        """The next event; gives the credit of output back."""
        while not self._events:
            if self._error:
                raise self._error
            self._changed.clear()
            await self._changed.wait()
        event = self._events.popleft()
        if isinstance(event, Output):
            self._consumed(1 if event.channel is Channel.STDOUT else 2, len(event.data))
        return event

    def _consumed(self, channel: int, amount: int) -> None:
        self._owed[channel] += amount
        if self._owed[channel] >= agentwire.WINDOW // 4 and not self.ended:
            self._allowed[channel] += self._owed[channel]
            self._line.send(agentwire.credit(self.number, channel, self._owed[channel]))
            self._owed[channel] = 0

    async def write(self, data: bytes) -> None:
        """Send to the process's stdin, as fast as it takes it. GuestError when it has ended."""
        view = memoryview(data)
        while view:
            while not self._credit and not self.ended:
                self._changed.clear()
                await self._changed.wait()
            if self.ended:
                raise self._error or GuestError(f"{self.what} ended before it took all its input", details={"errno": "EPIPE"})
            piece = view[: min(self._credit, agentwire.MAX_PAYLOAD)]
            self._credit -= len(piece)
            await self._line.send_all(agentwire.frame(Kind.DATA, self.number, bytes(piece)))
            view = view[len(piece) :]

    def eof(self) -> None:
        """No more input."""
        if not self.ended:
            self._line.send(agentwire.frame(Kind.EOF, self.number))

    def close(self) -> None:
        """Not interested any more; see CLOSE."""
        self._line.forget(self)

    async def end(self) -> agentwire.End:
        """Wait for END, dropping output; raise for FAILED."""
        while True:
            event = await self.next()
            if isinstance(event, agentwire.End):
                if event.kind is EndKind.FAILED:
                    raise failed(event)
                return event

    async def events(self) -> AsyncGenerator[ProcessEvent, None]:
        """Started, Output… and Exit; closes the stream when the iteration ends early."""
        try:
            while True:
                event = await self.next()
                if isinstance(event, Started | Output):
                    yield event
                elif isinstance(event, agentwire.Eof):
                    continue
                elif event.kind is EndKind.FAILED:
                    raise failed(event)
                else:
                    yield Exit(ending=_ENDINGS[event.kind], code=event.code)
                    return
        finally:
            self.close()
