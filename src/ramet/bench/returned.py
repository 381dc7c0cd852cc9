"""How much of what a guest gives up comes back to the host, and how soon: freed memory, cold page cache, deleted files; and what that costs its work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ramet import process
from ramet.bench import members
from ramet.bench.bed import Bed
from ramet.model import Reclaim
from ramet.vm import disk

_NAP = 0.1
_DIRECTORY = "/var/tmp/ramet-returned"
_KEEP = f"""
set -e
mkdir -p {_DIRECTORY}
seq "$1"00000000 999999999999 | head -c $(($2 << 20)) > {_DIRECTORY}/$1
sync
"""
_DROP = "echo 3 > /proc/sys/vm/drop_caches"
_READ = f"cat {_DIRECTORY}/$1 > /dev/null"
# Reads and writes of memory (sort's, and the page cache of a file that is in use all the time) between the computing of checksums. The guest's clock: the
# request's way is not in it.
_LOOP = f"""
set -e
cat /proc/uptime
for i in $(seq "$1"); do sort -r {_DIRECTORY}/work > {_DIRECTORY}/sorted; md5sum < {_DIRECTORY}/sorted > /dev/null; done
cat /proc/uptime
"""
_ENABLED = "cat /sys/module/damon_reclaim/parameters/enabled 2> /dev/null || echo none"


@dataclass(frozen=True, kw_only=True)
class Back:
    """share: of what was given up, 0 to 1; seconds: after which it was nearly all (None: not within the time); series: seconds and shares."""

    share: float
    seconds: float | None
    series: tuple[tuple[float, float], ...]


async def watch(cost: Callable[[], int], size: int, limit: float, enough: float, giving: Awaitable[object]) -> Back:
    """Look at a falling cost for `limit` seconds from when `giving` up something begins. size: bytes of that; enough: the share at which the time is taken."""
    before = await asyncio.to_thread(cost)
    began = time.monotonic()
    await giving
    series: list[tuple[float, float]] = []
    while True:
        now = await asyncio.to_thread(cost)
        passed, share = time.monotonic() - began, min(1.0, (before - now) / size)
        series.append((passed, share))
        if passed >= limit:
            reached = next((at for at, value in series if value >= enough), None)
            return Back(share=max(0.0, share), seconds=reached, series=tuple(series))
        await asyncio.sleep(_NAP)


def private(pid: int) -> int:
    """Bytes of memory that a process shares with nobody."""
    return members.resident(pid, "Private_Clean", "Private_Dirty")


async def freed(found: Bed, name: str, mebibytes: int, limit: float) -> Back:
    """Memory that the guest used and freed: a file in a tmpfs, deleted."""
    pid = await members.pid_of(found.engine, name)
    await members.reported(found.engine, name)
    await members.written(found.engine, name, mebibytes)
    await members.reported(found.engine, name)  # what writing it needed besides
    return await watch(lambda: private(pid), mebibytes << 20, limit, 0.95, members.shell(found.engine, name, f"rm {members.PLACE}/written"))


async def cold(found: Bed, name: str, mebibytes: int, limit: float) -> Back:
    """The page cache of a file that was read once."""
    pid = await members.pid_of(found.engine, name)
    await members.shell(found.engine, name, _KEEP, "1", str(mebibytes))
    await members.shell(found.engine, name, _DROP)
    await members.reported(found.engine, name)
    await members.shell(found.engine, name, _READ, "1")
    return await watch(lambda: private(pid), mebibytes << 20, limit, 0.8, asyncio.sleep(0))


async def keep(found: Bed, name: str, number: int, mebibytes: int) -> None:
    """Write a file that stays, and have it on the disk."""
    await members.shell(found.engine, name, _KEEP, str(number), str(mebibytes))


async def deleted(found: Bed, name: str, number: int, mebibytes: int, limit: float) -> tuple[Back, int]:
    """A file that is deleted: what its machine's own overlay gives back, and by how many bytes that has grown in the end (less: negative)."""
    files = found.state.machine((await found.engine.get(name)).id)
    before = disk.allocated(files)
    giving = members.shell(found.engine, name, f"rm {_DIRECTORY}/$1; sync", str(number))
    back = await watch(lambda: disk.allocated(files), mebibytes << 20, limit, 0.95, giving)
    return back, disk.allocated(files) - before


async def steer(found: Bed, name: str, policy: Reclaim) -> None:
    """Change a running machine's policy, and wait until its guest knows it where one can tell."""
    await found.engine.update(name, reclaim=policy)
    wanted = "N" if policy is Reclaim.OFF else "Y"

    async def told() -> bool:
        return await members.shell(found.engine, name, _ENABLED) in (wanted, "none")

    await members.until(f"telling {name} to reclaim", told)


@dataclass(frozen=True, kw_only=True)
class Work:
    """The foreground's work under both policies, in turn: seconds by the guest's clock, and of cpu that QEMU took."""

    off: tuple[float, ...]
    eager: tuple[float, ...]
    off_cpu: tuple[float, ...]
    eager_cpu: tuple[float, ...]


async def slowdown(found: Bed, name: str, lines: int, rounds: int, pairs: int) -> Work:
    """Work beside cold page cache, which the one policy gives back meanwhile and the other one keeps. Each is first in every second pair.

    rounds: of sorting so many lines; together they should take longer than the policy waits before it takes anything.
    """
    pid = await members.pid_of(found.engine, name)
    await members.shell(found.engine, name, f"seq $1 > {_DIRECTORY}/work", str(lines))
    times: dict[Reclaim, list[tuple[float, float]]] = {Reclaim.OFF: [], Reclaim.EAGER: []}
    await _looped(found, name, pid, 1)
    for pair in range(pairs):
        for policy in (Reclaim.OFF, Reclaim.EAGER)[:: -1 if pair % 2 else 1]:
            await steer(found, name, policy)
            await members.shell(found.engine, name, _DROP)
            await members.shell(found.engine, name, _READ, "1")
            times[policy].append(await _looped(found, name, pid, rounds))
    (off, off_cpu), (eager, eager_cpu) = (zip(*times[policy], strict=True) for policy in (Reclaim.OFF, Reclaim.EAGER))
    return Work(off=off, eager=eager, off_cpu=off_cpu, eager_cpu=eager_cpu)


async def _looped(found: Bed, name: str, pid: int, rounds: int) -> tuple[float, float]:
    cpu = process.cpu_time(pid)
    begin, _, end, _ = map(float, (await members.shell(found.engine, name, _LOOP, str(rounds))).split())
    return end - begin, process.cpu_time(pid) - cpu
