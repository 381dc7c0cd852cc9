"""What forks of a warmed machine cost the host in memory, beside machines that were booted and warmed each on its own."""

from __future__ import annotations

import argparse
import statistics
from collections import Counter

from ramet.bench import bed, members
from ramet.bench.bed import Bed
from ramet.bench.figures import Figure, Report, distribution, limit
from ramet.errors import HostError

FORKS, COLD = 16, 4
PRIVATE, SHARE = 6.0, 0.35  # MiB of each fork; of the cold machines' PSS
MEBIBYTES, ROWS = 64, 50_000  # what the program holds: files in a tmpfs, and a table in a process
_MIB = 1 << 20
_RESERVE = 1.5  # of a cold machine's memory that must be free for another one
_PARENT = "warm"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--forks", type=int, default=FORKS, help="how many are forked (default: %(default)s)")
    parser.add_argument(
        "--cold",
        type=int,
        default=COLD,
        help="how many are booted beside them; more, up to the forks, need their memory (default: %(default)s)",
    )
    parser.add_argument("--mebibytes", type=int, default=MEBIBYTES, help="data that each machine holds (default: %(default)s)")


async def warm(found: Bed, name: str, mebibytes: int) -> bool:
    """A machine whose programs hold data. False: it holds files only, for the image has no Perl."""
    await members.filled(found.engine, name, mebibytes)
    rich = await members.programmed(found.engine, name, ROWS * mebibytes // MEBIBYTES)
    await members.first_command(found.engine, name)
    return rich


async def look(found: Bed, names: list[str]) -> list[Counter[str]]:
    """Bytes of PSS of each, by kind, all of them alive."""
    seen = []
    for name in names:
        machine = await found.engine.get(name)
        if not machine.pid:
            raise HostError(f"{name} is {machine.state}: {machine.reason}")
        seen.append(members.memory(machine.pid, machine.spec.memory, found.state.store.mount))
    return seen


async def booted(found: Bed, arguments: argparse.Namespace) -> list[Counter[str]]:
    """Machines that were booted and warmed each on its own; as many as asked for, or fit."""
    names: list[str] = []
    for number in range(max(1, arguments.cold)):
        if names and (await found.engine.info()).memory_available < _RESERVE * bed.spec("", "").memory:
            break
        names.append(f"cold-{number}")
        await found.engine.create(bed.spec(names[-1], arguments.image))
        await warm(found, names[-1], arguments.mebibytes)
    seen = await look(found, names)
    for name in names:
        await found.engine.delete(name)
    return seen


async def run(arguments: argparse.Namespace) -> Report:
    async with bed.place() as state, bed.opened(state) as found:
        colds = await booted(found, arguments)
        await found.engine.create(bed.spec(_PARENT, arguments.image))
        rich = await warm(found, _PARENT, arguments.mebibytes)
        outcomes = await found.engine.fork(_PARENT, count=arguments.forks)
        if failed := [each.error for each in outcomes if each.error]:
            raise HostError(f"{len(failed)} of {len(outcomes)} forks did not start: {failed[0]['message']}")
        for outcome in outcomes:
            await members.first_command(found.engine, outcome.name)
        await members.settled(found.engine)
        forks = await look(found, [outcome.name for outcome in outcomes])
        return Report(
            header=found.header, figures=tuple(_figures(forks, colds)), notes=tuple(_notes(arguments, rich, len(forks), len(colds)))
        )


def _figures(forks: list[Counter[str]], colds: list[Counter[str]]) -> list[Figure]:
    shared, alone = (sum(each.total() for each in those) / _MIB for those in (forks, colds))
    scaled = alone / len(colds) * len(forks)
    owns = [each[members.OWN] / _MIB for each in forks]
    return [
        limit("memory that a fork shares with nobody, beyond what its QEMU itself needs (the largest)", max(owns), "MiB", PRIVATE),
        distribution("the same, of all forks", owns, "MiB"),
        limit(f"PSS of {len(forks)} forks, as a share of that of as many cold boots", shared / scaled, "x", SHARE),
        Figure(figure=f"PSS of {len(forks)} forks", value=shared, unit="MiB"),
        Figure(figure=f"PSS of {len(colds)} cold boots", value=alone, unit="MiB"),
        *(_mean(f"a fork: {kind}", forks, kind) for kind in members.KINDS),
        *(_mean(f"a cold boot: {kind}", colds, kind) for kind in members.KINDS),
    ]


def _mean(figure: str, those: list[Counter[str]], kind: str) -> Figure:
    return Figure(figure=figure, value=statistics.mean(each[kind] for each in those) / _MIB, unit="MiB")


def _notes(arguments: argparse.Namespace, rich: bool, forks: int, colds: int) -> list[str]:
    table = (
        f", and a Perl process holds a table of {ROWS * arguments.mebibytes // MEBIBYTES} rows"
        if rich
        else "; there is no Perl in this image"
    )
    same = (
        f"Each machine holds {arguments.mebibytes} MiB of the image's files in a tmpfs{table}. The cold ones were booted and warmed one by one; the forks come "
        "from one machine that was warmed the same way, and ran one command each, which is what they have pages of their own of."
    )
    scaled = f"{colds} cold machines were booted, and their PSS was scaled to {forks}." if colds != forks else ""
    pss = (
        "PSS counts a page that several map as that part of it which is each one's. The rows below the sums are means. The compressed layers that "
        "the host may have in its page cache are in neither sum."
    )
    return [same, *filter(None, [scaled]), pss]
