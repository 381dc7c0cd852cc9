"""The tour's second half: a machine with a program in its memory becomes four; one is rewound, one hibernated; what each costs, and how long it took.

The machines that it makes are told by their names and by where they come from. They go at its end, also when that is an error; those of a tour
that was killed go when the next one begins.
"""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.text import Text

from ramet import chart
from ramet.aio import AsyncHost, AsyncMachine
from ramet.cli import lineage, text
from ramet.client import Client
from ramet.errors import ExistsError, GuestError, RametError
from ramet.model import Lifecycle, Machine, Spec, TreeNode
from ramet.steps import Mark, Step, Steps, seconds
from ramet.units import format_size

CHILDREN = ("tour-1", "tour-2", "tour-3")
ONE_MORE = "tour-4"
COLD = "tour-cold"
_NAMES = (*CHILDREN, ONE_MORE, COLD)
_BOOTED, _ANSWERED, _FORKED = "cold boot → first command", "fork → answer", "fork → first command"
_REWOUND, _RESUMED = "rewind → first command", "resume → first command"
_COUNTER = "hello-count"  # label of the process that chapter `warm` starts
_DEADLINE = 60.0  # seconds for what takes a tenth of one
_CLOCK = 2.0  # seconds: it is right within one, and tells whole ones
# One command, so that what it says is of one moment. The socket is the program's own, from before the fork.
_ASK = "hostname; cat /etc/machine-id; date +%s; exec bash -c 'cat < /dev/tcp/127.0.0.1/1010'"
_MESS = "rm -rf /usr/bin /srv/hello"
_BUG = "This is a bug of Ramet's: please report it."


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a machine and count.pl in it say. clock: seconds of Unix time; drawn: its random numbers, the first one first."""

    host: str
    machine_id: str
    clock: int
    pid: int
    drawn: tuple[str, ...]

    @classmethod
    def parse(cls, said: str) -> Told:
        """GuestError when it is not what `_ASK` prints."""
        try:
            host, machine_id, clock, answer = said.splitlines()
            pid, *drawn = answer.split()
            return cls(host=host, machine_id=machine_id, clock=int(clock), pid=int(pid), drawn=tuple(drawn))
        except ValueError:
            raise GuestError(f"count.pl in the machine answered {said[:100]!r}", hint=_BUG) from None


def common(members: Sequence[Told]) -> int:
    """How many numbers all of them have drawn alike before they went each its own way."""
    columns = enumerate(zip(*(each.drawn for each in members), strict=False))
    return next((number for number, column in columns if len(set(column)) > 1), min(len(each.drawn) for each in members))


def check(members: Sequence[Told], seen: int) -> int:
    """`common` of machines that were one when `seen` numbers were drawn; GuestError when they are not what forks must be."""
    same = common(members)
    wrong = {
        "its program is not the same in all": len({each.pid for each in members}) > 1,
        "what its program remembers is not the same in all": same < seen,
        "its program does not go on in all": min(len(each.drawn) for each in members) <= same,
        "random numbers are the same in some": len({each.drawn[same : same + 1] for each in members}) < len(members),
        "host names are the same in some": len({each.host for each in members}) < len(members),
        "machine ids are the same in some": len({each.machine_id for each in members}) < len(members),
    }
    if found := [words for words, is_so in wrong.items() if is_so]:
        raise GuestError(f"after the fork of the machine, {' and '.join(found)}", hint=_BUG)
    return same


def family(nodes: Sequence[TreeNode], name: str) -> list[TreeNode]:
    """A machine with all that it descends from and all that descends from it."""
    by_id = {node.id: node for node in nodes}

    def above(node: TreeNode) -> list[TreeNode]:
        found = [node]
        while (parent := by_id.get(found[-1].parent)) and parent not in found:
            found.append(parent)
        return found

    lines = [above(node) for node in nodes]
    kept = {member.id for line in lines if any(member.name == name for member in line) for member in line}
    return [node for node in nodes if node.id in kept]


@dataclass(kw_only=True)
class Colony:
    """What chapters share. first: the machine that is forked; program: count.pl, as a file here; times: what took how many seconds, for the last chapter."""

    steps: Steps
    verbs: Client
    first: AsyncMachine
    program: Path
    seen: int = 0
    members: list[AsyncMachine] = field(default_factory=list)
    at_fork: list[Told] = field(default_factory=list)
    same: int = 0
    times: dict[str, float] = field(default_factory=dict)

    @property
    def cold(self) -> Spec:
        """The machine that forks are compared with: the first one's like, without what its definition runs."""
        return dataclasses.replace(self.first.record.spec, name=COLD, ports=(), lifecycle=Lifecycle())


async def _ask(machine: AsyncMachine) -> Told:
    return Told.parse((await machine.run(_ASK, check=True, timeout=_DEADLINE)).text)


