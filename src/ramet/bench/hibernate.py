"""Hibernating a machine with data in its memory, and its first command afterwards, beside a fork's: both with nothing of them in the host's page cache.

And what a machine takes that has built something, hibernated as it is and slimmed before.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path

from ramet.bench import bed, members
from ramet.bench.bed import Bed
from ramet.bench.figures import Figure, Report, distribution, limit
from ramet.model import Snapshot
from ramet.paths import StateDir
from ramet.storage import LayerInfo

RATIO = 1.5
SLIM = 1 / 3  # of what a machine takes as it is
MEMORY, MEBIBYTES, ROUNDS, BUILD = 1024, 200, 3, 300
_MIB = 1 << 20
_NAME, _CHILD = "bench-hibernate", "bench-fork"
_DROP = Path("/proc/sys/vm/drop_caches")
_BUILDER = "bench-build"
# What a build leaves: files that were written and read, and memory that a program had. The loop ends with `head`, for then `cat` cannot write any more.
_BUILD = """
set -e
mkdir -p /var/tmp/build
cd /var/tmp/build
for i in $(seq 1000); do find /usr /bin /lib -xdev -type f -exec cat {} + 2>/dev/null || break; done | head -c $(($1 << 20)) | split -b 1M -a 4
sync
cat x* > /dev/null
dd if=/dev/zero of=/dev/null bs=$(($1 / 2))M count=1 2>/dev/null
"""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory", type=int, default=MEMORY, help="MiB of the machine (default: %(default)s)")
    parser.add_argument("--mebibytes", type=int, default=MEBIBYTES, help="of it that are filled with data (default: %(default)s)")
    parser.add_argument("--build", type=int, default=BUILD, help="MiB of files that a machine builds (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="hibernations (default: %(default)s)")


def forget_pages(state: StateDir) -> bool:
    """Leave nothing of the layers in the page cache. True: nothing of anything, programs and libraries too, which needs root."""
    os.sync()  # what is dirty stays
    with contextlib.suppress(OSError):
        _DROP.write_text("3\n")
        return True
    for path in (*state.store.blobs.iterdir(), *state.store.layers.glob("*/spool"), *state.store.mount.glob("*")):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return False


@dataclass(kw_only=True)
class Samples:
    """Seconds, and what the first hibernation stored (memory, disk) and gave back (bytes).

    hibernate: until the memory was given back. up: until a resume was done. The others are until the first command answered: resumed; slimmed, resumed
    without its caches; forked and warm, of a child of a saved instant with a cold and a warm page cache; verb, with the saving. all: the whole page cache
    was dropped.
    """

    hibernate: list[float] = field(default_factory=list)
    up: list[float] = field(default_factory=list)
    resumed: list[float] = field(default_factory=list)
    slimmed: list[float] = field(default_factory=list)
    forked: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    verb: list[float] = field(default_factory=list)
    given: float = 0.0
    all: bool = True
    first: tuple[LayerInfo, LayerInfo] | None = None


async def answered(found: Bed, name: str, work: Awaitable[object]) -> tuple[float, float]:
    """Seconds until something is done, and until the machine's first command then has answered."""
    began = time.perf_counter()
    await work
    up = time.perf_counter() - began
    await members.first_command(found.engine, name)
    return up, time.perf_counter() - began


async def hibernated(found: Bed, samples: Samples, share: members.Share) -> None:
    """Hibernate as it is, forget, resume; then the same slimmed."""
    usage = (await found.engine.get(_NAME)).usage
    await share.ends(_NAME)
    began = time.perf_counter()
    await found.engine.hibernate(_NAME, slim=False)
    samples.hibernate.append(time.perf_counter() - began)
    await members.settled(found.engine)
    if samples.first is None:
        saved = await members.last_saved(found.engine, _NAME)
        samples.first = (await found.engine.get_layer(saved.memory_layer), await found.engine.get_layer(saved.disk_layer))
        samples.given = usage.memory if usage else 0.0
    samples.all = forget_pages(found.state)
    up, first = await answered(found, _NAME, found.engine.resume(_NAME))
    samples.up.append(up)
    samples.resumed.append(first)
    await share.ends(_NAME)
    await found.engine.hibernate(_NAME)
    await members.settled(found.engine)
    forget_pages(found.state)
    samples.slimmed.append((await answered(found, _NAME, found.engine.resume(_NAME)))[1])


async def child(found: Bed, samples: Samples, share: members.Share) -> None:
    """Fork the machine; then let another child go on from the same instant, with nothing of it in the page cache, and a third with all of it."""
    _, verb = await answered(found, _CHILD, members.forked(found.engine, _NAME, _CHILD))
    samples.verb.append(verb)
    saved = await members.last_saved(found.engine, _NAME)
    await share.drop(_CHILD)
    await members.settled(found.engine)
    forget_pages(found.state)
    samples.forked.append(await _from(found, saved, share))
    samples.warm.append(await _from(found, saved, share))


async def _from(found: Bed, saved: Snapshot, share: members.Share) -> float:
    _, first = await answered(found, _CHILD, found.engine.create_from(saved.id, _CHILD))
    await share.drop(_CHILD)
    return first


@dataclass(frozen=True, kw_only=True)
class Built:
    """A machine that built something and was hibernated: seconds that took, what was kept, and its memory's layer."""

    seconds: float
    kept: Snapshot
    memory: LayerInfo


