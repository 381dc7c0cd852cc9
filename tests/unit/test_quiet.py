"""The host's half when a machine is saved, restored, or stands still: identity, quiet, deadlines that wait, hooks. The agent is played by the test."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from ramet import agentwire as wire
from ramet.agentwire import WINDOW, EndKind, Kind, Op, ProtocolError, Tag
from ramet.errors import GuestError, MachineFailedError, OutcomeUnknownError, TimeoutExpiredError
from ramet.guest import CLOCK_ERROR, Guest, Identity
from ramet.model import Command, Ending, Exit, Output
from tests.unit.fakeagent import DEADLINE, FakeAgent, answered, collect, line, pair

TRUE = Command(argv=("true",))
CAT = Command(argv=("cat",), stdin=True)


@pytest_asyncio.fixture
async def connected(tmp_path: Path) -> AsyncIterator[tuple[Guest, FakeAgent]]:
    async with pair(tmp_path) as both:
        yield both


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy host an answer may take long: no clock is corrected but where a test is about that."""
    monkeypatch.setattr("ramet.guest.CLOCK_ERROR", 60.0)


Pair = tuple[Guest, FakeAgent]


# --- identity ---

WHO = Identity(hostname="child", machine_id="0" * 31 + "1", generation="01234567-89ab-4def-8123-456789abcdef")


def params_of(payload: bytes) -> dict[Tag, bytes]:
    """The parameters of an OPEN that is one frame."""
    found, at = {}, 4
    while at < len(payload):
        tag, zero, length = struct.unpack_from("<HHI", payload, at)
        assert zero == 0
        found[Tag(tag)] = payload[at + 8 : at + 8 + length]
        at += 8 + length
    return found


def clock_of(params: dict[Tag, bytes]) -> float:
    return float(struct.unpack("<Q", params[Tag.TIME])[0]) / 1e9


async def test_the_identity_follows_the_sync_before_any_answer(tmp_path: Path) -> None:
    async with line(tmp_path) as (path, arriving):
        guest = await Guest.reach(path)
        agent = await arriving
        guest.greet(resync=False, identity=WHO)
        hello = await agent.expect(Kind.SYNC)
        frame = await agent.expect(Kind.OPEN)
        params = params_of(frame.payload)
        assert (params[Tag.HOSTNAME], params[Tag.MACHINE_ID]) == (b"child", b"0" * 31 + b"1")
        assert (params[Tag.GENERATION], params[Tag.ENTROPY]) == (WHO.generation.encode(), WHO.entropy)
        assert abs(clock_of(params) - time.time()) < DEADLINE
        agent.answer_sync(hello.payload)
        agent.end(frame.stream, code=1)
        await guest.answered(DEADLINE)
        assert guest.hooks_due
        await answered(guest, agent)
        guest.abort("done")


def test_entropy_is_never_the_same_and_never_shown() -> None:
    assert len(WHO.entropy) >= 32
    assert Identity().entropy != Identity().entropy
    assert "entropy" not in repr(WHO)
    (only,) = Identity.clock().params()
    assert only[:2] == struct.pack("<H", Tag.TIME)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda agent, number: agent.end(number, EndKind.FAILED, 1, b"cannot set the clock: no"), "new identity: cannot set the clock: no"),
        (lambda agent, number: agent.close(), "identity"),
        (lambda agent, number: agent.send(Kind.END, number, b"?"), "identity"),
        (lambda agent, number: None, "did not answer within"),
    ],
)
async def test_a_guest_without_its_identity_is_never_handed_out(tmp_path: Path, answer: Callable[[FakeAgent, int], None], why: str) -> None:
    deadline = 2.0 if "within" in why else DEADLINE
    async with line(tmp_path) as (path, arriving):
        connecting = asyncio.ensure_future(Guest.connect(path, deadline=deadline, resync=False, identity=WHO))
        agent = await arriving
        agent.answer_sync((await agent.expect(Kind.SYNC)).payload)
        answer(agent, await agent.expect_open(Op.IDENTIFY))
        with pytest.raises(MachineFailedError, match=why):
            await connecting


