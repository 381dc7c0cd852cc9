"""The machines that benches fork: what they are told to hold, what they cost, when nothing is being done for them any more."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from ramet import process
from ramet.bench import bed
from ramet.bench.bed import Bed
from ramet.engine import Engine
from ramet.errors import GuestError, HostError
from ramet.model import Command, Machine, Snapshot, SnapshotState, State
from ramet.paths import StateDir
from ramet.store import mounting
from ramet.vm import memory as vm_memory

MB = 1_000_000
TRUE = Command(argv=("true",))
PLACE = "/run/ramet-bench"  # a tmpfs of the guest
DEADLINE = 300.0  # seconds for what is done in the background: compressing, parking
_NAP = 0.02
_REPORTING = 3.0


async def shell(engine: Engine, name: str, script: str, *words: str) -> str:
    """What a script says that root runs in the guest; GuestError when it fails."""
    result = await engine.run(name, Command(argv=("sh", "-c", script, "sh", *words), user="root"))
    if result.status:
        raise GuestError(f"in {name}, a script ended with status {result.status}: {result.stderr.decode(errors='replace').strip()}")
    return result.text.strip()


async def first_command(engine: Engine, name: str) -> None:
    """A new process, and its answer."""
    result = await engine.run(name, TRUE)
    if result.status:
        raise GuestError(f"`true` ended with status {result.status}")


_MOUNTED = f"grep -q ' {PLACE} ' /proc/mounts || {{ mkdir -p {PLACE}; mount -t tmpfs -o size=90% none {PLACE}; }}"


async def written(engine: Engine, name: str, mebibytes: int) -> None:
    """Have the guest write so much memory that it had not written before."""
    script = f"{_MOUNTED}; dd if=/dev/zero bs=1M count=$1 2>/dev/null | tr '\\0' x >> {PLACE}/written"
    await shell(engine, name, script, str(mebibytes))


# The loop ends with `head`, for then `cat` cannot write any more.
_FILL = f"""
set -e
{_MOUNTED}
for i in $(seq 1000); do find / -xdev -type f -exec cat {{}} + 2>/dev/null || break; done | head -c $1 > {PLACE}/filled
sync
echo 3 > /proc/sys/vm/drop_caches
stat -c %s {PLACE}/filled
"""
# What Perl builds of a line of text costs ten times the line. The child has it all, and goes on when the parent has said so by its end.
_PERL = """
my @rows; for my $n (1 .. $ARGV[0]) { push @rows, { id => $n, name => "row $n of the table", tags => [$n % 7, $n % 11, "t" . $n % 13] } }
exit 0 if fork; open STDIN, "<", "/dev/null"; open STDOUT, ">", "/dev/null"; open STDERR, ">", "/dev/null";
while (1) { sleep 3600; $rows[0]{id}++ }
"""


async def filled(engine: Engine, name: str, mebibytes: int) -> None:
    """Fill memory with the files of the guest, over and over: programs, libraries, texts. Its page cache is dropped, so that each byte is there once."""
    wanted = mebibytes << 20
    if (got := int((await shell(engine, name, _FILL, str(wanted))).split()[-1])) != wanted:
        raise GuestError(f"in {name}, {got} bytes of memory were filled, not {wanted}")


async def reported(engine: Engine, name: str) -> None:
    """Wait until the guest has handed back what it freed: its kernel tells of free pages every two seconds (mm/page_reporting.c)."""
    before, now = -1, 0
    while before != now:
        before = now
        await asyncio.sleep(_REPORTING)
        usage = (await engine.get(name)).usage
        now = (usage.private if usage else 0) >> 22


async def programmed(engine: Engine, name: str, rows: int) -> bool:
    """Start a program that builds a table in its memory (0.6 KB a row) and stays. False: the image has no Perl."""
    if not await shell(engine, name, "command -v perl || :"):
        return False
    await shell(engine, name, 'exec perl -e "$1" "$2"', _PERL, str(rows))
    return True


# time


@dataclass(frozen=True, kw_only=True)
class Mark:
    """When a step began: seconds from the begin of the operation."""

    at: float
    machine: str
    step: str


@contextlib.asynccontextmanager
async def watched(engine: Engine) -> AsyncIterator[list[Mark]]:
    """The steps that the body's operations went through; the list is filled at its end."""
    began = time.time()
    marks: list[Mark] = []
    events = engine.events()
    yield marks
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0):  # what is there now; nothing is waited for
            while True:
                event = await anext(events)
                if event.activity:
                    marks.append(Mark(at=event.at - began, machine=event.machine, step=event.activity.step))