async def _command(machine: AsyncMachine) -> None:
    """The least that is a new process."""
    await machine.run(["true"], check=True, timeout=_DEADLINE)


async def _fork(machine: AsyncMachine, names: Sequence[str]) -> list[AsyncMachine]:
    """Not to be left half-way: what a fork is still making, nobody could clean up."""
    making = asyncio.ensure_future(machine.fork(names=names))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        await asyncio.wait({making}, timeout=_DEADLINE)
        raise


# Chapters


async def warm(colony: Colony, step: Step) -> None:
    """A program with state in its memory."""
    if not await _counters(colony.first):
        await colony.first.files.upload(colony.program, "/srv/hello/count.pl")
        async with await colony.first.start(["perl", "count.pl"], detach=True, label=_COUNTER) as process:
            async with asyncio.timeout(_DEADLINE):
                if not await anext(process.stdout.lines(), ""):
                    raise GuestError(f"count.pl does not run: {(await process.stderr.read()).decode(errors='replace').strip()}")
    told = await _ask(colony.first)
    colony.seen = len(told.drawn)
    words = f"count.pl (pid {told.pid}) draws a random number ten times a second and keeps them nowhere else: {colony.seen} so far."
    step.end(Mark.OK, f"a program with state in its memory\n{words}")


async def _counters(machine: AsyncMachine) -> list[int]:
    """The agent's numbers of count.pl's processes."""
    return [each.id for each in await machine.processes() if each.label == _COUNTER and each.state == "running"]


async def cold(colony: Colony, step: Step) -> None:
    """What everything after this is compared with."""
    step.progress("booting another one")
    machine = await AsyncMachine.create(spec=colony.cold, verbs=colony.verbs)
    await _command(machine)
    colony.times[_BOOTED] = took = step.took
    await machine.delete()
    step.end(Mark.OK, f"another machine, from nothing, to compare with\nIts first command has run after {seconds(took)}.")


async def fork(colony: Colony, step: Step) -> None:
    """Four that go on from one instant."""
    step.progress("making three more of it")
    children = await _fork(colony.first, CHILDREN)
    answered = step.took
    colony.members = [colony.first, *children]
    colony.at_fork = await asyncio.gather(*map(_ask, colony.members))
    colony.same = check(colony.at_fork, colony.seen)
    pause = (await AsyncHost(colony.verbs).get_snapshot(children[0].record.snapshot)).pause
    still = f"{colony.first.name} stood still for {seconds(pause)}; " if pause else ""
    lines = [
        "one running machine becomes four, programs and all",
        f"{still}its three forks answered after {seconds(answered)}. In all four the same program remembers the same "
        f"{colony.same} numbers. Each one after those is its own, as are host names and machine ids:",
    ]
    step.end(Mark.OK, "\n".join([*lines, *_compared(colony.at_fork, colony.same)]))


def _compared(members: Sequence[Told], same: int) -> list[str]:
    """A line for each: who it is, and its numbers around the instant of the fork."""
    heads = ("hostname", "machine-id", "pid", chart.ordinal(same), chart.ordinal(same + 1), "has now")
    rows = [
        (each.host, f"{each.machine_id[:8]}…", str(each.pid), *each.drawn[same - 1 : same + 1], str(len(each.drawn))) for each in members
    ]
    return chart.aligned([heads, *(tuple(map(text.clean, row)) for row in rows)])


async def rewind(colony: Colony, step: Step) -> None:
    """A mess, and back to before it."""
    machine, before = colony.members[1], colony.at_fork[1]
    mess = f"kill -9 {before.pid}; {_MESS}"
    step.progress("making a mess")
    await machine.run(mess, cwd="/", timeout=_DEADLINE)
    try:
        broken = (await machine.run(["ls", "/"], cwd="/", timeout=_DEADLINE)).text
    except GuestError as error:
        broken = error.message
    began = time.monotonic()
    step.progress("going back")
    await machine.restore()
    took = time.monotonic() - began
    await _command(machine)
    colony.times[_REWOUND] = time.monotonic() - began
    told = await _ask(machine)
    if told.pid != before.pid or common([told, before]) != colony.same:
        raise GuestError(f"{machine.name} is not at the instant that it was rewound to", hint=_BUG)
    lines = [
        f"{machine.name} is wrecked, and goes back to its fork",
        f"$ {mess}",
        "$ ls /",
        f"  {text.clean(broken)}",
        f"Back in {seconds(took)}: the files are there, and count.pl (pid {told.pid}) goes on after its "
        f"{chart.ordinal(colony.same)} number, as if nothing had been.",
    ]
    step.end(Mark.OK, "\n".join(lines))


