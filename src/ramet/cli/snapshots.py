"""Instants: fork, pause, hibernate, snapshot, rewind; templates."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from ramet.cli import text
from ramet.cli.base import SNAPSHOT_MARKS, Json, Name, OptionalName, SnapshotName, app, client, names, own_name, perform, snapshot_names
from ramet.cli.machines import paint_name, took
from ramet.errors import NotFoundError, SpecError, from_wire
from ramet.model import ForkOutcome, Machine, Snapshot, SnapshotState
from ramet.units import format_size

if TYPE_CHECKING:
    from ramet.client import Client


@app.command()
def fork(
    name: Name,
    children: Annotated[
        list[str] | None, typer.Argument(help="Their names; NAME-1, NAME-2… when left out.", metavar="CHILD", show_default=False)
    ] = None,
    count: Annotated[int | None, typer.Option("--count", "-n", min=1, help="How many; 1 when left out.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Make machines that go on from a running one's present instant: its programs, memory and disk, shared until written.

    It stands still for some milliseconds. The exit status tells when some of them failed; the others live.

    Example: ramet fork shop -n 3
    """
    wanted = tuple(children or ())

    async def work() -> int:
        from ramet.cli.progress import steps

        if wanted and count not in (None, len(wanted)):
            raise SpecError(f"--count {count} and {len(wanted)} names do not fit together", hint="Give one of the two.")
        async with client() as verbs, steps(verbs, name):
            outcomes = await verbs.fork(name, count=count or 1, names=wanted)
        if json:
            text.as_json(outcomes)
        else:
            _say_outcomes(outcomes)
        return next((from_wire(each.error or {}).exit for each in outcomes if not each.machine), 0)

    if status := perform(work, json=json):
        raise typer.Exit(status)


def _say_outcomes(outcomes: list[ForkOutcome]) -> None:
    wide = max(len(each.name) for each in outcomes)
    for each in outcomes:
        padding = " " * (wide - len(each.name) + 2)
        if each.machine:
            text.say(f"{paint_name(each.machine)}{padding}{each.machine.state}  {took(each.machine)}".rstrip())
        else:
            error = from_wire(each.error or {})
            hint = f" {error.hint}" if error.hint else ""
            text.note(f"{each.name}{padding}{text.paint('failed', text.RED, sys.stderr)}  {text.clean(error.message)}.{hint}")


@app.command()
def pause(name: OptionalName = "", json: Json = False) -> None:
    """Stop a machine's cpus. Its memory stays where it is.

    Example: ramet pause shop
    """

    async def work() -> None:
        async with client() as verbs:
            machine = await verbs.pause(own_name(name))
        text.as_json(machine) if json else text.say(f"{machine.name} is paused; `ramet resume {machine.name}` lets it go on.")

    perform(work, json=json)


@app.command()
def resume(name: OptionalName = "", json: Json = False) -> None:
    """Let a paused or hibernated machine go on from the same instant.

    Example: ramet resume shop
    """

    async def work() -> None:
        from ramet.cli.progress import steps

        which = own_name(name)
        async with client() as verbs, steps(verbs, which):
            machine = await verbs.resume(which)
        text.as_json(machine) if json else text.say(f"{paint_name(machine)} runs again.")

    perform(work, json=json)


@app.command()
def hibernate(
    name: OptionalName = "",
    no_slim: Annotated[
        bool, typer.Option("--no-slim", help="Keep its caches: more on the disk, and its files are in memory when it goes on.")
    ] = False,
    json: Json = False,
) -> None:
    """Save a machine to the disk and give its memory back to this computer. `ramet resume` goes on from the same instant.

    Before, it drops its caches and gives back the memory that is free in it, so that these are not saved.

    Example: ramet hibernate shop
    """

    async def work() -> None:
        from ramet.cli.progress import steps

        which, began = own_name(name), time.monotonic()
        async with client() as verbs:
            async with steps(verbs, which):
                machine = await verbs.hibernate(which, slim=not no_slim)
            seconds = time.monotonic() - began
            kept = None if json else await verbs.get_snapshot(machine.snapshot)
        if kept:
            text.say(f"{machine.name} is hibernated: {_kept(kept)}, {seconds:.1f} s; `ramet resume {machine.name}` lets it go on.")
        else:
            text.as_json(machine)

    perform(work, json=json)


def _kept(saved: Snapshot) -> str:
    """What a hibernated machine takes, and what it did not have to."""
    slimmed = (
        f" ({format_size(saved.slimmed)} of {format_size(saved.slimmed + saved.saved)} were caches and free memory)"
        if saved.slimmed
        else ""
    )
    return f"{format_size(saved.stored)} on disk{slimmed}"


@app.command()
def snapshot(
    name: Name,
    label: Annotated[str, typer.Argument(help="It is called NAME@LABEL; a number when left out.", show_default=False)] = "",
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Only the disk: machines made from it boot.")] = False,
    no_test: Annotated[bool, typer.Option("--no-test", help="Call it ready without having started it once.")] = False,
    json: Json = False,
) -> None:
    """Keep a machine's present instant, to go back to or to make others from.

    Example: ramet snapshot shop before-upgrade
    """

    async def work() -> None:
        from ramet.cli.progress import steps

        async with client() as verbs, steps(verbs, name):
            kept = await verbs.snapshot(name, label, memory=not no_memory, test=not no_test)
        if json:
            text.as_json(kept)
            return
        still = f" It stood still for {1000 * kept.pause:.0f} ms." if kept.pause is not None else ""
        text.say(f"{text.paint(kept.name, text.BOLD)} is kept.{still}")
        if not no_test and kept.state is not SnapshotState.READY:
            text.say("  It is started once in the background before it counts as ready: `ramet snapshots` tells.")
        text.say(f"  ramet restore {kept.machine} {kept.name}")
        text.say(f"  ramet create --from {kept.name} NAME")

    perform(work, json=json)


