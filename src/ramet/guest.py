"""The host half of the agent: one connection to one guest, streams with credits over it. See agent/PROTOCOL.md."""

from __future__ import annotations

import asyncio
import errno
import os
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Mapping
from pathlib import Path

from ramet import agentwire, sockets
from ramet.agentwire import EndKind, Frame, Kind, Op, OpenFlag, ProtocolError, Tag
from ramet.errors import GuestError, GuestNotFoundError, MachineFailedError, OutcomeUnknownError, RametError
from ramet.model import Channel, Command, Ending, Exit, Output, Process, ProcessEvent, Started

SILENCE = (
    60.0  # seconds without a byte, though asked, after which a guest counts as not answering: an emulated one with a busy host can be slow
)
SHORT = 30.0  # deadline of calls that start nothing, in seconds
_HIGH = 256 << 10  # bytes in the transport's buffer beyond which writers wait
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


class Stream:
    """One stream: what the guest sends waits here, at most a window for each channel; credit goes back as it is taken."""

    def __init__(self, guest: Guest, number: int, what: str) -> None:
        self._guest = guest
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
            self._guest.send(agentwire.credit(self.number, channel, self._owed[channel]))
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
            await self._guest.send_all(agentwire.frame(Kind.DATA, self.number, bytes(piece)))
            view = view[len(piece) :]

    def eof(self) -> None:
        """No more input."""
        if not self.ended:
            self._guest.send(agentwire.frame(Kind.EOF, self.number))

    def close(self) -> None:
        """Not interested any more; see CLOSE."""
        self._guest.forget(self)

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


