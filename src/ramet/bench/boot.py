"""The first command answered after a cold boot, against the floor: the same QEMU command line, kernel and memory, with an init that only prints a line."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import re
import statistics
import time
from dataclasses import dataclass

from ramet import bringup, kernels, network, process, sockets
from ramet.bench import bed
from ramet.bench.bed import Bed
from ramet.bench.figures import Figure, Report, distribution, limit
from ramet.errors import MachineFailedError
from ramet.model import Command
from ramet.vm import argv

GOAL = 1.5
PAIRS = 7
DEADLINE = 180.0
_TRUE = Command(argv=("true",))
_NAME = "bench-boot"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=PAIRS, help="boots of each kind, after one that does not count (default: %(default)s)")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Seconds. From the request: up (the agent answers), answered (a command has run). Of the guest's clock: kernel (at `up`), init (when the agent
    was begun). cpu: what QEMU took."""

    up: float
    answered: float
    kernel: float
    init: float
    cpu: float


async def cold(found: Bed) -> Sample:
    """Boot the stopped machine, run a command, stop it."""
    began = time.monotonic()
    await found.engine.start(_NAME)
    up = time.monotonic() - began
    result = await found.engine.run(_NAME, _TRUE)
    answered = time.monotonic() - began
    if result.status:
        raise MachineFailedError(f"`true` ended with status {result.status}")
    metrics = await found.engine.metrics(_NAME)
    kernel = metrics["uptime_ms"] / 1000 - (time.monotonic() - began - up)
    said = await found.engine.run(_NAME, Command(argv=("dmesg",), user="root"))
    init = re.search(rb"\[ *([0-9.]+)\] Run /init", said.stdout)
    usage = (await found.engine.get(_NAME)).usage
    await found.engine.stop(_NAME, force=True)
    return Sample(up=up, answered=answered, kernel=kernel, init=float(init[1]) if init else kernel, cpu=usage.cpu if usage else 0.0)


async def floor(found: Bed, disk: argv.Disk) -> float:
    """Seconds from starting QEMU to the line that the floor's init prints."""
    initrd = await kernels.floor_initramfs(found.boot.kernel)
    files = found.state.machine("floor")
    files.root.mkdir(exist_ok=True)
    try:
        with sockets.listen(files.qmp) as monitor, sockets.listen(files.agent) as agent:
            boot = dataclasses.replace(found.boot, initrd=initrd)
            config = bringup.config(bed.spec(_NAME, ""), boot, network.USER, disks=(disk,))
            config = dataclasses.replace(config, qmp_fd=monitor.fileno(), agent_fd=agent.fileno())
            words = argv.build(config)
            began = time.monotonic()
            async with process.running(words, pass_fds=[monitor.fileno(), agent.fileno()]) as qemu, asyncio.timeout(DEADLINE):
                return await _line(qemu) - began
    finally:
        bringup.remove_tree(files.root)


async def _line(qemu: asyncio.subprocess.Process) -> float:
    """When the floor's line came."""
    assert qemu.stdout
    seen = b""
    while chunk := await qemu.stdout.read(4096):
        seen += chunk
        if kernels.FLOOR_LINE.encode() in seen:
            return time.monotonic()
    raise MachineFailedError(f"the floor's QEMU ended: {(seen.decode(errors='replace').splitlines() or ['no output'])[-1]}")


async def run(arguments: argparse.Namespace) -> Report:
    async with bed.place() as state, bed.opened(state) as found:
        made = await found.engine.create(bed.spec(_NAME, arguments.image))
        files = found.state.machine(made.id)
        disk = argv.Disk(overlay=files.overlay(0), base=found.state.image(made.image_digest).disk)
        await found.engine.stop(_NAME)
        await floor(found, disk)
        await cold(found)
        others = bed.Others(())
        floors, samples = [], []
        for _ in range(arguments.pairs):
            floors.append(await floor(found, disk))
            samples.append(await cold(found))
            others.spent(samples[-1].cpu)
        share = others.share()
        return Report(header=found.header, figures=tuple(_figures(floors, samples)), notes=tuple(_notes(share, arguments.pairs)))


def _figures(floors: list[float], samples: list[Sample]) -> list[Figure]:
    answered = [each.answered for each in samples]
    return [
        limit(
            "first command answered after a cold boot, as a multiple of the floor",
            statistics.median(answered) / statistics.median(floors),
            "x",
            GOAL,
        ),
        distribution("first command answered after a cold boot", answered, "s"),
        distribution("floor: an init that only prints a line", floors, "s"),
        distribution("of the first: until the guest's kernel begins", [each.up - each.kernel for each in samples], "s"),
        distribution("of the first: the kernel, until it runs the agent", [each.init for each in samples], "s"),
        distribution("of the first: the agent, until it answers", [each.kernel - each.init for each in samples], "s"),
        distribution("of the first: the command", [each.answered - each.up for each in samples], "s"),
    ]


def _notes(share: float, pairs: int) -> list[str]:
    same = (
        "Both sides have the same QEMU command line (disk, network and agent port too), kernel and memory, and differ in the initramfs. They were "
        f"booted in turn, {pairs} times each, after one boot of each that does not count. The first command's time is from the request to start a "
        "stopped machine."
    )
    return [same, *filter(None, [bed.idleness(share)])]