async def hibernate(colony: Colony, step: Step) -> None:
    """Memory given back, and everything there again."""
    machine = colony.members[2]
    before, used = await _ask(machine), (await machine.refresh()).usage
    began = time.monotonic()
    step.progress("going to sleep")
    await machine.hibernate(slim=False)  # it goes on at once, and would read its files again
    slept = time.monotonic() - began
    stored = (await AsyncHost(colony.verbs).get_snapshot((await machine.refresh()).snapshot)).stored
    began = time.monotonic()
    step.progress("waking up")
    await machine.resume()
    woke = time.monotonic() - began
    await _command(machine)
    colony.times[_RESUMED] = time.monotonic() - began
    asked, told = time.time(), await _ask(machine)
    if told.pid != before.pid or told.drawn[: len(before.drawn)] != before.drawn:
        raise GuestError(f"{machine.name} does not go on from where it was hibernated", hint=_BUG)
    if asked - told.clock > _CLOCK:
        raise GuestError(f"the clock of {machine.name} is {asked - told.clock:.0f} s late after it was resumed", hint=_BUG)
    given = format_size(used.private) if used else "its"
    lines = [
        f"{machine.name} goes to the disk, and comes back",
        f"Saved in {seconds(slept)}: {given} of memory went back to this computer, {format_size(stored)} were written. "
        f"Resumed in {seconds(woke)}: its {len(before.drawn)} numbers are there, it has drawn {len(told.drawn) - len(before.drawn)} more, "
        "and its clock is right.",
    ]
    step.end(Mark.OK, "\n".join(lines))


async def tree(colony: Colony, step: Step) -> None:
    """Who descends from whom, and what each really costs."""
    nodes = family(await AsyncHost(colony.verbs).tree(), colony.first.name)
    ours = {each.record.id for each in colony.members}
    memory = sum(node.usage.memory for node in nodes if node.usage and node.id in ours)
    seen = sum(each.record.spec.memory for each in colony.members)
    words = f"Four machines that see {format_size(seen)} take {format_size(memory)}: forks share what none has changed."
    step.end(Mark.OK, f"who descends from whom, and what each really costs\n{words}")
    for line in lineage.draw(nodes):
        colony.steps.console.print(Text("  ").append_text(Text.from_ansi(line)), soft_wrap=True)


async def times(colony: Colony, step: Step) -> None:
    """All of it beside the cold boot."""
    step.progress("forking one more")
    began = time.monotonic()
    (one,) = await _fork(colony.first, [ONE_MORE])
    colony.times[_ANSWERED] = time.monotonic() - began
    await _command(one)
    colony.times[_FORKED] = time.monotonic() - began
    shown = {title: colony.times[title] for title in (_BOOTED, _ANSWERED, _FORKED, _REWOUND, _RESUMED)}
    step.end(Mark.OK, "\n".join(["of one fork, one rewind, one resume, beside a cold boot", *chart.bars(shown)]))


CHAPTERS: tuple[tuple[str, Callable[[Colony, Step], Awaitable[None]]], ...] = (
    ("Warm up", warm),
    ("Cold boot", cold),
    ("Fork", fork),
    ("Rewind", rewind),
    ("Hibernate", hibernate),
    ("Tree", tree),
    ("Times", times),
)


# Before and after


def _is_ours(record: Machine, colony: Colony) -> bool:
    """Whether a tour made it: of our names, and a fork of our machine or its cold like."""
    return (record.name != COLD and record.parent == colony.first.name) or (record.name == COLD and record.spec == colony.cold)


async def tidy(colony: Colony) -> list[str]:
    """Delete what tours have made, whatever it is doing, and end count.pl; the machines' names. ExistsError when one of our names is somebody else's."""
    found = [each for each in await AsyncMachine.list(verbs=colony.verbs) if each.name in _NAMES]
    if others := [each.name for each in found if not _is_ours(each.record, colony)]:
        raise ExistsError(
            f"the tour makes machines of its own, and there is another one called {others[0]}",
            hint=f"`ramet delete {others[0]}` removes it.",
        )
    await asyncio.gather(*(each.delete() for each in found))
    for process in await _counters(colony.first):
        async with await colony.first.attach(process) as counter:
            await counter.signal(signal.SIGKILL)
            await counter.wait(_DEADLINE)
        await colony.first.forget(process)
    return [each.name for each in found]


async def show(colony: Colony) -> None:
    """All chapters. Whatever happens, its machines are gone afterwards, or the error says how to delete them."""
    await tidy(colony)
    try:
        for title, chapter in CHAPTERS:
            with colony.steps.step(title) as step:
                try:
                    await chapter(colony, step)
                except RametError:
                    step.end(Mark.MISSING, "failed: see below")
                    raise
    except BaseException as error:
        try:
            await tidy(colony)
        except RametError as second:
            left = f"The machines that the tour made may be left ({second.message}): `ramet list` shows them, `ramet delete` removes them."
            if isinstance(error, RametError):
                error.hint = f"{error.hint} {left}".strip()
        raise
    with colony.steps.step("Clean-up") as step:
        names = await tidy(colony)
        step.end(Mark.OK, f"{', '.join(sorted(names))} are deleted; {colony.first.name} stays")
