"""The same build in several machines, one after another, and what each costs the host meanwhile, looked at once a second."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from ramet.bench import bed, members
from ramet.bench.bed import Bed
from ramet.bench.plot import Point
from ramet.model import Reclaim, Spec
from ramet.paths import MachineDir
from ramet.vm import disk

OFF, ON, FORK = "features off", "features on", "features on, in a fork"
IDLE, FILL, WORK, FREE, REST = "idle", "fill", "work", "free", "idle again"
_PERIOD = 1.0

# Where a build's files are: `sources` are read once and stay, `objects` go at the end. `program` holds memory until it is told to end.
_PLACE = "/var/tmp/ramet-build"
_FILL = f"""
set -e
mkdir -p {_PLACE}/sources {_PLACE}/objects
cd {_PLACE}
for i in $(seq 1000); do find /bin/ /usr/ -xdev -type f -exec cat {{}} + 2>/dev/null || break; done | head -c $(($1 << 19)) > sources/all
for i in 1 2 3 4 5 6 7 8 9 10; do
    seq "$i"10000000 999999999999 | head -c $(($1 * 104858 * 2 / 3)) > objects/$i
done
sync
cat sources/* objects/* > /dev/null
({{ yes ramet | head -c $(($1 << 20)); : > filled; while [ ! -e done ]; do sleep 0.2; done; }} | tail -c $(($1 << 20))) < /dev/null > /dev/null 2>&1 &
while [ ! -e filled ]; do sleep 0.2; done
"""
# Until the deadline: packed, sorted, written and read again; what comes out replaces what was there.
_WORK = f"""
cd {_PLACE}
end=$(($(date +%s) + $1)) i=0
while [ "$(date +%s)" -lt "$end" ]; do
    i=$((i % 10 + 1))
    tar -cf - objects/$i | gzip -1 > objects/packed
    sort -r objects/$i > objects/sorted
    cat objects/sorted > objects/$i
done
"""
_FREE = f"cd {_PLACE} && : > done && rm -r objects && sync"
# Taking the balloon's driver away ends the reporting of free pages, which has no switch: `page_reporting_order` may not be larger than a free block.
_WITHOUT = """
set -e
cd /sys/bus/virtio/drivers/virtio_balloon
for device in virtio*; do echo "$device" > unbind; done
mount -o remount,nodiscard /
"""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds of each phase; the work that fills or frees is done within its own. mebibytes: what the build's program allocates."""

    mebibytes: int
    idle: float
    fill: float
    work: float
    free: float
    rest: float


FULL = Pace(mebibytes=300, idle=10, fill=30, work=40, free=10, rest=75)
QUICK = Pace(mebibytes=48, idle=3, fill=8, work=8, free=5, rest=12)


def spec(name: str, image: str, memory: int, reclaim: Reclaim) -> Spec:
    """A machine to measure. memory: MiB."""
    return dataclasses.replace(bed.spec(name, image), memory=memory << 20, reclaim=reclaim)


async def without(found: Bed, name: str) -> None:
    """Take away what gives memory and disk back: what is left is a machine as hypervisors without these features have it."""
    await members.shell(found.engine, name, _WITHOUT)


@dataclass(kw_only=True)
class Sampler:
    """Looks at one machine until it is left. phase: what the machine does now."""

    name: str
    pid: int
    files: MachineDir
    points: list[Point]
    began: float
    phase: str = IDLE

    async def look(self) -> None:
        for number in itertools.count():
            await asyncio.sleep(self.began + number * _PERIOD - time.monotonic())
            memory, blocks = await asyncio.to_thread(lambda: (members.resident(self.pid, "Pss"), disk.allocated(self.files)))
            at = time.monotonic() - self.began
            self.points.append(Point(seconds=at, machine=self.name, memory=memory, disk=blocks, phase=self.phase))

    @contextlib.asynccontextmanager
    async def during(self, phase: str, seconds: float) -> AsyncIterator[None]:
        """A phase lasts as long as it should, or as its body if that takes longer."""
        self.phase = phase
        end = time.monotonic() + seconds
        yield
        await asyncio.sleep(end - time.monotonic())


@contextlib.asynccontextmanager
async def sampled(found: Bed, name: str, title: str, points: list[Point]) -> AsyncIterator[Sampler]:
    """Samples of a machine for as long as the body takes."""
    machine = await found.engine.get(name)
    pid = await members.pid_of(found.engine, name)
    sampler = Sampler(name=title, pid=pid, files=found.state.machine(machine.id), points=points, began=time.monotonic())
    task = asyncio.create_task(sampler.look())
    try:
        yield sampler
        if task.done():
            task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def fill(found: Bed, name: str, mebibytes: int) -> None:
    """Write and read the build's files, and start its program: about 2.2 times as much memory as the program's own, half a time as files that stay."""
    await members.shell(found.engine, name, _FILL, str(mebibytes))


async def work(found: Bed, name: str, seconds: float) -> None:
    await members.shell(found.engine, name, _WORK, str(round(seconds)))


async def free(found: Bed, name: str) -> None:
    """The program ends, and the files that it made are deleted."""
    await members.shell(found.engine, name, _FREE)


async def build(found: Bed, name: str, title: str, pace: Pace) -> list[Point]:
    """One machine's build. A phase takes the same time in each run, unless its work takes longer."""
    points: list[Point] = []
    async with sampled(found, name, title, points) as sampler:
        async with sampler.during(IDLE, pace.idle):
            pass
        async with sampler.during(FILL, pace.fill):
            await fill(found, name, pace.mebibytes)
        async with sampler.during(WORK, pace.work):
            await work(found, name, pace.work - 1)
        async with sampler.during(FREE, pace.free):
            await free(found, name)
        async with sampler.during(REST, pace.rest):
            pass
    return points


async def runs(found: Bed, image: str, memory: int, pace: Pace) -> list[Point]:
    """All three, in turn: two would disturb each other. Each machine is gone before the next one is made, but for the fork's parent."""
    await found.engine.create(spec("off", image, memory, Reclaim.OFF))
    await without(found, "off")
    points = await build(found, "off", OFF, pace)
    await found.engine.delete("off")
    await found.engine.create(spec("on", image, memory, Reclaim.EAGER))
    points += await build(found, "on", ON, pace)
    await found.engine.delete("on")
    await found.engine.create(spec("warm", image, memory, Reclaim.EAGER))
    await members.filled(found.engine, "warm", pace.mebibytes // 4)
    await members.forked(found.engine, "warm", "fork")
    await members.settled(found.engine)
    points += await build(found, "fork", FORK, pace)
    await found.engine.delete("fork")
    await found.engine.delete("warm")
    return points
