"""The host half of the agent: one connection to one guest, streams with credits over it. See agent/PROTOCOL.md."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ramet import agentwire, sockets
from ramet.agentstream import Stream, failed
from ramet.agentwire import EndKind, Frame, Kind, Op, OpenFlag, ProtocolError, Tag
from ramet.errors import GuestError, MachineFailedError, OutcomeUnknownError, RametError, TimeoutExpiredError
from ramet.identity import Identity
from ramet.model import Channel, Command, Ending, Exit, Output, Process
from ramet.patience import Patience

__all__ = ["Guest", "Identity", "Stream"]

# Seconds without a byte, though asked, after which a guest counts as not answering: an emulated one with a busy host can be slow.
SILENCE = 60.0
_ASKED = 3  # times that it was asked by then
SHORT = 30.0  # deadline of calls that start nothing, in seconds
_HIGH = 256 << 10  # bytes in the transport's buffer beyond which writers wait
CLOCK_ERROR = 0.5  # seconds that a guest's clock may be behind when it is set: half of what is promised
_TAIL = 4096  # bytes of a hook's output that are kept for its error


def _hook_error(end: Exit, said: Mapping[Channel, bytes], timeout: float) -> GuestError:
    """The error for `hooks` that did not end well. said: what it and the hooks wrote."""
    late = end.ending is Ending.TIMEOUT
    if end.ending is not Ending.EXITED and not late:
        return GuestError(f"the programs in {agentwire.HOOKS} were killed by signal {end.code}")
    name, what, text = "", "", agentwire.printable(said[Channel.STDERR])
    try:
        name, what, text = agentwire.parse_hook(said[Channel.STDERR])
    except ProtocolError:
        if not late:  # the agents of older snapshots do not say which one hung
            raise
    text = text if text.strip() else agentwire.printable(said[Channel.STDOUT])
    hint, details = "Mend it in the image, or in the machine that was forked.", {"hook": name, "log": text}
    if late:
        which = f"{agentwire.HOOKS}/{name}" if name else f"one of the programs in {agentwire.HOOKS}"
        return TimeoutExpiredError(f"{which} did not end within {timeout:.0f} s: {_last_line(text)}", hint=hint, details=details)
    return GuestError(f"{agentwire.HOOKS}/{name} failed, {what}: {_last_line(text)}", hint=hint, details=details)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


class Guest(asyncio.Protocol):
    """A connection to an agent. `connect` makes one; `closed` is done when it is gone, with the reason as its result.

    hooks_due: what the last IDENTIFY said: there are programs for `run_hooks`.
    """

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
        self._asked = 0  # times since then
        self._watch: asyncio.TimerHandle | None = None
        self._patience = Patience()
        self._waiting = bytearray()  # what is to be sent when the machine goes on
        self._greeting: Stream | None = None
        self._greeted = 0.0
        self.hooks_due = False
        self._transport: asyncio.Transport | None = None
        self.version = ""
        self.boot_id = b""
        self.synced: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[str] = loop.create_future()

    @classmethod
    async def connect(
        cls, path: Path, *, deadline: float, resync: bool, identity: Identity | None = None, silence: float | None = None
    ) -> Guest:
        """Connect to the agent whose port is the socket `path`, waiting at most `deadline` seconds for it to answer: `reach`, `greet`, `answered`."""
        guest = await cls.reach(path, silence=silence)
        guest.greet(resync=resync, identity=identity)
        await guest.answered(deadline)
        return guest

    @classmethod
    async def reach(cls, path: Path, *, silence: float | None = None) -> Guest:
        """Open the line and say nothing yet. A guest whose device state is loaded after this never sees its port closed. silence: as SILENCE."""
        _, guest = await sockets.connect(path, lambda: cls(silence or SILENCE))
        return guest

    def greet(self, *, resync: bool, identity: Identity | None = None) -> None:
        """Queue SYNC and, right behind it, IDENTIFY. The guest need not run yet; its clock is set to the time of this call, so make it late.

        resync: the agent may be in the middle of a frame (it served another daemon before); after a restore it was quiet, so it is not.
        """
        data = agentwire.RESYNC if resync else b""
        data += agentwire.frame(Kind.SYNC, 0, self._nonce)
        if identity:
            self._greeting = Stream(self, next(self._numbers), "the new identity")
            self._streams[self._greeting.number] = self._greeting
            data += agentwire.open_frames(self._greeting.number, Op.IDENTIFY, 0, identity.params())
        self._greeted = asyncio.get_running_loop().time()
        self.send(data)

    async def answered(self, deadline: float) -> None:
        """Wait for the answers to `greet`. MachineFailedError when one does not come or is a refusal; the line is closed then."""
        try:
            async with asyncio.timeout(deadline):
                await self.synced
                if self._greeting:
                    self.hooks_due = bool((await self._greeting.end()).code)
                    await self._correct_clock(self._greeted)
        except TimeoutError:
            self.abort("it did not answer")
            raise MachineFailedError(
                f"the guest's agent did not answer within {deadline:.0f} s", hint="`ramet logs` shows the guest's console."
            ) from None
        except MachineFailedError:
            self.abort("given up")
            raise
        except GuestError as error:
            self.abort("it did not take its identity")
            raise MachineFailedError(
                f"the guest did not take its new identity: {error.message}",
                hint="It was not let run on as its parent's double. `ramet logs` shows its console.",
                details=error.details,
            ) from error
        except BaseException:
            self.abort("given up")
            raise

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
        self._heard, self._asked = asyncio.get_running_loop().time(), 0
        try:
            for frame in self._decoder.feed(data):
                self._dispatch(frame)
        except RametError as error:
            if not self.synced.done():
                self._unsynced(MachineFailedError(error.message, hint=error.hint))
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
        if self._patience.held:
            self._waiting += data
        else:
            self._write(data)

    def _write(self, data: bytes) -> None:
        if self._transport and not self._transport.is_closing():
            self._transport.write(data)

    async def send_all(self, data: bytes) -> None:
        """Queue data, waiting while the line is full or the machine stands still."""
        await self._patience.running()
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
        self._patience.end()
        self._waiting.clear()
        if self._transport:
            self._transport.abort()
        if not self.synced.done():
            self._unsynced(MachineFailedError(f"the guest's agent went away: {reason}", hint="`ramet logs` shows the guest's console."))
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(
                OutcomeUnknownError(
                    f"the outcome of {stream.what} is unknown: the guest's agent is gone ({reason})",
                    hint="It may have run, in part or whole. See `ramet show` and `ramet logs`.",
                )
            )

    def _unsynced(self, error: MachineFailedError) -> None:
        self.synced.set_exception(error)
        self.synced.exception()  # taken here: nobody may be waiting

    # standing still

    def hold(self) -> None:
        """The machine stands still, for as long as it likes: what callers send waits, and so do deadlines and the watch for silence. Nests."""
        self._patience.hold()

    def release(self) -> None:
        """It runs again: what waited is sent."""
        if not self._patience.release():
            return
        waiting, self._waiting = bytes(self._waiting), bytearray()
        self._write(waiting)
        self._heard, self._asked = asyncio.get_running_loop().time(), 0
        if self._streams and not self._watch:
            self._schedule()

    async def quiesce(self, deadline: float = SHORT) -> None:
        """Make the agent quiet, and `hold`: between this and `resume` nothing is under way in either direction, and the machine may be saved.

        When it fails, the machine goes on as if it had not been asked.
        """
        stream = self.open(Op.QUIESCE, "the request to be quiet")
        self.hold()
        try:
            async with asyncio.timeout(deadline):
                await stream.end()
        except TimeoutError:
            self._go_on()
            raise OutcomeUnknownError(f"the guest's agent did not become quiet within {deadline:.0f} s") from None
        except BaseException:
            self._go_on()
            raise

    async def resume(self, deadline: float = SHORT) -> None:
        """End the quiet; what waited follows at once."""
        stream = self._go_on()
        try:
            async with self._patience.limit(deadline):
                await stream.end()
        except TimeoutError:
            raise OutcomeUnknownError(f"the guest's agent did not go on within {deadline:.0f} s") from None
        finally:
            stream.close()

    def _go_on(self) -> Stream:
        """RESUME, whether the agent is quiet already or not, before anything else."""
        stream = Stream(self, next(self._numbers), "the request to go on")
        if self.closed.done():
            stream.fail(self._gone())
        else:
            self._write(agentwire.open_frames(stream.number, Op.RESUME, 0, ()))
            self._streams[stream.number] = stream
        self.release()
        return stream

    async def identify(self, identity: Identity, deadline: float = SHORT) -> bool:
        """Tell a running guest who it is, or with `Identity.clock()` only the time. True: there are programs for `run_hooks`."""
        await self._patience.running()
        asked = asyncio.get_running_loop().time()
        end, _ = await self._ask(Op.IDENTIFY, "the new identity", identity.params(), deadline)
        self.hooks_due = bool(end.code)
        async with self._patience.limit(deadline):
            await self._correct_clock(asked)
        return self.hooks_due

    async def _correct_clock(self, asked: float) -> None:
        """The guest set its clock at some moment since `asked` to the time of then; tell it again until the two cannot be far apart."""
        clock = asyncio.get_running_loop().time
        while clock() - asked > CLOCK_ERROR:
            await self._patience.running()
            asked = clock()
            await self._ask(Op.IDENTIFY, "the time", Identity.clock().params())

    async def run_hooks(self, generation: str, name: str, timeout: float) -> None:
        """Run the image's programs for copies of a machine. GuestError of the first that fails, with the last line that it wrote."""
        end, said = await self._builtin(Command(argv=("hooks", generation, name), timeout=timeout, label="fork.d"))
        if end.status:
            raise _hook_error(end, said, timeout)

    async def _builtin(self, command: Command) -> tuple[Exit, dict[Channel, bytes]]:
        """One of the agent's own functions: how it ended, and the end of what it wrote."""
        said = {Channel.STDOUT: b"", Channel.STDERR: b""}
        async with contextlib.aclosing(self.execute(command, builtin=True).events()) as events:
            async for event in events:
                if isinstance(event, Output):
                    said[event.channel] = (said[event.channel] + event.data)[-_TAIL:]
                elif isinstance(event, Exit):
                    return event, said
        raise ProtocolError("the guest's agent did not say how a builtin ended")

    # memory

    async def reclaim(self, size: int, deadline: float = SHORT) -> int:
        """Have the guest drop `size` bytes of what it holds of files, those that it used least recently; returns how many it did drop."""
        return (await self._memory("reclaim", str(size), deadline=deadline)).get("reclaimed", 0)

    async def tune(self, policy: Mapping[str, int], deadline: float = SHORT) -> bool:
        """Set DAMON's parameters, and whether it is `enabled`; one that has them all is left alone. False: the guest's kernel has no DAMON."""
        words = [f"{name}={value}" for name, value in policy.items()]
        return bool((await self._memory("tune", *words, deadline=deadline)).get("tuned"))

    async def slim(self, deadline: float) -> dict[str, int]:
        """Write all back, discard what the file systems have free, drop caches, compact: bytes "trimmed" of disks and "freed" of memory.

        The guest's kernel reports what it freed to the host within some seconds after this.
        """
        return {"trimmed": 0, "freed": 0} | await self._memory("slim", deadline=deadline)

    async def _memory(self, *argv: str, deadline: float) -> dict[str, int]:
        """A builtin that answers with lines `name value`. Nothing from the agent of an older snapshot, which does not have it."""
        await self._patience.running()
        try:
            async with self._patience.limit(deadline):
                end, said = await self._builtin(Command(argv=argv))
        except TimeoutError:
            raise OutcomeUnknownError(f"the guest did not finish `{argv[0]}` within {deadline:.0f} s") from None
        except GuestError as error:
            if error.details.get("errno") != "EPROTO":
                raise
            return {}
        if end.status:
            raise GuestError(f"the guest's `{argv[0]}` failed: {agentwire.printable(said[Channel.STDERR]).strip() or end.status}")
        return {name: int(value) for name, value in agentwire.parse_metrics(said[Channel.STDOUT]).items()}

    # streams

    @property
    def under_way(self) -> int:
        """How much is: commands that somebody is connected to, connections to its ports, files on their way, questions."""
        return len(self._streams)

    def open(self, op: Op, what: str, params: Iterable[bytes] = (), flags: int = 0) -> Stream:
        """Begin a stream. what: as errors name it."""
        if self.closed.done():
            raise self._gone()
        stream = Stream(self, next(self._numbers), what)
        self.send(agentwire.open_frames(stream.number, op, flags, params))
        self._streams[stream.number] = stream
        if not self._watch:
            self._heard = max(self._heard, asyncio.get_running_loop().time() - self._silence / (_ASKED + 1))
            self._schedule()
        return stream

    def _gone(self) -> MachineFailedError:
        return MachineFailedError(f"the guest's agent is gone: {self.closed.result()}", hint="`ramet show` and `ramet logs` say more.")

    def forget(self, stream: Stream) -> None:
        if self._streams.pop(stream.number, None):
            stream.ended = True
            self.send(agentwire.frame(Kind.CLOSE, stream.number))

    def _schedule(self) -> None:
        self._watch = asyncio.get_running_loop().call_later(self._silence / (_ASKED + 1), self._check)

    def _check(self) -> None:
        """While anything is under way: ask a guest that is silent, give up one that stays so."""
        self._watch = None
        if not self._streams or self._patience.held:
            return
        quiet = asyncio.get_running_loop().time() - self._heard
        if quiet >= self._silence and self._asked >= _ASKED:  # else it was us who stood still
            self.abort(f"it did not answer for {self._silence:.0f} s")
            return
        if quiet >= self._silence / (_ASKED + 1):
            self._asked += 1
            self.send(agentwire.open_frames(next(self._numbers), Op.PING, 0, ()))
        self._schedule()

    async def _call(self, op: Op, what: str, params: Iterable[bytes] = (), deadline: float | None = None) -> bytes:
        """An inline op: what it writes to channel 1, at most 1 MiB. deadline: SHORT, unless given."""
        return (await self._ask(op, what, params, deadline))[1]

    async def _ask(self, op: Op, what: str, params: Iterable[bytes] = (), deadline: float | None = None) -> tuple[agentwire.End, bytes]:
        deadline = SHORT if deadline is None else deadline
        await self._patience.running()
        stream = self.open(op, what, params)
        parts: list[bytes] = []
        try:
            async with self._patience.limit(deadline):
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
        return event, b"".join(parts)

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
            async with self._patience.limit(deadline):
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