async def test_the_time_is_told_again_when_the_guest_was_slow_to_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CLOCK_ERROR < 1
    monkeypatch.setattr("ramet.guest.CLOCK_ERROR", 0.1)
    async with line(tmp_path) as (path, arriving):
        connecting = asyncio.ensure_future(Guest.connect(path, deadline=DEADLINE, resync=False, identity=WHO))
        agent = await arriving
        hello = await agent.expect(Kind.SYNC)
        first = await agent.expect(Kind.OPEN)
        await asyncio.sleep(0.15)  # while the machine is loaded
        agent.answer_sync(hello.payload)
        agent.end(first.stream, code=1)
        frame = await agent.expect(Kind.OPEN)
        params = params_of(frame.payload)
        assert params.keys() == {Tag.TIME}
        assert clock_of(params) - clock_of(params_of(first.payload)) >= 0.14
        agent.end(frame.stream)

        async def rest() -> None:
            while True:  # on a busy host even this answer may have come late
                agent.end(await agent.expect_open(Op.IDENTIFY))

        answering = asyncio.ensure_future(rest())
        guest = await connecting
        answering.cancel()
        assert guest.hooks_due  # as the whole identity's answer said
        guest.abort("done")


async def test_identify_on_a_living_connection(connected: Pair) -> None:
    guest, agent = connected
    for code in (0, 1):
        telling = asyncio.ensure_future(guest.identify(WHO))
        agent.end(await agent.expect_open(Op.IDENTIFY), code=code)
        assert await telling == guest.hooks_due == bool(code)


# --- standing still ---


async def quiesced(guest: Guest, agent: FakeAgent) -> None:
    asking = asyncio.ensure_future(guest.quiesce(DEADLINE))
    agent.end(await agent.expect_open(Op.QUIESCE))
    await asking


async def nothing_comes(agent: FakeAgent) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await agent.read()


async def test_nothing_is_sent_while_quiet_and_everything_afterwards(connected: Pair) -> None:
    guest, agent = connected
    cat = guest.execute(CAT)
    number = await agent.expect_open(Op.EXEC)
    for _ in range(2):
        agent.send(Kind.DATA, number, b"x" * (WINDOW // 4), 1)
    await answered(guest, agent)
    await quiesced(guest, agent)
    assert isinstance(await cat.next(), Output)  # whose credit is to go back
    writing = asyncio.ensure_future(cat.write(b"input"))
    other = guest.execute(TRUE)
    pinging = asyncio.ensure_future(guest.ping())
    cat.eof()
    await nothing_comes(agent)
    going_on = asyncio.ensure_future(guest.resume())
    resume = await agent.expect_open(Op.RESUME)  # before everything else
    frames = [await agent.read() for _ in range(5)]
    agent.end(resume)
    await going_on
    kinds = [frame.kind for frame in frames]
    assert sorted(kinds) == sorted([Kind.CREDIT, Kind.OPEN, Kind.EOF, Kind.DATA, Kind.OPEN])
    ping = next(frame for frame in frames if frame.kind is Kind.OPEN and frame.stream != other.number)
    agent.end(ping.stream)
    await asyncio.gather(writing, pinging)


async def test_an_agent_that_does_not_become_quiet_is_told_to_go_on(connected: Pair) -> None:
    guest, agent = connected
    with pytest.raises(OutcomeUnknownError, match="did not become quiet"):
        await guest.quiesce(0.1)
    quiet = await agent.expect_open(Op.QUIESCE)
    resume = await agent.expect_open(Op.RESUME)
    agent.end(quiet)
    agent.end(resume)
    await answered(guest, agent)


async def test_a_quiesce_that_is_cancelled_or_refused_holds_nothing(connected: Pair) -> None:
    guest, agent = connected
    asking = asyncio.ensure_future(guest.quiesce(DEADLINE))
    await agent.expect_open(Op.QUIESCE)
    asking.cancel()
    await agent.expect_open(Op.RESUME)
    with pytest.raises(asyncio.CancelledError):
        await asking
    asking = asyncio.ensure_future(guest.quiesce(DEADLINE))
    agent.end(await agent.expect_open(Op.QUIESCE), EndKind.FAILED, 71, b"an unknown op")
    await agent.expect_open(Op.RESUME)
    with pytest.raises(GuestError, match="unknown op"):
        await asking
    await answered(guest, agent)


async def test_a_line_that_breaks_while_quiet(connected: Pair) -> None:
    guest, agent = connected
    stream = guest.execute(CAT)
    await agent.expect_open(Op.EXEC)
    await quiesced(guest, agent)
    waiting = [asyncio.ensure_future(stream.write(b"x")), asyncio.ensure_future(guest.ping()), asyncio.ensure_future(collect(stream))]
    await asyncio.sleep(0)
    agent.close()
    results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), DEADLINE)
    assert all(isinstance(result, MachineFailedError | OutcomeUnknownError) for result in results[1:])
    with pytest.raises(MachineFailedError, match="gone"):
        await guest.resume()


