"""Changing what a machine that is there may cost."""

from __future__ import annotations

from typing import Annotated

import typer

from ramet.cli import text
from ramet.cli.base import Json, Name, app, client, perform
from ramet.errors import SpecError
from ramet.model import Machine, Reclaim, State
from ramet.units import format_size, parse_size


@app.command()
def update(
    name: Name,
    memory: Annotated[
        str, typer.Option(help="What it may use, as `256M`; at most what it was made with, and 0 is all of that.", show_default=False)
    ] = "",
    reclaim: Annotated[
        str, typer.Option(help="How hard it gives back what it does not use: off, gentle or eager.", show_default=False)
    ] = "",
    json: Json = False,
) -> None:
    """Change what a machine may cost, while it runs; one that does not run keeps to it from its next start on.

    Example: ramet update shop --memory 256M --reclaim eager
    """

    async def work() -> None:
        if not memory and not reclaim:
            raise SpecError("nothing to change", hint="`--memory 256M`, `--reclaim eager`, or both.")
        try:
            size = parse_size(memory) if memory else None
        except ValueError as error:
            raise SpecError(f"--memory {error}") from None
        if reclaim and reclaim not in list(Reclaim):
            raise SpecError(f"--reclaim {reclaim!r} is not one of {', '.join(Reclaim)}")
        async with client() as verbs:
            machine = await verbs.update(name, memory=size, reclaim=Reclaim(reclaim) if reclaim else None)
        text.as_json(machine) if json else text.say("\n".join(_said(machine, memory=bool(memory), reclaim=bool(reclaim))))

    perform(work, json=json)


def _said(machine: Machine, *, memory: bool, reclaim: bool) -> list[str]:
    lines = []
    if memory:
        lines.append(f"{machine.name} may use {format_size(machine.memory_limit or machine.spec.memory)} of memory{_when(machine)}")
    if reclaim:
        lines.append(f"{machine.name} gives back what it does not use: {machine.spec.reclaim}.")
    return lines


def _when(machine: Machine) -> str:
    """Whether the guest is where it was asked to be."""
    size, has = machine.memory_limit or machine.spec.memory, machine.memory_granted
    if machine.state is State.PAUSED and has != size:
        return " as soon as it runs again."
    if machine.state is not State.RUNNING or has is None:
        return " from its next start on."
    if has > size:
        return f", but needs more now: it has {format_size(has)}."
    return "." if has == size else f"; it has {format_size(has)} so far."