async def built(found: Bed, arguments: argparse.Namespace, share: members.Share, *, slim: bool) -> Built:
    """Boot a machine, let it build, and hibernate it."""
    await found.engine.create(dataclasses.replace(bed.spec(_BUILDER, arguments.image), memory=arguments.memory << 20))
    await members.shell(found.engine, _BUILDER, _BUILD, str(arguments.build))
    await share.ends(_BUILDER)
    began = time.perf_counter()
    await found.engine.hibernate(_BUILDER, slim=slim)
    seconds = time.perf_counter() - began
    await members.settled(found.engine)
    kept = await members.last_saved(found.engine, _BUILDER)
    memory = await found.engine.get_layer(kept.memory_layer)
    await found.engine.delete(_BUILDER)
    return Built(seconds=seconds, kept=kept, memory=memory)


async def run(arguments: argparse.Namespace) -> Report:
    async with bed.place() as state, bed.opened(state) as found:
        share = members.Share(found)
        whole = await built(found, arguments, share, slim=False)
        slim = await built(found, arguments, share, slim=True)
        wanted = dataclasses.replace(bed.spec(_NAME, arguments.image), memory=arguments.memory << 20)
        await found.engine.create(wanted)
        await members.filled(found.engine, _NAME, arguments.mebibytes)
        await members.reported(found.engine, _NAME)
        samples = Samples()
        for _ in range(max(1, arguments.rounds)):
            await hibernated(found, samples, share)
            await child(found, samples, share)
        figures = [*_figures(samples), *_slimming(whole, slim)]
        return Report(header=found.header, figures=tuple(figures), notes=tuple(_notes(arguments, samples, share.now())))


def _figures(samples: Samples) -> list[Figure]:
    assert samples.first
    memory, disk = samples.first
    ratio = statistics.median(samples.resumed) / statistics.median(samples.forked)
    return [
        limit("first command after a resume, as a multiple of a fork's, both with a cold page cache", ratio, "x", RATIO),
        distribution("first command answered after the request to resume", samples.resumed, "s"),
        distribution("of that: until the machine runs", samples.up, "s"),
        distribution("first command after a resume, slimmed: its files are read from the disk again", samples.slimmed, "s"),
        distribution("first command of a fork, with a cold page cache", samples.forked, "s"),
        distribution("first command of a fork, with a warm page cache", samples.warm, "s"),
        distribution("first command of a fork, with the saving of its parent", samples.verb, "s"),
        Figure(figure="the first hibernation", value=samples.hibernate[0], unit="s"),
        *([distribution("those after it", samples.hibernate[1:], "s")] if samples.hibernate[1:] else []),
        Figure(figure="memory that it gave back (PSS of QEMU)", value=samples.given / _MIB, unit="MiB"),
        Figure(figure="memory that it saved", value=memory.data / _MIB, unit="MiB"),
        Figure(figure="stored for the memory, compressed", value=memory.stored / _MIB, unit="MiB"),
        Figure(figure="stored for the disk, compressed", value=disk.stored / _MIB, unit="MiB"),
    ]


def _slimming(whole: Built, slim: Built) -> list[Figure]:
    return [
        limit(
            "stored for the memory after a build, slimmed, as a share of it as it is", slim.memory.stored / whole.memory.stored, "x", SLIM
        ),
        Figure(figure="stored for the memory after a build, as it is", value=whole.memory.stored / _MIB, unit="MiB"),
        Figure(figure="stored for the memory after a build, slimmed", value=slim.memory.stored / _MIB, unit="MiB"),
        Figure(figure="with the disk, as it is", value=whole.kept.stored / _MIB, unit="MiB"),
        Figure(figure="with the disk, slimmed", value=slim.kept.stored / _MIB, unit="MiB"),
        Figure(figure="memory given back before it was saved", value=slim.kept.slimmed / _MIB, unit="MiB"),
        Figure(figure="memory that was then saved", value=slim.kept.saved / _MIB, unit="MiB"),
        Figure(figure="memory saved as it is", value=whole.kept.saved / _MIB, unit="MiB"),
        Figure(figure="hibernation after a build, as it is", value=whole.seconds, unit="s"),
        Figure(figure="hibernation after a build, slimmed", value=slim.seconds, unit="s"),
    ]


def _notes(arguments: argparse.Namespace, samples: Samples, share: float) -> list[str]:
    what = (
        f"A machine with {arguments.memory} MiB of memory, of which {arguments.mebibytes} MiB are the files of its image, in a tmpfs: programs, "
        "libraries, texts; its own page cache was dropped before. The first hibernation saves all of that, the later ones what was written since the resume."
    )
    cold = (
        "The host's whole page cache was dropped (drop_caches), so QEMU and its libraries come from the disk, too."
        if samples.all
        else "The layers' pages were dropped from the page cache (posix_fadvise); QEMU and its libraries were left there, for only root can drop everything."
    )
    fork = (
        "The fork's time with a cold and with a warm page cache is from the request to start another child of a saved instant: its parent's saving is "
        "not in it."
    )
    build = (
        f"The build writes and reads {arguments.build} MiB of files made of the image's, and has a program use half as much memory; one machine is then "
        "hibernated as it is, another slimmed: it writes back and drops its caches and gives back what is free in it. The files are on the disk in either case."
    )
    return [what, cold, fork, build, *filter(None, [bed.idleness(share)])]
