"""Files in and out of a machine, each in turn with `dd` over the same port."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from ramet.bench.figures import Figure
from ramet.engine import Engine
from ramet.errors import GuestError
from ramet.model import Command, Exit, Output, Started

ROUNDS = 3
PATH = "/tmp/ramet-bench"
_PIECE = 1 << 20


async def _zeroes(mebibytes: int) -> AsyncIterator[bytes]:
    for _ in range(mebibytes):
        yield bytes(_PIECE)


async def _drained(engine: Engine, name: str, argv: tuple[str, ...], wanted: int) -> None:
    """Run a command and count what it writes."""
    got = 0
    async with contextlib.aclosing(engine.execute(name, Command(argv=argv))) as events:
        async for event in events:
            if isinstance(event, Output) and event.channel == "stdout":
                got += len(event.data)
    if got != wanted:
        raise GuestError(f"{argv[0]} wrote {got} bytes, not {wanted}")


async def _fed(engine: Engine, name: str, argv: tuple[str, ...], mebibytes: int) -> None:
    """Run a command and write to its stdin until it has all."""
    async with contextlib.aclosing(engine.execute(name, Command(argv=argv, stdin=True))) as events:
        async for event in events:
            if isinstance(event, Started):
                async for piece in _zeroes(mebibytes):
                    await engine.send_input(name, event.process, piece)
                await engine.send_input(name, event.process, b"", eof=True)
            elif isinstance(event, Exit) and event.status:
                raise GuestError(f"{argv[0]} ended with status {event.status}")


async def rates(engine: Engine, name: str, mebibytes: int) -> list[Figure]:
    """MiB/s of each."""
    size = mebibytes * _PIECE

    async def read() -> None:
        got = 0
        async for piece in engine.read_file(name, PATH, user="root"):
            got += len(piece)
        if got != size:
            raise GuestError(f"the file came back with {got} bytes, not {size}")

    works: dict[str, Callable[[], Awaitable[None]]] = {
        "copy of a file into the machine": lambda: engine.write_file(name, PATH, _zeroes(mebibytes), user="root"),
        "beside it, into `dd of=/dev/null` over the bare port": lambda: _fed(engine, name, ("dd", "of=/dev/null", "bs=1M"), mebibytes),
        "copy of a file out of the machine": read,
        "beside it, out of `dd if=/dev/zero` over the bare port": lambda: _drained(
            engine, name, ("dd", "if=/dev/zero", "bs=1M", f"count={mebibytes}"), size
        ),
    }
    found: dict[str, list[float]] = {what: [] for what in works}
    for number in range(ROUNDS + 1):
        for what, work in works.items():
            began = time.perf_counter()
            await work()
            if number:  # the first warms up
                found[what].append(mebibytes / (time.perf_counter() - began))
    await engine.remove_file(name, PATH, user="root")
    return [Figure(figure=what, value=statistics.median(samples), unit="MiB/s") for what, samples in found.items()]
