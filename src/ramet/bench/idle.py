"""What a machine costs that does nothing: the cpu that its QEMU takes, and the memory."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ramet import process
from ramet.bench import bed, members, picture
from ramet.bench.bed import Bed
from ramet.bench.figures import Figure, Report
from ramet.model import Reclaim

SECONDS = 60.0
SETTLE = 30.0  # after a boot: the guest's own work, and what the caretaker tells it
_MIB = 1 << 20


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long the machines are looked at (default: %(default)s)")
    parser.add_argument("--settle", type=float, default=SETTLE, help="seconds that they idle before (default: %(default)s)")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """share: of one cpu of the host, 0 to 1; switches: how often a second one of QEMU's threads went to sleep; kinds: bytes of PSS, by what they are for."""

    share: float
    switches: float
    kinds: Counter[str]


def switches(pid: int) -> dict[str, int]:
    """How often each thread of a process slept so far."""
    found = {}
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with contextlib.suppress(OSError):  # threads end
            lines = status.read_text().splitlines()
            found[status.parent.name] = next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))
    return found


async def costs(found: Bed, names: list[str], seconds: float) -> list[Cost]:
    """Of machines that idle, all at the same time: together they take a few percent of a cpu, so they do not disturb each other."""
    pids = [await members.pid_of(found.engine, name) for name in names]
    before = [(time.monotonic(), process.cpu_time(pid), switches(pid)) for pid in pids]
    await asyncio.sleep(seconds)
    found_costs = []
    for name, pid, (began, cpu, slept) in zip(names, pids, before, strict=True):
        passed = time.monotonic() - began
        size = (await found.engine.get(name)).spec.memory
        found_costs.append(
            Cost(
                share=(process.cpu_time(pid) - cpu) / passed,
                switches=sum(number - slept.get(thread, 0) for thread, number in switches(pid).items()) / passed,
                kinds=members.memory(pid, size, found.state.store.mount),
            )
        )
    return found_costs


async def measured(found: Bed, image: str, seconds: float, settle: float) -> dict[str, Cost]:
    """A machine of each policy, and a fork of the gentle one."""
    policies = list(Reclaim)
    for policy in policies:
        await found.engine.create(picture.spec(f"idle-{policy}", image, bed.spec("", "").memory >> 20, policy))
    await members.forked(found.engine, f"idle-{Reclaim.GENTLE}", "idle-fork")
    await members.settled(found.engine)
    await asyncio.sleep(settle)
    names = [*(f"idle-{policy}" for policy in policies), "idle-fork"]
    found_costs = await costs(found, names, seconds)
    for name in reversed(names):
        await found.engine.delete(name)
    return dict(zip([*(f"reclaim {policy}" for policy in policies), "a fork, reclaim gentle"], found_costs, strict=True))


async def run(arguments: argparse.Namespace) -> Report:
    async with bed.place() as state, bed.opened(state) as found:
        found_costs = await measured(found, arguments.image, arguments.seconds, arguments.settle)
        return Report(header=found.header, figures=tuple(report(found_costs)), notes=(note(arguments.seconds),))


def report(found: dict[str, Cost]) -> list[Figure]:
    """The figures of machines that idled."""
    figures = []
    for title, cost in found.items():
        figures += [
            Figure(figure=f"idle, {title}: cpu of the host", value=cost.share * 100, unit="%"),
            Figure(figure=f"idle, {title}: QEMU woke up", value=cost.switches, unit="1/s"),
            Figure(figure=f"idle, {title}: PSS", value=cost.kinds.total() / _MIB, unit="MiB"),
        ]
        figures += [
            Figure(figure=f"of that: {kind}", value=cost.kinds[kind] / _MIB, unit="MiB") for kind in members.KINDS if cost.kinds[kind]
        ]
    return figures


def note(seconds: float) -> str:
    return (
        f"Idle: the machines did nothing for {seconds:.0f} s, side by side; the cpu is what their QEMUs took (user and system), of one cpu."
    )