class Guest(asyncio.Protocol):
    """A connection to an agent. `connect` makes one; `closed` is done when it is gone, with the reason as its result."""

    def __init__(self, silence: float) -> None:
        loop = asyncio.get_running_loop()
        self._nonce = os.urandom(agentwire.NONCE)
        self._decoder = agentwire.Decoder(self._nonce)
        self._streams: dict[int, Stream] = {}
        self._numbers = iter(range(1, 1 << 32))
        self._writable = asyncio.Event()
        self._writable.set()
        self._silence = silence
        self._heard = loop.time()
        self._watch: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self.version = ""
        self.boot_id = b""
        self.synced: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[str] = loop.create_future()

    @classmethod
    async def connect(cls, path: Path, *, deadline: float, resync: bool, silence: float | None = None) -> Guest:
        """Connect to the agent whose port is the socket `path`, waiting at most `deadline` seconds for it to answer.

        resync: the agent may be in the middle of a frame (it served another daemon before). silence: as SILENCE.
        """
        _, guest = await sockets.connect(path, lambda: cls(silence or SILENCE))
        guest.send((agentwire.RESYNC if resync else b"") + agentwire.frame(Kind.SYNC, 0, guest._nonce))
        try:
            async with asyncio.timeout(deadline):
                await guest.synced
        except TimeoutError:
            guest.abort("it did not answer")
            raise MachineFailedError(
                f"the guest's agent did not answer within {deadline:.0f} s", hint="`ramet logs` shows the guest's console."
            ) from None
        except BaseException:
            guest.abort("given up")
            raise
        return guest

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.set_write_buffer_limits(high=_HIGH)
        self._transport = transport

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        self._heard = asyncio.get_running_loop().time()
        try:
            for frame in self._decoder.feed(data):
                self._dispatch(frame)
        except RametError as error:
            self.abort(error.message)

    def connection_lost(self, exc: Exception | None) -> None:
        self.abort("the line to it broke")

    def _dispatch(self, frame: Frame) -> None:
        if frame.kind is Kind.SYNC:
            if self.synced.done():
                raise ProtocolError("the guest's agent began anew")
            self.boot_id, self.version = agentwire.parse_sync(frame.payload)
            self.synced.set_result(None)
        elif stream := self._streams.get(frame.stream):
            stream.deliver(frame)
            if stream.ended:
                del self._streams[frame.stream]
        # else: a stream that we closed; what was under way is dropped

    # sending

    def send(self, data: bytes) -> None:
        """Queue small control frames; bounded by the number of streams."""
        if self._transport and not self._transport.is_closing():
            self._transport.write(data)

    async def send_all(self, data: bytes) -> None:
        """Queue data, waiting while the line is full."""
        await self._writable.wait()
        self.send(data)

    def abort(self, reason: str) -> None:
        """End the connection and everything on it."""
        if self.closed.done():
            return
        self.closed.set_result(reason)
        if self._watch:
            self._watch.cancel()
        self._writable.set()
        if self._transport:
            self._transport.abort()
        if not self.synced.done():
            self.synced.set_exception(
                MachineFailedError(f"the guest's agent went away: {reason}", hint="`ramet logs` shows the guest's console.")
            )
            self.synced.exception()  # taken here: nobody may be waiting
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(
                OutcomeUnknownError(
                    f"the outcome of {stream.what} is unknown: the guest's agent is gone ({reason})",
                    hint="It may have run, in part or whole. See `ramet show` and `ramet logs`.",
                )
            )

    # streams

    def open(self, op: Op, what: str, params: Iterable[bytes] = (), flags: int = 0) -> Stream:
        """Begin a stream. what: as errors name it."""
        if self.closed.done():
            raise MachineFailedError(f"the guest's agent is gone: {self.closed.result()}", hint="`ramet show` and `ramet logs` say more.")
        stream = Stream(self, next(self._numbers), what)
        self.send(agentwire.open_frames(stream.number, op, flags, params))
        self._streams[stream.number] = stream
        if not self._watch:
            self._heard = max(self._heard, asyncio.get_running_loop().time() - self._silence / 4)
            self._schedule()
        return stream

    def forget(self, stream: Stream) -> None:
        if self._streams.pop(stream.number, None):
            stream.ended = True
            self.send(agentwire.frame(Kind.CLOSE, stream.number))

    def _schedule(self) -> None:
        self._watch = asyncio.get_running_loop().call_later(self._silence / 4, self._check)

    def _check(self) -> None:
        """While anything is under way: ask a guest that is silent, give up one that stays so."""
        self._watch = None
        if not self._streams:
            return
        quiet = asyncio.get_running_loop().time() - self._heard
        if quiet >= self._silence:
            self.abort(f"it did not answer for {self._silence:.0f} s")
            return
        if quiet >= self._silence / 4:
            self.send(agentwire.open_frames(next(self._numbers), Op.PING, 0, ()))
        self._schedule()

    async def _call(self, op: Op, what: str, params: Iterable[bytes] = (), deadline: float | None = None) -> bytes:
        """An inline op: what it writes to channel 1, at most 1 MiB. deadline: SHORT, unless given."""
        deadline = SHORT if deadline is None else deadline
        stream = self.open(op, what, params)
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(deadline):
                while not isinstance(event := await stream.next(), agentwire.End):
                    if isinstance(event, Output):
                        parts.append(event.data)
                    if sum(map(len, parts)) > 1 << 20:
                        raise ProtocolError(f"the guest's answer to {what} is too long")
        except TimeoutError:
            raise OutcomeUnknownError(f"the guest did not answer {what} within {deadline:.0f} s") from None
        finally:
            stream.close()
        if event.kind is EndKind.FAILED:
            raise failed(event)
        return b"".join(parts)

    async def ping(self, deadline: float | None = None) -> None:
        await self._call(Op.PING, "a ping", deadline=deadline)

    def execute(self, command: Command, *, env: Mapping[str, str] | None = None, builtin: bool = False) -> Stream:
        """Start a program. env: the whole environment to give it (the command's own is not looked at when given)."""
        flags = OpenFlag.STDIN if command.stdin else OpenFlag(0)
        params = [agentwire.param(Tag.ARG, arg) for arg in command.argv]
        params += [agentwire.param(Tag.ENV, f"{k}={v}") for k, v in (command.env if env is None else env).items()]
        for tag, value in ((Tag.CWD, command.cwd), (Tag.USER, command.user), (Tag.NAME, command.label[:64])):
            if value:
                params.append(agentwire.param(tag, value))
        if command.timeout is not None:
            params.append(agentwire.param(Tag.TIMEOUT, max(1, round(command.timeout * 1000))))
        if command.pty:
            flags |= OpenFlag.PTY
            params += [agentwire.param(Tag.ROWS, command.pty.rows), agentwire.param(Tag.COLS, command.pty.columns)]
        flags |= (OpenFlag.DETACH if command.detach else 0) | (OpenFlag.BUILTIN if builtin else 0)
        return self.open(Op.EXEC, f"`{command.argv[0] if command.argv else ''}`", params, flags)

    def attach(self, process: int) -> Stream:
        return self.open(Op.ATTACH, f"process {process}", [agentwire.param(Tag.PROCESS, process)])

    async def dial(self, port: int, host: str = "", deadline: float = SHORT) -> Stream:
        """Connect to a TCP port inside the guest. GuestError when it refuses."""
        params = [agentwire.param(Tag.PORT, port), *([agentwire.param(Tag.HOST, host)] if host else [])]
        stream = self.open(Op.DIAL, f"the connection to port {port}", params)
        try:
            async with asyncio.timeout(deadline):
                event = await stream.next()
        except BaseException:
            stream.close()
            raise
        if isinstance(event, agentwire.End):
            raise failed(event)
        return stream

    async def processes(self) -> list[Process]:
        return agentwire.parse_processes(await self._call(Op.LIST, "the list of processes"))

    async def signal(self, process: int, signal: int) -> None:
        await self._call(Op.SIGNAL, "a signal", [agentwire.param(Tag.PROCESS, process), agentwire.param(Tag.SIGNAL, signal)])

    async def resize(self, process: int, rows: int, columns: int) -> None:
        await self._call(
            Op.RESIZE,
            "a resize",
            [agentwire.param(Tag.PROCESS, process), agentwire.param(Tag.ROWS, rows), agentwire.param(Tag.COLS, columns)],
        )

    async def forget_process(self, process: int) -> None:
        await self._call(Op.FORGET, "a removal from the list", [agentwire.param(Tag.PROCESS, process)])

    async def metrics(self) -> dict[str, float]:
        return agentwire.parse_metrics(await self._call(Op.METRICS, "the metrics"))

    async def power_off(self, grace: float) -> None:
        """Ask for a power-off; the guest's end is for the caller to see."""
        await self._call(Op.POWEROFF, "a power-off", [agentwire.param(Tag.GRACE, round(grace * 1000))])