@app.command()
def snapshots(
    name: Annotated[
        str, typer.Argument(help="Only this machine's, the automatic ones too.", autocompletion=names, show_default=False)
    ] = "",
    json: Json = False,
) -> None:
    """Snapshots and templates: their state, what they take on the disk, how many machines a template keeps ready, and what is still only in a registry.

    Example: ramet snapshots shop
    """

    async def work() -> None:
        async with client() as verbs:
            found = await verbs.snapshots(name)
        if json:
            text.as_json(found)
        elif found:
            _table(found)
        else:
            text.note(f"There are no snapshots{f' of {name}' if name else ''}. `ramet snapshot {name or 'NAME'}` makes one.")

    perform(work, json=json)


def _table(found: list[Snapshot]) -> None:
    heads = ["NAME", "STATE", "MEMORY", "STORED", "AGE", "POOL"]
    rows = [
        [
            *(each.title, each.state, "yes" if each.memory else "no", format_size(each.stored)),
            *(text.age(each.created_at), f"{each.pooled} of {each.pool}" if each.pool else ""),
        ]
        for each in found
    ]
    if any(each.absent for each in found):
        heads.append("ABSENT")
        rows = [[*row, format_size(each.absent) if each.absent else ""] for row, each in zip(rows, found, strict=True)]
    lines = text.table(heads, rows, paints=[text.colour_of(each.state) for each in found])
    text.say(lines[0])
    for each, line in zip(found, lines[1:], strict=True):
        text.say(line)
        if each.reason:
            text.say(text.paint(f"  {text.clean(each.reason)}"[: text.width()], text.colour_of(each.state)))


@app.command()
def restore(
    name: Name,
    snapshot: Annotated[
        str,
        typer.Argument(help="A snapshot's name or id, or only the label; the last one when left out.", autocompletion=snapshot_names,
                       show_default=False),
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be lost.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Rewind a machine in place: it keeps its name and address, and loses what it did since.

    Example: ramet restore shop before-upgrade
    """

    async def work() -> Machine | None:
        from ramet.cli.progress import steps

        async with client() as verbs:
            machine = await verbs.get(name)
            target = await _target(verbs, machine, snapshot)
            lost = _lost(machine, target)
            if dry_run:
                text.as_json({"machine": machine.name, "snapshot": target.title, "lost": lost}) if json else text.say(lost)
                return None
            if not yes:
                _ask(lost)
            async with steps(verbs, machine.name):
                return await verbs.restore(machine.name, target.title)

    rewound = perform(work, json=json)
    if rewound and json:
        text.as_json(rewound)
    elif rewound:
        ready = took(rewound, booted=False)
        text.say(f"{paint_name(rewound)} is as it was at {rewound.snapshot}{f' ({ready})' if ready else ''}.")


async def _target(verbs: Client, machine: Machine, wanted: str) -> Snapshot:
    """The snapshot that was meant: the label of one of the machine's own, a whole name, an id, or nothing for the last one."""
    if not wanted and not machine.snapshot:
        raise NotFoundError(f"{machine.name} has no snapshot to go back to", hint=f"`ramet snapshot {machine.name}` makes one.")
    if not wanted or any(mark in wanted for mark in SNAPSHOT_MARKS):
        return await verbs.get_snapshot(wanted or machine.snapshot)
    try:
        return await verbs.get_snapshot(f"{machine.name}@{wanted}")
    except NotFoundError:
        return await verbs.get_snapshot(wanted)


def _lost(machine: Machine, target: Snapshot) -> str:
    """What rewinding costs, in words. How much was written is only known since the last snapshot."""
    label = target.name or f"the automatic snapshot {target.id}"
    said = f"{machine.name} goes back to {label}, {text.age(target.created_at)} ago: what it did since is lost"
    if machine.usage and machine.usage.disk:
        said += f" ({format_size(machine.usage.disk)} on its disk since it was last saved)"
    return said + ("." if target.memory else "; the snapshot has no memory, so it boots.")


def _ask(lost: str) -> None:
    if not sys.stdin.isatty():
        raise SpecError(lost.rstrip("."), hint="--yes does it; there is no terminal here to ask on.")
    typer.confirm(f"{lost}\nGo back?", abort=True, err=True)


@app.command()
def template(
    snapshot: SnapshotName,
    label: Annotated[str, typer.Argument(help="Its new name, such as shop:1.2; without a tag it gets :latest.", show_default=False)] = "",
    pool: Annotated[int, typer.Option("--pool", min=0, help="How many machines to keep restored and parked for the next who ask.")] = 0,
    json: Json = False,
) -> None:
    """Make a snapshot a template: a name that machines are made from, with some kept ready.

    Example: ramet template shop@warm shop:1.2 --pool 2
    """

    async def work() -> None:
        async with client() as verbs:
            made = await verbs.template(snapshot, label=label, pool=pool)
        if json:
            text.as_json(made)
            return
        ready = f", and {pool} machine{'s are' if pool > 1 else ' is'} kept ready" if pool else ""
        text.say(f"{text.paint(made.name, text.BOLD)} is a template{ready}.\n  ramet create --from {made.name} NAME")

    perform(work, json=json)