async def until(what: str, done: Callable[[], Awaitable[bool]]) -> None:
    """Wait for what is done in the background and tells nobody (snapshots have no events)."""
    try:
        async with asyncio.timeout(DEADLINE):
            while True:
                if await done():
                    return
                await asyncio.sleep(_NAP)
    except TimeoutError:
        raise HostError(f"{what} took longer than {DEADLINE:.0f} s") from None


def _compressing() -> bool:
    """Whether a process that seals layers is still a child of this one: it has ended a moment after its layers are sealed."""
    for task in Path("/proc/self/task").glob("*/children"):
        for pid in task.read_text().split():
            with contextlib.suppress(OSError):
                if b"ramet.store.seal" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return True
    return False


async def settled(engine: Engine) -> None:
    """Wait until nothing is compressed any more: it would take the cpu that the next measurement needs."""

    async def sealed() -> bool:
        for machine in await engine.list():
            for snapshot in await engine.snapshots(machine.name):
                if snapshot.state is SnapshotState.BROKEN:
                    raise HostError(f"a snapshot of {machine.name} is broken: {snapshot.reason}")
        return not _compressing() and all(layer.sealed for layer in await engine.layers())

    await until("compressing", sealed)


async def parked(engine: Engine, template: str, count: int) -> None:
    """Wait until a template's pool is full."""

    async def full() -> bool:
        return (await engine.get_snapshot(template)).pooled >= count

    await until("filling the pool", full)


async def forked(engine: Engine, parent: str, name: str) -> Machine:
    """Fork one; its error is ours."""
    (outcome,) = await engine.fork(parent, names=(name,))
    if outcome.machine is None:
        raise HostError(f"{parent} could not be forked: {(outcome.error or {}).get('message')}")
    return outcome.machine


async def last_saved(engine: Engine, name: str) -> Snapshot:
    """The snapshot that a machine stands on."""
    return await engine.get_snapshot((await engine.get(name)).snapshot)


async def cold(engine: Engine, name: str) -> float:
    """Seconds from the request to start a stopped machine until its first command has answered."""
    if (await engine.get(name)).state is State.RUNNING:
        await engine.stop(name, force=True)
    began = time.perf_counter()
    await engine.start(name)
    await first_command(engine, name)
    return time.perf_counter() - began


# cost


def processes(state: StateDir) -> list[int]:
    """Pids of those that were started for a state directory: QEMU, shims, the image file system."""
    found = []
    needle = os.fsencode(state.root)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if needle in path.read_bytes():
                found.append(int(path.parent.name))
    return found


async def pid_of(engine: Engine, name: str) -> int:
    """A running machine's QEMU."""
    machine = await engine.get(name)
    if not machine.pid:
        raise HostError(f"{name} is {machine.state}: {machine.reason}")
    return machine.pid


def resident(pid: int, *kinds: str) -> int:
    """Bytes of a process's memory, by lines of /proc/PID/smaps_rollup (`Pss`, `Private_Dirty`). HostError: there is no such process."""
    try:
        lines = [line.partition(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    except OSError:
        raise HostError("the measured machine ended") from None
    return sum(int(rest.split()[0]) << 10 for kind, _, rest in lines if kind in kinds)


def served_by(state: StateDir) -> list[int]:
    """Pids of the image file system of a state directory; none where it is not mounted."""
    with contextlib.suppress(FileNotFoundError):
        keeper, workers = mounting.pids(state.store)
        return [keeper, *workers]
    return []


class Share:
    """What others took of the host's cpus, while machines of ours come and go."""

    def __init__(self, found: Bed) -> None:
        self._found = found
        self._pids = tuple(processes(found.state))
        self._others = bed.Others(self._pids)

    async def ends(self, name: str) -> None:
        """Call it before a machine's QEMU is ended."""
        if pid := (await self._found.engine.get(name)).pid:
            self._others.spent(process.cpu_time(pid))

    async def drop(self, *names: str) -> None:
        """Delete machines of ours."""
        for name in names:
            await self.ends(name)
            await self._found.engine.delete(name)

    def now(self) -> float:
        """0 to 1. Ask once: it counts what lives."""
        for pid in processes(self._found.state):
            if pid not in self._pids:
                self._others.spent(process.cpu_time(pid))
        return self._others.share()


OWN, SHARED, CACHE, HEAP, PROGRAM = (
    "guest memory, its own pages",
    "guest memory, its share of common pages",
    "translation cache",
    "heap, stacks and other anonymous memory",
    "program and libraries",
)
KINDS = (OWN, SHARED, CACHE, HEAP, PROGRAM)


def memory(pid: int, size: int, served: Path) -> Counter[str]:
    """Bytes of PSS of a QEMU, by what they are for. size: the guest's memory; served: where files of memory layers are."""
    held = vm_memory.held(pid, size, served)
    return Counter(dict(zip(KINDS, (held.own, held.common, held.cache, held.heap, held.program), strict=True)))
