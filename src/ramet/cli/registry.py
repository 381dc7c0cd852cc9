"""Snapshots to registries and from them; what is kept here: given up again, and checked."""

from __future__ import annotations

from typing import Annotated

import typer

from ramet.cli import text
from ramet.cli.base import SNAPSHOT_MARKS, Json, SnapshotName, app, client, perform
from ramet.errors import SpecError
from ramet.storage import Collected, Transfer
from ramet.units import format_size, parse_size

Lazy = Annotated[bool, typer.Option("--lazy", help="Without its content: that comes when it is needed, and in the background.")]


@app.command()
def push(
    snapshot: SnapshotName,
    reference: Annotated[str, typer.Argument(help="Where to: REGISTRY/NAME:TAG.", show_default=False)],
    json: Json = False,
) -> None:
    """Send a snapshot or template to an OCI registry. What is there already is not sent again.

    Who may pull it can read its disk and its memory: secrets of its programs are in both.

    Example: ramet push shop@warm ghcr.io/acme/shop:warm
    """

    async def work() -> None:
        from ramet.cli.progress import steps

        async with client() as verbs, steps(verbs, reference):
            done = await verbs.push(snapshot, reference)
        if json:
            text.as_json(done)
            return
        text.say(f"{text.paint(done.snapshot, text.BOLD)} is at {done.reference}: {_moved(done, 'sent', 'was there already')}.")
        text.say(f"  {done.digest}\n  ramet create --from {done.reference} NAME")

    perform(work, json=json)


@app.command()
def pull(
    reference: Annotated[str, typer.Argument(help="REGISTRY/NAME:TAG, or …@DIGEST.", show_default=False)],
    lazy: Lazy = False,
    json: Json = False,
) -> None:
    """Have a snapshot of a registry here. `ramet create --from` of one that is not here pulls it by itself, as with --lazy.

    Example: ramet pull --lazy ghcr.io/acme/shop:warm
    """

    async def work() -> None:
        from ramet.cli.progress import steps

        async with client() as verbs, steps(verbs, reference):
            done = await verbs.pull(reference, lazy=lazy)
        if json:
            text.as_json(done)
            return
        text.say(f"{text.paint(done.snapshot, text.BOLD)} is here: {_moved(done, 'fetched', 'was here already')}.")
        if lazy and done.size > done.moved + done.shared:
            text.say(f"  {format_size(done.size - done.moved - done.shared)} more come when they are needed, and in the background.")
        text.say(f"  ramet create --from {done.snapshot} NAME")

    perform(work, json=json)


def _moved(done: Transfer, how: str, else_: str) -> str:
    shared = f", {format_size(done.shared)} {else_}" if done.shared else ""
    return f"{format_size(done.moved)} {how}{shared}, {done.seconds:.1f} s"


@app.command()
def convert(
    image: Annotated[str, typer.Argument(help="debian:SUITE, an OCI image, oci:DIRECTORY or docker-archive:FILE.", show_default=False)],
    name: Annotated[str, typer.Argument(help="The template's; the image's own when left out.", show_default=False)] = "",
    json: Json = False,
) -> None:
    """Make an image a template, which can be pushed: elsewhere machines start from it before all of it is fetched.

    Example: ramet convert alpine:3 acme/alpine:3
    """

    async def work() -> None:
        from ramet.cli.progress import steps

        wanted = image if any(mark in image for mark in SNAPSHOT_MARKS) else f"{image}:latest"
        async with client() as verbs, steps(verbs, wanted):
            made = await verbs.convert(wanted, name)
        if json:
            text.as_json(made)
            return
        text.say(f"{text.paint(made.name, text.BOLD)} is a template.")
        text.say(f"  ramet push {made.name} REGISTRY/NAME:TAG\n  ramet create --from {made.name} NAME")

    perform(work, json=json)


@app.command()
def gc(
    budget: Annotated[
        str,
        typer.Option(help="How much all layers may take, such as 20G: beyond it, chunks that a registry has too go.", show_default=False),
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    json: Json = False,
) -> None:
    """Remove what no snapshot and no machine needs. The daemon does this by itself as soon as something is deleted.

    Chunks that go are fetched again when they are needed. What only this computer has never goes.

    Example: ramet gc --budget 20G
    """

    async def work() -> None:
        async with client() as verbs:
            done = await verbs.gc(budget=_size(budget), dry_run=dry_run)
        text.as_json(done) if json else _say_collected(done, dry_run=dry_run)

    perform(work, json=json)


def _size(budget: str) -> int | None:
    try:
        return parse_size(budget) if budget else None
    except ValueError as error:
        raise SpecError(f"--budget {error}") from None


def _say_collected(done: Collected, *, dry_run: bool) -> None:
    would = "would be " if dry_run else ""
    for layer in done.layers:
        text.say(f"layer {layer} {would or 'is '}removed")
    for blob in done.blobs:
        text.say(f"blob {blob} {would or 'is '}removed")
    for each in done.postponed:
        text.note(f"note: {text.clean(each)}.")
    evicted = f", {format_size(done.evicted)} of it chunks that a registry has too" if done.evicted else ""
    text.say(f"{format_size(done.bytes)} {would}given back{evicted}; layers {would and 'would '}take {format_size(done.stored)}.")


@app.command()
def fsck(
    repair: Annotated[bool, typer.Option("--repair", help="Remove what can be fetched or made again, and nothing else.")] = False,
    json: Json = False,
) -> None:
    """Check all that is kept: layers, snapshots, images, the database. Exit status 1 when something is wrong.

    Example: ramet fsck --repair
    """

    async def work() -> int:
        async with client() as verbs:
            wrong = await verbs.fsck(repair=repair)
        if json:
            text.as_json(wrong)
        else:
            text.say("\n".join(map(text.clean, wrong)) or "Nothing is wrong.")
        return 1 if wrong else 0

    if status := perform(work, json=json):
        raise typer.Exit(status)
