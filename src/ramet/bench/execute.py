"""Commands and file copies in a running machine, beside what the bare port does in the same run."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from ramet import service
from ramet.bench import bed, copies
from ramet.bench.bed import Bed
from ramet.bench.figures import Figure, Report, distribution, limit
from ramet.client import Client
from ramet.errors import GuestError
from ramet.model import Command, Output, Started
from ramet.paths import StateDir
from ramet.verbs import Verbs

NAME = "bench-exec"
RATIO, MILLISECONDS, AT_ONCE = 4.0, 5.0, 16
COUNT, ROW, MEBIBYTES, WARM_UP = 300, 1000, 32, 30
CORES = 2  # the host that the goal in milliseconds is for: two cores, no KVM, idle
_TRUE = Command(argv=("true",))


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=COUNT, help="round trips of each kind (default: %(default)s)")
    parser.add_argument("--row", type=int, default=ROW, help="commands in a row, to see what they leak (default: %(default)s)")
    parser.add_argument("--mebibytes", type=int, default=MEBIBYTES, help="size of the copied file (default: %(default)s)")


async def timed(work: Awaitable[object]) -> float:
    """Milliseconds that something takes."""
    began = time.perf_counter()
    await work
    return (time.perf_counter() - began) * 1000


async def _true(verbs: Verbs) -> None:
    result = await verbs.run(NAME, _TRUE)
    if result.status:
        raise GuestError(f"`true` ended with status {result.status}")


@contextlib.asynccontextmanager
async def bare_shell(verbs: Verbs) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """A shell that runs already and answers `echo`, its builtin: what the port costs with a program behind it, and no new process."""
    async with contextlib.aclosing(verbs.execute(NAME, Command(argv=("sh",), stdin=True))) as events:  # type: ignore[type-var]
        started = await anext(events)
        assert isinstance(started, Started)

        async def echo() -> None:
            await verbs.send_input(NAME, started.process, b"echo\n")
            answer = await anext(events)
            if not isinstance(answer, Output) or answer.data != b"\n":
                raise GuestError(f"the shell's echo answered {answer}")

        yield echo


async def round_trips(found: Bed, count: int, others: bed.Others) -> list[Figure]:
    """`true`, and in turn with it the bare echo of a shell that runs already, and a PING, which the agent answers from its loop."""
    async with bare_shell(found.engine) as echo:
        works: dict[str, Callable[[], Awaitable[None]]] = {
            "true": lambda: _true(found.engine),
            "echo": echo,
            "ping": lambda: found.engine.ping(NAME),
        }
        samples: dict[str, list[float]] = {name: [] for name in works}
        warm_up = min(WARM_UP, count)
        for number in range(warm_up + count):
            for name, work in works.items():
                took = await timed(work())
                if number >= warm_up:
                    samples[name].append(took)
    applies = others.share() <= bed.IDLE
    ratio = statistics.median(samples["true"]) / statistics.median(samples["echo"])
    return [
        limit("round trip of `true`, as a multiple of a bare echo over the port (p50 / p50)", ratio, "x", RATIO),
        distribution("round trip of `true`", samples["true"], "ms", MILLISECONDS, applies=applies),
        distribution("bare echo over the port (`echo` in a shell that runs already)", samples["echo"], "ms"),
        distribution("PING to the agent", samples["ping"], "ms"),
    ]


async def at_once(found: Bed) -> list[Figure]:
    """Many commands at the same time, each with an answer of its own."""

    async def one(number: int) -> bool:
        result = await found.engine.run(NAME, Command(argv=("sh", "-c", "cat; echo $1; exit $1", "sh", str(number))), b"%d " % number)
        return (result.status, result.stdout) == (number, b"%d %d\n" % (number, number))

    began = time.perf_counter()
    right = sum(await asyncio.gather(*(one(number) for number in range(AT_ONCE))))
    return [
        Figure(
            figure=f"of {AT_ONCE} commands at once, those that got their own answer",
            value=right,
            unit="",
            goal=f"= {AT_ONCE}",
            holds=right == AT_ONCE,
        ),
        Figure(figure="until the last of them had it", value=(time.perf_counter() - began) * 1000, unit="ms"),
    ]


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """What this process, QEMU and the guest hold. Memory in KiB: resident, of the guest: of its agent."""

    processes: int
    host_fds: int
    tasks: int
    host_memory: int
    qemu_fds: int
    guest_processes: int
    agent_fds: int
    agent_memory: int


_LOOK = "cd /proc; n=0; for p in [0-9]*; do [ -s $p/cmdline ] && n=$((n+1)); done; set -- 1/fd/*; echo $n $#; grep VmRSS 1/status"


def _resident(pid: int | str) -> int:
    return next(int(line.split()[1]) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:"))


def _descriptors(pid: int | str | None) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


async def holdings(found: Bed) -> Holdings:
    result = await found.engine.run(NAME, Command(argv=("sh", "-c", _LOOK), user="root"))
    words = result.stdout.split()
    pid = (await found.engine.get(NAME)).pid
    return Holdings(
        processes=sum(len(task.read_text().split()) for task in Path("/proc/self/task").glob("*/children")),
        host_fds=_descriptors("self"),
        tasks=len(asyncio.all_tasks()),
        host_memory=_resident("self"),
        qemu_fds=_descriptors(pid),
        guest_processes=int(words[0]),
        agent_fds=int(words[1]),
        agent_memory=int(words[3]),
    )


async def in_a_row(found: Bed, count: int) -> list[Figure]:
    """Many commands one after the other, and what there is more of afterwards."""
    for _ in range(min(WARM_UP, count)):
        await _true(found.engine)
    before = await holdings(found)
    began = time.perf_counter()
    for _ in range(count):
        await _true(found.engine)
    took = time.perf_counter() - began
    after = await holdings(found)

    def more(what: str, name: str, unit: str, at_most: float) -> Figure:
        return limit(f"after {count} in a row, more {what}", getattr(after, name) - getattr(before, name), unit, at_most)

    return [
        more("processes of this host", "processes", "", 0),
        more("descriptors of the daemon's process", "host_fds", "", 0),
        more("tasks of its event loop", "tasks", "", 0),
        more("memory of it", "host_memory", "KiB", 1024),  # its allocator keeps what it once had: steps, not a slope
        more("descriptors of QEMU", "qemu_fds", "", 0),
        more("processes in the guest", "guest_processes", "", 0),
        more("descriptors of its agent", "agent_fds", "", 0),
        more("memory of its agent", "agent_memory", "KiB", 0),
        Figure(figure="commands a second, one after the other", value=count / took, unit="1/s"),
    ]


async def through_daemon(state: StateDir, count: int) -> list[Figure]:
    """The same command as users' programs run it: the client, HTTP, and a daemon of its own that took the machine over."""
    await service.ensure_running(state)
    try:
        url = str((service.status(state) or {})["url"])
        async with contextlib.aclosing(Client(url, state.token.read_text().strip())) as client:
            for _ in range(min(WARM_UP, count)):
                await _true(client)
            samples = [await timed(_true(client)) for _ in range(count)]
    finally:
        await service.stop(state)
    return [distribution("round trip of `true` through a daemon and its client", samples, "ms")]


async def run(arguments: argparse.Namespace) -> Report:
    async with bed.place() as state:
        async with bed.opened(state) as found:
            machine = await found.engine.create(bed.spec(NAME, arguments.image))
            assert machine.pid
            others = bed.Others((machine.pid,))
            measured = [
                *await round_trips(found, arguments.count, others),
                *await at_once(found),
                *await in_a_row(found, arguments.row),
                *await copies.rates(found.engine, NAME, arguments.mebibytes),
            ]
            share = others.share()
            header = found.header
        measured += await through_daemon(state, arguments.count)
    return Report(header=header, figures=tuple(measured), notes=tuple(_notes(share)))


def _notes(share: float) -> list[str]:
    echo = (
        "The bare echo is the builtin of a shell that runs already: no process is started. A PING is one frame to the agent and one back. All three were "
        "sent in turn, from a process that has the engine in it; the last figure is the same command through a daemon. The copies and the `dd` beside "
        "them were made in turn, too."
    )
    goal = f"The goal of {MILLISECONDS:g} ms is for an idle host of {CORES} cores without KVM; on one that is not idle it cannot fail."
    return [echo, goal, *filter(None, [bed.idleness(share)])]
