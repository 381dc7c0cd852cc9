"""The host's half of the agent's line against an agent that is played by the test: right, slow, silent, and hostile."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from ramet import agentwire as wire
from ramet.agentwire import WINDOW, EndKind, Kind, Op, OpenFlag, ProtocolError, Tag
from ramet.errors import GuestError, GuestNotFoundError, MachineFailedError, OutcomeUnknownError
from ramet.guest import Guest
from ramet.model import Channel, Command, Ending, Exit, Output, Started
from tests.unit.fakeagent import DEADLINE, FakeAgent, answered, collect, line, pair

TRUE = Command(argv=("true",))
CAT = Command(argv=("cat",), stdin=True)


@pytest_asyncio.fixture
async def connected(tmp_path: Path) -> AsyncIterator[tuple[Guest, FakeAgent]]:
    async with pair(tmp_path) as both:
        yield both


Pair = tuple[Guest, FakeAgent]


# --- connecting ---


async def test_connect_learns_version_and_boot_id(connected: Pair) -> None:
    guest, _ = connected
    assert (guest.version, guest.boot_id) == ("0.1.0", b"B" * 16)


async def test_resync_sends_the_zeros_and_skips_what_was_under_way(tmp_path: Path) -> None:
    async with line(tmp_path) as (path, arriving):
        connecting = asyncio.ensure_future(Guest.connect(path, deadline=DEADLINE, resync=True))
        agent = await arriving
        agent.send_raw(b"\xff" * 5000 + wire.frame(Kind.DATA, 3, b"x" * 100, 1)[:50])  # the middle of somebody's frames
        assert await agent.raw(len(wire.RESYNC)) == wire.RESYNC
        agent.answer_sync((await agent.expect(Kind.SYNC)).payload)
        (await connecting).abort("done")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda nonce: nonce + struct.pack("<I", 9) + b"B" * 16, "speaks protocol 9"),
        (lambda nonce: nonce, "wrong length"),
        (lambda nonce: nonce + struct.pack("<I", 1) + b"B" * 4000, "wrong length"),
    ],
)
async def test_a_wrong_answer_to_sync(tmp_path: Path, answer: Callable[[bytes], bytes], why: str) -> None:
    async with line(tmp_path) as (path, arriving):
        connecting = asyncio.ensure_future(Guest.connect(path, deadline=DEADLINE, resync=False))
        agent = await arriving
        hello = await agent.expect(Kind.SYNC)
        agent.send(Kind.SYNC, 0, answer(hello.payload))
        with pytest.raises(MachineFailedError, match=why):
            await connecting


async def test_no_answer_to_sync_ends_at_the_deadline(tmp_path: Path) -> None:
    async with line(tmp_path) as (path, _):
        with pytest.raises(MachineFailedError, match="did not answer within 0 s"):
            await Guest.connect(path, deadline=0.2, resync=False)


async def test_a_line_that_breaks_before_the_answer(tmp_path: Path) -> None:
    async with line(tmp_path) as (path, arriving):
        connecting = asyncio.ensure_future(Guest.connect(path, deadline=DEADLINE, resync=False))
        (await arriving).close()
        with pytest.raises(MachineFailedError, match="went away"):
            await connecting


# --- a command, as it should be ---


async def test_a_command_from_open_to_end(connected: Pair) -> None:
    guest, agent = connected
    stream = guest.execute(TRUE)
    number = await agent.expect_open(Op.EXEC)
    agent.started(number, 7, 1234)
    agent.send(Kind.DATA, number, b"out", 1)
    agent.send(Kind.DATA, number, b"err", 2)
    agent.send(Kind.EOF, number, flags=1)
    agent.end(number, EndKind.SIGNALED, 9)
    assert await collect(stream) == [
        Started(process=7, pid=1234),
        Output(channel=Channel.STDOUT, data=b"out"),
        Output(channel=Channel.STDERR, data=b"err"),
        Exit(ending=Ending.SIGNALED, code=9),
    ]


@pytest.mark.parametrize(
    ("code", "kind", "name"), [(2, GuestNotFoundError, "ENOENT"), (3, GuestNotFoundError, "ESRCH"), (13, GuestError, "EACCES")]
)
async def test_a_refusal(connected: Pair, code: int, kind: type[GuestError], name: str) -> None:
    guest, agent = connected
    stream = guest.execute(TRUE)
    agent.end(await agent.expect_open(Op.EXEC), EndKind.FAILED, code, b"exec true: \x1b[31mno")
    with pytest.raises(kind, match="exec true: \ufffd") as caught:
        await collect(stream)
    assert caught.value.details == {"errno": name}


# --- memory ---


async def answer(agent: FakeAgent, said: bytes, status: int = 0, complaint: bytes = b"") -> list[bytes]:
    """Play a builtin that says something and ends; returns its argv."""
    frame = await agent.expect(Kind.OPEN)
    op, flags = struct.unpack_from("<HH", frame.payload)
    assert (op, flags) == (Op.EXEC, OpenFlag.BUILTIN)
    argv, at = [], 4
    while at < len(frame.payload):
        tag, _, length = struct.unpack_from("<HHI", frame.payload, at)
        assert tag == Tag.ARG
        argv.append(frame.payload[at + 8 : at + 8 + length])
        at += 8 + length
    agent.started(frame.stream)
    for channel, text in ((1, said), (2, complaint)):
        if text:
            agent.send(Kind.DATA, frame.stream, text, channel)
    agent.end(frame.stream, EndKind.EXITED, status)
    return argv


async def test_memory_is_asked_for(connected: Pair) -> None:
    guest, agent = connected
    asked = asyncio.ensure_future(guest.reclaim(4096))
    assert await answer(agent, b"reclaimed 8192\n") == [b"reclaim", b"4096"]
    assert await asked == 8192
    for text, known in ((b"tuned 1\n", True), (b"tuned 0\n", False)):
        tuned = asyncio.ensure_future(guest.tune({"min_age": 5, "enabled": 1}))
        assert await answer(agent, text) == [b"tune", b"min_age=5", b"enabled=1"]
        assert await tuned is known
    slimmed = asyncio.ensure_future(guest.slim(DEADLINE))
    assert await answer(agent, b"trimmed 5\nfreed 7\n") == [b"slim"]
    assert await slimmed == {"trimmed": 5, "freed": 7}
    assert guest.under_way == 0


async def test_an_agent_of_an_older_snapshot_gives_nothing(connected: Pair) -> None:
    guest, agent = connected
    for call, nothing in (
        (guest.reclaim(4096), 0),
        (guest.tune({"enabled": 0}), False),
        (guest.slim(DEADLINE), {"trimmed": 0, "freed": 0}),
    ):
        asked = asyncio.ensure_future(call)  # type: ignore[arg-type]
        agent.end(await agent.expect_open(Op.EXEC), EndKind.FAILED, errno.EPROTO, b"no such builtin")
        assert await asked == nothing


async def test_a_guest_that_cannot_give_memory_back(connected: Pair) -> None:
    guest, agent = connected
    asked = asyncio.ensure_future(guest.reclaim(4096))
    await answer(agent, b"", 1, b"2 No such file or directory: fs/cgroup/memory.reclaim\n")
    with pytest.raises(GuestError, match="`reclaim` failed: 2 No such file"):
        await asked
    asked = asyncio.ensure_future(guest.reclaim(4096))
    await answer(agent, b"reclaimed much\n")
    with pytest.raises(ProtocolError, match="not a number"):
        await asked


async def test_a_guest_that_does_not_finish(connected: Pair) -> None:
    guest, agent = connected
    asked = asyncio.ensure_future(guest.reclaim(4096, 0.05))
    agent.started(await agent.expect_open(Op.EXEC))
    with pytest.raises(OutcomeUnknownError, match="did not finish `reclaim`"):
        await asked
    await agent.expect(Kind.CLOSE)


async def test_streams_are_told_apart_and_ended_ones_forgotten(connected: Pair) -> None:
    guest, agent = connected
    streams = [guest.execute(TRUE) for _ in range(16)]
    numbers = [await agent.expect_open(Op.EXEC) for _ in streams]
    assert len(set(numbers)) == 16
    for number in reversed(numbers):
        agent.send(Kind.DATA, number, str(number).encode(), 1)
        agent.end(number)
    for stream, number in zip(streams, numbers, strict=True):
        assert await collect(stream) == [Output(channel=Channel.STDOUT, data=str(number).encode()), Exit(ending=Ending.EXITED, code=0)]
    assert guest._streams == {}


async def test_an_iteration_that_ends_early_closes_the_stream(connected: Pair) -> None:
    guest, agent = connected
    stream = guest.execute(TRUE)
    number = await agent.expect_open(Op.EXEC)
    agent.started(number)
    async with contextlib.aclosing(stream.events()) as events:
        assert isinstance(await anext(events), Started)
    assert (await agent.expect(Kind.CLOSE)).stream == number
    agent.send(Kind.DATA, number, b"still under way", 1)  # ignored
    agent.end(number)
    await answered(guest, agent)


# --- credits ---


async def test_the_host_sends_no_more_stdin_than_it_was_allowed(connected: Pair) -> None:
    guest, agent = connected
    stream = guest.execute(CAT)
    number = await agent.expect_open(Op.EXEC)
    writing = asyncio.ensure_future(stream.write(b"x" * (WINDOW + 10)))
    got = 0
    while got < WINDOW:
        got += len((await agent.expect(Kind.DATA)).payload)
    assert got == WINDOW
    await answered(guest, agent)  # nothing more has come, though the line is open
    assert not writing.done()
    agent.send(Kind.CREDIT, number, struct.pack("<I", 4), 0)
    assert (await agent.expect(Kind.DATA)).payload == b"xxxx"
    agent.send(Kind.CREDIT, number, struct.pack("<I", 100), 0)
    assert (await agent.expect(Kind.DATA)).payload == b"xxxxxx"
    await writing
    stream.eof()
    assert (await agent.expect(Kind.EOF)).stream == number


async def test_credit_goes_back_only_as_output_is_taken(connected: Pair) -> None:
    guest, agent = connected
    stream = guest.execute(TRUE)
    number = await agent.expect_open(Op.EXEC)
    for _ in range(4):
        agent.send(Kind.DATA, number, b"x" * (WINDOW // 4), 1)
    await answered(guest, agent)  # all of it has arrived; nobody has read it, so no credit came before the ping
    assert isinstance(await stream.next(), Output)
    frame = await agent.expect(Kind.CREDIT)
    assert (frame.stream, frame.flags, struct.unpack("<I", frame.payload)) == (number, 1, (WINDOW // 4,))
    agent.send(Kind.DATA, number, b"y" * (WINDOW // 4), 1)
    agent.end(number)
    events = await collect(stream)
    assert sum(len(event.data) for event in events if isinstance(event, Output)) == WINDOW
    assert events[-1] == Exit(ending=Ending.EXITED, code=0)


async def test_a_process_that_ends_before_its_input_does(connected: Pair) -> None:
    guest, agent = connected
    stream = guest.execute(CAT)
    number = await agent.expect_open(Op.EXEC)
    writing = asyncio.ensure_future(stream.write(b"x" * WINDOW * 3))
    agent.end(number)
    with pytest.raises(GuestError, match="ended before it took all its input"):
        await writing
    assert await collect(stream) == [Exit(ending=Ending.EXITED, code=0)]


# --- an agent that breaks the rules: the connection ends, every caller learns that the outcome is unknown, nothing is held ---

Misbehave = Callable[[FakeAgent, int], None]


def more_than_allowed(agent: FakeAgent, number: int) -> None:
    for _ in range(3):
        agent.send(Kind.DATA, number, b"x" * wire.MAX_PAYLOAD, 1)


def end_without_a_kind(agent: FakeAgent, number: int) -> None:
    agent.send(Kind.END, number, struct.pack("<B3xi", 77, 0))


def starts_twice(agent: FakeAgent, number: int) -> None:
    agent.started(number)
    agent.started(number)


def eof_and(agent: FakeAgent, number: int, kind: Kind, payload: bytes = b"") -> None:
    agent.send(Kind.EOF, number, flags=1)
    agent.send(kind, number, payload, 1)


def sync_again(agent: FakeAgent, number: int) -> None:
    agent.answer_sync(b"n" * 16)


HOSTILE: dict[str, Misbehave] = {
    "exceeds its credit": more_than_allowed,
    "sends data on stdin": lambda agent, number: agent.send(Kind.DATA, number, b"x", 0),
    "sends data on a channel that is none": lambda agent, number: agent.send(Kind.DATA, number, b"x", 3),
    "sends empty data": lambda agent, number: agent.send(Kind.DATA, number, b"", 1),
    "starts twice": starts_twice,
    "starts with half a pair": lambda agent, number: agent.send(Kind.STARTED, number, b"1234"),
    "ends a channel twice": lambda agent, number: eof_and(agent, number, Kind.EOF),
    "ends stdin": lambda agent, number: agent.send(Kind.EOF, number, flags=0),
    "ends in an unknown way": end_without_a_kind,
    "ends with too long a message": lambda agent, number: agent.end(number, message=b"m" * 5000),
    "ends with half an answer": lambda agent, number: agent.send(Kind.END, number, b"\0"),
    "gives credit of a wrong length": lambda agent, number: agent.send(Kind.CREDIT, number, b"12"),
    "opens a stream": lambda agent, number: agent.send(Kind.OPEN, number, b"1234"),
    "closes a stream": lambda agent, number: agent.send(Kind.CLOSE, number),
    "begins anew": sync_again,
    "sends an unknown type": lambda agent, number: agent.send_raw(wire.HEADER.pack(9, 0, 0, number, 0)),
    "sends too long a frame": lambda agent, number: agent.send_raw(wire.HEADER.pack(Kind.DATA, 1, 0, number, 1 << 31)),
    "sends junk": lambda agent, number: agent.send_raw(b"\xde\xad\xbe\xef" * 64),
    "sends data after the end of the channel": lambda agent, number: eof_and(agent, number, Kind.DATA, b"x"),
}  # fmt: skip


@pytest.mark.parametrize("how", HOSTILE)
async def test_an_agent_that_breaks_the_rules(connected: Pair, how: str) -> None:
    guest, agent = connected
    stream, other = guest.execute(TRUE), guest.execute(TRUE)
    number = await agent.expect_open(Op.EXEC)
    await agent.expect_open(Op.EXEC)
    HOSTILE[how](agent, number)
    with pytest.raises(OutcomeUnknownError, match="outcome of `true` is unknown"):
        await collect(other)
    with pytest.raises((OutcomeUnknownError, ProtocolError)):
        await collect(stream)
    assert await asyncio.wait_for(guest.closed, DEADLINE)
    with pytest.raises(MachineFailedError, match="agent is gone"):
        guest.execute(TRUE)
    assert guest._streams == {}


async def test_frames_after_the_end_or_of_unknown_streams_are_dropped(connected: Pair) -> None:
    guest, agent = connected
    stream = guest.execute(TRUE)
    number = await agent.expect_open(Op.EXEC)
    agent.end(number)
    agent.end(number)
    agent.send(Kind.DATA, number, b"x" * 100, 1)
    agent.send(Kind.DATA, 4_000_000_000, b"x" * wire.MAX_PAYLOAD, 1)
    agent.send(Kind.CREDIT, 4_000_000_000, struct.pack("<I", 1))
    assert await collect(stream) == [Exit(ending=Ending.EXITED, code=0)]
    await answered(guest, agent)


async def test_credit_without_end_does_not_grow_without_end(connected: Pair) -> None:
    guest, agent = connected
    stream = guest.execute(CAT)
    number = await agent.expect_open(Op.EXEC)
    for _ in range(8):
        agent.send(Kind.CREDIT, number, b"\xff\xff\xff\xff")
    await answered(guest, agent)
    assert stream._credit <= 1 << 30


async def test_an_answer_that_does_not_end(connected: Pair) -> None:
    guest, agent = connected
    asking = asyncio.ensure_future(guest.metrics())
    number = await agent.expect_open(Op.METRICS)

    async def flood() -> None:
        while (await agent.read()).kind is Kind.CREDIT:
            agent.send(Kind.DATA, number, b"a 1\n" * (WINDOW // 16), 1)

    for _ in range(3):
        agent.send(Kind.DATA, number, b"a 1\n" * (WINDOW // 16), 1)
    flooding = asyncio.ensure_future(flood())
    with pytest.raises(ProtocolError, match="too long"):
        await asyncio.wait_for(asking, DEADLINE)
    await flooding  # the host closed the stream


# --- silence, and a line that breaks ---


async def test_silence_ends_in_outcome_unknown(tmp_path: Path) -> None:
    async with pair(tmp_path, silence=0.4) as (guest, agent):
        stream = guest.execute(TRUE)
        await agent.expect_open(Op.EXEC)
        with pytest.raises(OutcomeUnknownError, match="did not answer for 0 s") as caught:
            await collect(stream)
        assert "may have run" in caught.value.hint


async def test_a_guest_that_answers_pings_is_not_silent(tmp_path: Path) -> None:
    async with pair(tmp_path, silence=0.4) as (guest, agent):
        stream = guest.execute(TRUE)
        number = await agent.expect_open(Op.EXEC)
        for _ in range(8):  # more than twice the deadline
            agent.end(await agent.expect_open(Op.PING))
        agent.end(number)
        assert await collect(stream) == [Exit(ending=Ending.EXITED, code=0)]


async def test_a_guest_is_not_silent_because_we_stood_still(tmp_path: Path) -> None:
    async with pair(tmp_path, silence=0.4) as (guest, agent):
        stream = guest.execute(TRUE)
        number = await agent.expect_open(Op.EXEC)
        time.sleep(1.0)  # noqa: ASYNC251  (as a daemon on a host without memory)
        agent.end(await agent.expect_open(Op.PING))
        agent.end(number)
        assert await collect(stream) == [Exit(ending=Ending.EXITED, code=0)]


async def test_nothing_is_asked_while_nothing_is_under_way(tmp_path: Path) -> None:
    async with pair(tmp_path, silence=0.2) as (guest, agent):
        stream = guest.execute(TRUE)
        agent.end(await agent.expect_open(Op.EXEC))
        await collect(stream)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(guest.closed), 0.8)
        await answered(guest, agent)


async def test_a_broken_line_tells_everybody(connected: Pair) -> None:
    guest, agent = connected
    stream = guest.execute(CAT)
    number = await agent.expect_open(Op.EXEC)
    agent.started(number)
    writing = asyncio.ensure_future(stream.write(b"x" * WINDOW * 2))
    agent.close()
    with pytest.raises(OutcomeUnknownError):
        await writing
    assert isinstance(await stream.next(), Started)  # what has arrived comes first
    with pytest.raises(OutcomeUnknownError, match="the line to it broke"):
        await stream.next()


@pytest.mark.parametrize(
    "call", [lambda g: g.processes(), lambda g: g.signal(1, 15), lambda g: g.metrics(), lambda g: g.dial(80), lambda g: g.ping()]
)
async def test_calls_on_a_dead_line_fail_at_once(connected: Pair, call: Callable[[Guest], Awaitable[object]]) -> None:
    guest, agent = connected
    agent.close()
    await asyncio.wait_for(guest.closed, DEADLINE)
    with pytest.raises(MachineFailedError, match="gone"):
        await call(guest)


async def test_a_call_without_an_answer_ends_at_its_deadline(connected: Pair) -> None:
    guest, agent = connected
    with pytest.raises(OutcomeUnknownError, match="did not answer a ping within"):
        await guest.ping(deadline=0.2)
    number = await agent.expect_open(Op.PING)
    assert (await agent.expect(Kind.CLOSE)).stream == number


async def test_dial(connected: Pair) -> None:
    guest, agent = connected
    dialling = asyncio.ensure_future(guest.dial(80))
    number = await agent.expect_open(Op.DIAL)
    agent.started(number, 0, 0)
    stream = await dialling
    await stream.write(b"GET")
    assert (await agent.expect(Kind.DATA)).payload == b"GET"
    stream.close()
    assert (await agent.expect(Kind.CLOSE)).stream == number
    dialling = asyncio.ensure_future(guest.dial(81))
    agent.end(await agent.expect_open(Op.DIAL), EndKind.FAILED, 111, b"connection refused")
    with pytest.raises(GuestError, match="refused"):
        await dialling


async def test_another_version_of_the_agent_is_refused_with_a_way_out(tmp_path: Path) -> None:
    async with line(tmp_path) as (path, arriving):
        connecting = asyncio.ensure_future(Guest.connect(path, deadline=DEADLINE, resync=False))
        agent = await arriving
        hello = await agent.expect(Kind.SYNC)
        agent.send(Kind.SYNC, 0, hello.payload + struct.pack("<I", 1) + b"B" * 16)
        with pytest.raises(MachineFailedError, match="speaks protocol 1, not 2") as caught:
            await connecting
        assert "Stop and start" in caught.value.hint