async def test_a_machine_that_stands_still_is_not_given_up(tmp_path: Path) -> None:
    async with pair(tmp_path, silence=1.0) as (guest, agent):
        stream = guest.execute(TRUE)
        number = await agent.expect_open(Op.EXEC)
        pinging = asyncio.ensure_future(guest.ping(deadline=1.2))
        ping = await agent.expect_open(Op.PING)
        guest.hold()
        guest.hold()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.6):
                await asyncio.shield(guest.closed)
        guest.release()
        await nothing_comes(agent)
        guest.release()
        agent.end(ping)
        agent.end(number)
        await pinging
        assert await collect(stream) == [Exit(ending=Ending.EXITED, code=0)]


async def test_the_watch_for_silence_goes_on_after_a_hold(tmp_path: Path) -> None:
    async with pair(tmp_path, silence=0.4) as (guest, agent):
        stream = guest.execute(TRUE)
        await agent.expect_open(Op.EXEC)
        guest.hold()
        await asyncio.sleep(0.6)
        guest.release()
        with pytest.raises(OutcomeUnknownError, match="did not answer"):
            await collect(stream)


# --- hooks ---


async def hooks(guest: Guest, agent: FakeAgent) -> tuple[asyncio.Future[None], int]:
    running = asyncio.ensure_future(guest.run_hooks(WHO.generation, "child", 7))
    frame = await agent.expect(Kind.OPEN)
    assert frame.payload[:4] == struct.pack("<HH", Op.EXEC, wire.OpenFlag.BUILTIN)
    assert frame.payload.count(struct.pack("<HHI", Tag.ARG, 0, 5) + b"hooks") == 1
    assert params_of(frame.payload)[Tag.TIMEOUT] == struct.pack("<Q", 7000)
    agent.started(frame.stream)
    return running, frame.stream


async def test_hooks_that_succeed(connected: Pair) -> None:
    running, number = await hooks(*connected)
    connected[1].send(Kind.DATA, number, b"3 ended with status 3: /etc/ramet/fork.d/x\n", 2)  # said by a hook
    connected[1].end(number)
    await running


async def test_a_hook_that_fails_is_named_with_its_last_line(connected: Pair) -> None:
    running, number = await hooks(*connected)
    connected[1].send(Kind.DATA, number, b"on stdout\n", 1)
    connected[1].send(Kind.DATA, number, b"x" * 20_000 + b"\nthe \x1b[31mreason\n\n", 2)
    connected[1].send(Kind.DATA, number, b"3 ended with status 3: /etc/ramet/fork.d/10-keys\n", 2)
    connected[1].end(number, code=1)
    with pytest.raises(GuestError, match=r"^/etc/ramet/fork.d/10-keys failed, ended with status 3: the \ufffd\[31mreason$") as caught:
        await running
    assert caught.value.details["hook"] == "10-keys"
    assert len(caught.value.details["log"]) < 5000


@pytest.mark.parametrize(
    ("said", "kind", "code", "error", "why"),
    [
        (
            b"half\n124 did not end in time: /etc/ramet/fork.d/b\n",
            EndKind.TIMEOUT,
            1,
            TimeoutExpiredError,
            "^/etc/ramet/fork.d/b did not .* 7 s: half$",
        ),
        (b"working\n", EndKind.TIMEOUT, 15, TimeoutExpiredError, "one of the programs in .* did not end within 7 s: working"),
        (b"", EndKind.TIMEOUT, 9, TimeoutExpiredError, "no output"),
        (b"", EndKind.SIGNALED, 9, GuestError, "killed by signal 9"),
        (b"who knows\n", EndKind.EXITED, 1, ProtocolError, "which hook"),
    ],
)
async def test_hooks_that_end_otherwise(connected: Pair, said: bytes, kind: EndKind, code: int, error: type[GuestError], why: str) -> None:
    running, number = await hooks(*connected)
    if said:
        connected[1].send(Kind.DATA, number, said, 2)
    connected[1].end(number, kind, code)
    with pytest.raises(error, match=why):
        await running
