"""Files: copies in and out, and the small things one does to them."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ramet.cli import text
from ramet.cli.base import Json, User, app, client, machine, names, perform
from ramet.cli.group import Group
from ramet.errors import HostError, SpecError
from ramet.model import FileInfo, FileType
from ramet.units import format_size

if TYPE_CHECKING:
    from ramet.aio import AsyncMachine
    from ramet.extract import Report

CHUNK = 256 << 10
_LETTERS = {
    FileType.DIRECTORY: "d",
    FileType.LINK: "l",
    FileType.CHARACTER: "c",
    FileType.BLOCK: "b",
    FileType.FIFO: "p",
    FileType.SOCKET: "s",
}

files = typer.Typer(cls=Group, no_args_is_help=True, help="Look at, move and remove files of a machine.")
app.add_typer(files, name="files")


def _places(incomplete: str) -> list[str]:
    return [f"{name}:" for name in names(incomplete)] if ":" not in incomplete else []


Place = Annotated[str, typer.Argument(help="NAME:PATH", autocompletion=_places, show_default=False)]


def split(place: str) -> tuple[str, str] | None:
    """Machine and path of NAME:PATH; None for a path of this host (write ./a:b for one with a colon)."""
    name, colon, path = place.partition(":")
    return (name, path or ".") if colon and name and "/" not in name and name != "." else None


def guest(place: str) -> tuple[str, str]:
    found = split(place)
    if not found:
        raise SpecError(f"{place!r} names no machine", hint="Write NAME:PATH.")
    return found


@app.command()
def cp(
    source: Annotated[str, typer.Argument(help="NAME:PATH, or a path here, or - for stdin.", autocompletion=_places, show_default=False)],
    target: Annotated[str, typer.Argument(help="NAME:PATH, or a path here, or - for stdout.", autocompletion=_places, show_default=False)],
    user: User = "",
    json: Json = False,
) -> None:
    """Copy a file or a directory into a machine or out of it. A target that is a directory gets it inside, as with cp."""

    async def work() -> None:
        origin, place = split(source), split(target)
        if bool(origin) == bool(place):
            raise SpecError(
                f"{'both' if origin else 'neither'} of {source} and {target} are in a machine",
                hint="One must be NAME:PATH, the other a path here.",
            )
        name, path = origin or place or ("", "")
        async with machine(name) as found:
            report = await (_out(found, path, target, user) if origin else _into(found, source, path, user))
        if report:
            for skipped, reason in report.skipped[:20]:
                text.note(f"left out: {text.clean(skipped)} ({text.clean(reason)})")
            if (more := len(report.skipped[20:]) + report.more) > 0:
                text.note(f"left out: {more} more")
        if json:
            text.as_json({"source": source, "target": target} | ({"files": report.files, "bytes": report.size} if report else {}))

    perform(work, json=json)


async def _into(found: AsyncMachine, source: str, path: str, user: str) -> None:
    from ramet.cli.progress import copying

    if source == "-":
        await found.files.write(path, _stdin(), user=user)
        return
    local = Path(source)
    if not local.exists():
        raise HostError(f"there is no {source} here")
    if path.endswith("/") or await found.files.is_dir(path, user=user):
        path = f"{path.rstrip('/')}/{local.resolve().name}"
    await copying(local.name, lambda moved: found.files.upload(local, path, user=user, progress=moved))


async def _out(found: AsyncMachine, path: str, target: str, user: str) -> Report | None:
    from ramet.cli.progress import copying

    if target == "-":
        from ramet.cli.terminal import STDOUT, printer

        write = printer(STDOUT)
        async for part in found.files.stream(path, user=user):
            await write(part)
        return None
    local = Path(target)
    if target.endswith("/") or local.is_dir():
        name = os.path.basename(path.rstrip("/"))  # noqa: PTH119  (the guest's path)
        local = local / (name if name not in ("", ".", "..") else found.name)
        local.parent.mkdir(parents=True, exist_ok=True)
    return await copying(local.name, lambda moved: found.files.download(path, local, user=user, progress=moved))


async def _stdin() -> AsyncIterator[bytes]:
    from ramet.cli.terminal import Reader

    reader = Reader(sys.stdin.fileno())
    while data := await reader.read():
        yield data


@files.command()
def ls(place: Place, user: User = "", json: Json = False) -> None:
    """The entries of a directory."""

    async def work() -> None:
        name, path = guest(place)
        async with client() as verbs:
            found = await verbs.list_files(name, path, user=user)
        if json:
            text.as_json(found)
        elif found:
            text.say("\n".join(text.table(("MODE", "OWNER", "SIZE", "AGE", "NAME"), [_row(info) for info in found], give=4)))

    perform(work, json=json)


def _row(info: FileInfo) -> tuple[str, ...]:
    arrow = f" → {text.clean(info.target)}" if info.target else ""
    return (
        f"{_LETTERS.get(info.type, '-')} {info.mode:04o}",
        f"{info.uid}:{info.gid}",
        format_size(info.size),
        text.age(info.modified_at),
        text.clean(info.name) + arrow,
    )


@files.command()
def stat(place: Place, user: User = "", json: Json = False) -> None:
    """What a path is."""

    async def work() -> None:
        name, path = guest(place)
        async with client() as verbs:
            info = await verbs.stat_file(name, path, user=user)
        if json:
            text.as_json(info)
        else:
            text.say("\n".join(text.table(("MODE", "OWNER", "SIZE", "AGE", "NAME"), [_row(info)], give=4)))

    perform(work, json=json)


@files.command()
def rm(
    place: Place,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="With all that a directory holds.")] = False,
    user: User = "",
) -> None:
    """Remove a file or a directory."""

    async def work() -> None:
        name, path = guest(place)
        async with client() as verbs:
            await verbs.remove_file(name, path, recursive=recursive, user=user)

    perform(work)


@files.command()
def mv(place: Place, target: Annotated[str, typer.Argument(help="The new path, in the same machine.")], user: User = "") -> None:
    """Rename or move within one file system."""

    async def work() -> None:
        name, path = guest(place)
        other = split(target)
        if other and other[0] != name:
            raise SpecError(f"{target} is in another machine", hint="`ramet cp` copies out of one and into the other.")
        async with client() as verbs:
            await verbs.rename_file(name, path, other[1] if other else target, user=user)

    perform(work)


@files.command()
def mkdir(place: Place, mode: Annotated[str, typer.Option(help="Permission bits, octal.")] = "0755", user: User = "") -> None:
    """Make a directory, and those above it."""

    async def work() -> None:
        name, path = guest(place)
        try:
            bits = int(mode, 8)
        except ValueError:
            raise SpecError(f"{mode!r} is not a file mode", hint="Write octal permission bits, such as 0755.") from None
        async with client() as verbs:
            await verbs.make_dir(name, path, mode=bits, user=user)

    perform(work)
