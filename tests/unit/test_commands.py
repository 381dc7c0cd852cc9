"""What the image and the spec add to a command, a command run to its end, and ports on the host's loopback."""

from __future__ import annotations

import asyncio
import socket
import struct
from pathlib import Path

import pytest

from ramet import commands
from ramet.agentwire import WINDOW, EndKind, Kind, Op
from ramet.commands import Forward
from ramet.errors import ExistsError
from ramet.model import Command, ImageConfig, Port, Spec
from tests.unit.fakeagent import DEADLINE, pair

IMAGE = ImageConfig(env={"PATH": "/bin", "A": "image", "B": "image", "C": "image"}, user="app", workdir="/app")
SPEC = Spec(name="a", env={"B": "spec", "C": "spec"}, user="root", workdir="/srv")


@pytest.mark.parametrize(
    ("spec", "command", "user", "cwd", "env"),
    [
        (Spec(name="a"), Command(argv=("x",)), "app", "/app", {"PATH": "/bin", "A": "image", "B": "image", "C": "image"}),
        (SPEC, Command(argv=("x",)), "root", "/srv", {"PATH": "/bin", "A": "image", "B": "spec", "C": "spec"}),
        (
            SPEC,
            Command(argv=("x",), user="9", cwd="/", env={"C": "own"}),
            "9",
            "/",
            {"PATH": "/bin", "A": "image", "B": "spec", "C": "own"},
        ),
    ],
)
def test_the_nearest_wins(spec: Spec, command: Command, user: str, cwd: str, env: dict[str, str]) -> None:
    made = commands.effective(spec, IMAGE, command)
    assert (made.user, made.cwd, made.env, made.argv) == (user, cwd, env, ("x",))


async def test_run_keeps_both_outputs_and_feeds_stdin(tmp_path: Path) -> None:
    async with pair(tmp_path) as (guest, agent):
        running = asyncio.ensure_future(commands.run(guest, Command(argv=("cat",)), b"input"))
        number = await agent.expect_open(Op.EXEC)
        assert (await agent.expect(Kind.DATA)).payload == b"input"
        await agent.expect(Kind.EOF)
        agent.started(number)
        agent.send(Kind.DATA, number, b"o1", 1)
        agent.send(Kind.DATA, number, b"e", 2)
        agent.send(Kind.DATA, number, b"o2", 1)
        agent.end(number, EndKind.EXITED, 3)
        result = await running
        assert (result.stdout, result.stderr, result.code, result.status, result.truncated) == (b"o1o2", b"e", 3, 3, 0)
        assert result.duration > 0


async def test_output_beyond_the_limit_is_counted_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "OUTPUT_LIMIT", 100)
    async with pair(tmp_path) as (guest, agent):
        running = asyncio.ensure_future(commands.run(guest, Command(argv=("yes",)), b""))
        number = await agent.expect_open(Op.EXEC)
        for _ in range(3):
            agent.send(Kind.DATA, number, b"x" * (WINDOW // 4), 1)
        agent.send(Kind.DATA, number, b"e" * 100, 2)
        agent.end(number)
        result = await running
        assert (len(result.stdout), len(result.stderr), result.truncated) == (100, 100, 3 * (WINDOW // 4) - 100)


async def test_a_caller_that_goes_away_ends_the_command(tmp_path: Path) -> None:
    async with pair(tmp_path) as (guest, agent):
        running = asyncio.ensure_future(commands.run(guest, Command(argv=("sleep",)), b"x" * WINDOW * 2))
        number = await agent.expect_open(Op.EXEC)
        running.cancel()
        await asyncio.wait({running})
        while (frame := await agent.read()).kind is not Kind.CLOSE:
            assert frame.kind is Kind.DATA
        assert frame.stream == number
        assert running.cancelled()


async def test_a_forward_carries_both_ways_and_half_closes(tmp_path: Path) -> None:
    async with pair(tmp_path) as (guest, agent):
        forward = await Forward.open(Port(guest=80), lambda: guest)
        reader, writer = await asyncio.open_connection("127.0.0.1", forward.port.host)
        writer.write(b"question")
        writer.write_eof()
        number = await agent.expect_open(Op.DIAL)
        agent.started(number, 0, 0)
        assert (await agent.expect(Kind.DATA)).payload == b"question"
        await agent.expect(Kind.EOF)
        agent.send(Kind.DATA, number, b"answer", 1)
        agent.send(Kind.EOF, number, flags=1)
        assert await asyncio.wait_for(reader.read(), DEADLINE) == b"answer"
        agent.end(number)
        writer.close()
        await writer.wait_closed()
        await forward.close()


async def test_a_forward_that_is_closed_ends_its_connections(tmp_path: Path) -> None:
    async with pair(tmp_path) as (guest, agent):
        forward = await Forward.open(Port(guest=80), lambda: guest)
        reader, writer = await asyncio.open_connection("127.0.0.1", forward.port.host)
        number = await agent.expect_open(Op.DIAL)
        agent.started(number, 0, 0)
        await forward.close()
        assert await asyncio.wait_for(reader.read(), DEADLINE) == b""
        assert (await agent.expect(Kind.CLOSE)).stream == number
        writer.close()
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", forward.port.host)


async def test_a_client_that_breaks_off_ends_the_connection_inside(tmp_path: Path) -> None:
    async with pair(tmp_path) as (guest, agent):
        forward = await Forward.open(Port(guest=80), lambda: guest)
        client = socket.create_connection(("127.0.0.1", forward.port.host))
        number = await agent.expect_open(Op.DIAL)
        agent.started(number, 0, 0)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end
        client.close()
        assert (await agent.expect(Kind.CLOSE)).stream == number
        await forward.close()


async def test_a_refused_dial_closes_the_connection(tmp_path: Path) -> None:
    async with pair(tmp_path) as (guest, agent):
        forward = await Forward.open(Port(guest=81), lambda: guest)
        reader, writer = await asyncio.open_connection("127.0.0.1", forward.port.host)
        agent.end(await agent.expect_open(Op.DIAL), EndKind.FAILED, 111, b"refused")
        assert await asyncio.wait_for(reader.read(), DEADLINE) == b""
        writer.close()
        await forward.close()


async def test_a_host_port_that_is_taken(tmp_path: Path) -> None:
    async with pair(tmp_path) as (guest, _):
        forward = await Forward.open(Port(guest=80), lambda: guest)
        with pytest.raises(ExistsError, match=f"host port {forward.port.host} is in use") as caught:
            await Forward.open(Port(guest=81, host=forward.port.host), lambda: guest)
        assert "`OTHER:81`" in caught.value.hint
        await forward.close()
