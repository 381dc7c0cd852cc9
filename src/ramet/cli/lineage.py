"""Who descends from whom: the tree, drawn, and taking members out of it."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from typing import TYPE_CHECKING, Annotated

import typer

from ramet.cli import text
from ramet.cli.base import SNAPSHOT_MARKS, Json, app, client, member_names, perform
from ramet.errors import DependentsError, NotFoundError
from ramet.model import Machine, NodeKind, Snapshot, TreeNode, Usage
from ramet.units import format_size

if TYPE_CHECKING:
    from ramet.client import Client

_HEADS = ("NAME", "STATE", "OWN MEM", "MEMORY", "OWN DISK", "DISK")
_REST = 56  # characters of the other columns at their widest
_BRANCHES = 12  # characters of branches that a name always has room for beside it; the rest of a deep tree's are cut at the left


@app.command()
def tree(json: Json = False) -> None:
    """Draw who descends from whom, and what each member costs.

    MEMORY and DISK count with what is its own its part of what several share, so that they add up to what is really used; OWN is what
    it shares with nobody. A snapshot without a name is there for the machines that came from it: they have its part. Machines that wait in a pool count
    as their template's.

    Example: ramet tree
    """

    async def work() -> None:
        async with client() as verbs:
            found = await verbs.tree()
        if json:
            text.as_json(found)
        elif found:
            text.say("\n".join(draw(found)))
        else:
            text.note("There are no machines. `ramet create NAME` makes one.")

    perform(work, json=json)


def draw(nodes: list[TreeNode]) -> list[str]:
    """Lines of the tree, its columns aligned. Members whose parent is not among them are drawn as roots."""
    placed = _placed(nodes)
    room = max(_BRANCHES, text.width() - _REST - max(len(_name(node)) for node in nodes))
    rows = [_row(branch if len(branch) <= room else "…" + branch[1 - room :], node) for branch, node in placed]
    if sum(1 for node in nodes if node.usage) > 1:
        rows.append(_sum(nodes))
    paints = ["" if node.gone else text.colour_of(node.state) for _, node in placed] + [""] * (len(rows) - len(placed))
    lines = text.table(_HEADS, rows, paints=paints)
    dimmed = [text.paint(line, text.DIM) if node.gone else line for line, (_, node) in zip(lines[1:], placed, strict=False)]
    return [lines[0], *dimmed, *lines[1 + len(placed) :]]


def _placed(nodes: list[TreeNode]) -> list[tuple[str, TreeNode]]:
    """The members in the order they are drawn, each with the branches before its name. Not recursive: a chain may be long."""
    known = {node.id for node in nodes}
    below: defaultdict[str, list[TreeNode]] = defaultdict(list)
    for node in nodes:
        below[node.parent if node.parent in known else ""].append(node)
    placed = []
    waiting = [("", "", node) for node in reversed(below[""])]
    while waiting:
        branch, stem, node = waiting.pop()
        placed.append((branch, node))
        children = below[node.id]
        for child in reversed(children):
            last = child is children[-1]
            waiting.append((stem + ("└─ " if last else "├─ "), stem + ("   " if last else "│  "), child))
    return placed


def _name(node: TreeNode) -> str:
    return text.clean(node.name or node.id) + (" (deleted)" if node.gone else "")


def _row(branch: str, node: TreeNode) -> tuple[str, ...]:
    costs = [format_size(cost) for cost in _costs(node.usage)] if node.usage else [""] * 4
    if node.usage and node.kind is NodeKind.SNAPSHOT and not node.usage.memory:
        costs[:2] = ["", ""]  # nothing waits in a pool of it
    return branch + _name(node), node.state, *costs


def _costs(usage: Usage) -> tuple[int, ...]:
    """Of memory and disk: its own, and with its part of what several share."""
    return usage.private, usage.memory, usage.disk_unique, usage.disk_unique + usage.disk_shared


def _sum(nodes: list[TreeNode]) -> tuple[str, ...]:
    costs = [_costs(node.usage) for node in nodes if node.usage]
    return "together", "", *(format_size(sum(column)) for column in zip(*costs, strict=True))


@app.command()
def delete(
    names: Annotated[list[str], typer.Argument(help="Machines' and snapshots' names.", autocompletion=member_names, show_default=False)],
    cascade: Annotated[bool, typer.Option("--cascade", help="With a snapshot also the machines and snapshots that stand on it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    json: Json = False,
) -> None:
    """Remove machines and their disks, whatever they are doing, and snapshots.

    Example: ramet delete shop-1 shop@before-upgrade
    """

    async def work() -> None:
        gone: list[dict[str, object]] = []

        def tell(name: str, more: str = "", **known: object) -> None:
            gone.append({"name": name, **known, "deleted": not dry_run})
            if not json:
                text.say(f"{text.clean(name)} {'would be' if dry_run else 'is'} deleted{more}.")

        async with client() as verbs:
            found = [
                await _member(verbs, name) for name in dict.fromkeys(names)
            ]  # all before the first: a slip of the keyboard deletes nothing
            for machine in [each for each in found if isinstance(each, Machine)]:
                if not dry_run:
                    await verbs.delete(machine.name)
                used = f", {format_size(machine.usage.disk)} on disk" if machine.usage else ""
                tell(machine.name, f" ({machine.state}{used})", id=machine.id)
            # the youngest first: the older ones may be what they stand on
            kept = sorted((each for each in found if isinstance(each, Snapshot)), key=lambda each: each.created_at, reverse=True)
            told = {entry["name"] for entry in gone}
            for snapshot in kept:
                for name in await _delete(verbs, snapshot, cascade=cascade, dry_run=dry_run, going={each.name for each in found}):
                    if name not in told:
                        told.add(name)
                        tell(name, **({"id": snapshot.id} if name in (snapshot.name, snapshot.id) else {}))
        if json:
            text.as_json(gone)

    perform(work, json=json)


async def _delete(verbs: Client, snapshot: Snapshot, *, cascade: bool, dry_run: bool, going: set[str]) -> list[str]:
    """What went, or would. A dry run deleted nothing so far, so what else is `going` still stands on it."""
    which = snapshot.title
    try:
        return await verbs.delete_snapshot(which, cascade=cascade, dry_run=dry_run)
    except DependentsError as error:
        if dry_run and set(error.details.get("dependents", [which])) <= going:
            return [which]
        raise


async def _member(verbs: Client, name: str) -> Machine | Snapshot:
    """A machine, or a snapshot: by its name, which no machine can have, or by its id."""
    if any(mark in name for mark in SNAPSHOT_MARKS):
        return await verbs.get_snapshot(name)
    try:
        return await verbs.get(name)
    except NotFoundError:
        with contextlib.suppress(NotFoundError):
            found = await verbs.get_snapshot(name)
            if found.id == name:  # where a plain name is short for a template's, a machine's name that is not there must not delete that
                return found
        raise
