"""Layers: look at, check, take out as raw images."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from ramet.cli import text
from ramet.cli.base import Json, app, client, layer_ids, perform
from ramet.cli.group import Group
from ramet.errors import HostError, LayerError, NoSpaceError, SpecError
from ramet.storage import LayerInfo
from ramet.units import format_size

BLOCK = 4096  # bytes: what file systems allocate, and a page of memory
_ZEROS = bytes(BLOCK)

layer = typer.Typer(cls=Group, no_args_is_help=True, help="The layers that snapshots are made of.")
app.add_typer(layer, name="layer")

LayerId = Annotated[str, typer.Argument(help="A layer's id.", metavar="ID", autocompletion=layer_ids, show_default=False)]


@layer.command()
def ls(json: Json = False) -> None:
    """All layers: what they hold, what they take on the disk, how many their pages come from.

    Example: ramet layer ls
    """

    async def work() -> None:
        async with client() as verbs:
            found = await verbs.layers()
        if json:
            text.as_json(found)
        elif found:
            heads = ("ID", "KIND", "SIZE", "DATA", "STORED", "CHAIN", "AGE", "USED BY")
            text.say("\n".join(text.table(heads, [_row(each) for each in found], give=7)))
        else:
            text.note("There are no layers. `ramet snapshot NAME` makes some.")

    perform(work, json=json)


def _row(each: LayerInfo) -> tuple[str, ...]:
    return (
        *(each.id, each.kind, format_size(each.size), format_size(each.data), format_size(each.stored)),
        *(str(len(each.chain)), text.age(each.created_at), text.clean(", ".join(each.used_by))),
    )


@layer.command()
def show(which: LayerId, json: Json = False) -> None:
    """One layer in detail.

    Example: ramet layer show 5f0c2a9be1d47763
    """

    async def work() -> None:
        async with client() as verbs:
            found = await verbs.get_layer(which)
        if json:
            text.as_json(found)
            return
        pairs = [
            ("id", found.id),
            ("kind", found.kind),
            ("size", format_size(found.size)),
            ("holds", f"{format_size(found.data)} of data, {format_size(found.zero)} of zeros"),
            ("stored", f"{format_size(found.stored)} on disk, {'compressed' if found.sealed else 'not yet compressed'}"),
            ("absent", f"{format_size(found.absent)}, which only a registry has" if found.absent else ""),
            ("parent", found.parent),
            ("made", f"{text.age(found.created_at)} ago"),
            *(("pages from" if not at else "", each) for at, each in enumerate(found.chain)),
            *(("blob" if not at else "", each) for at, each in enumerate(found.blobs)),
            *(("used by" if not at else "", text.clean(each)) for at, each in enumerate(found.used_by)),
        ]
        text.say("\n".join(text.facts(pairs)))

    perform(work, json=json)


@layer.command()
def verify(
    layers: Annotated[
        list[str] | None, typer.Argument(help="Layers' ids.", metavar="ID", autocompletion=layer_ids, show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All layers of this host.")] = False,
    json: Json = False,
) -> None:
    """Read and check every chunk. Exit status 1 when something is wrong.

    Example: ramet layer verify --all
    """

    async def work() -> int:
        if bool(layers) == everything:
            raise SpecError("which layers?", hint="Give their ids (`ramet layer ls`), or --all.")
        wrong: dict[str, list[str]] = {}
        async with client() as verbs:
            wanted = layers or [each.id for each in await verbs.layers()]
            for at, each in enumerate(wanted, 1):
                if sys.stderr.isatty():
                    text.note(f"checking {each} ({at} of {len(wanted)})")
                try:
                    wrong[each] = await verbs.verify_layer(each)
                except LayerError as error:  # too damaged to be read at all
                    wrong[each] = [error.message]
                if not json:
                    _say_checked(each, wrong[each])
        if json:
            text.as_json([{"id": each, "problems": problems} for each, problems in wrong.items()])
        return 1 if any(wrong.values()) else 0

    if status := perform(work, json=json):
        raise typer.Exit(status)


def _say_checked(which: str, problems: list[str]) -> None:
    if not problems:
        text.say(f"{which}  {text.paint('good', text.GREEN)}")
    for problem in problems:
        text.say(f"{which}  {text.paint('wrong', text.RED)}  {text.clean(problem)}")
    sys.stdout.flush()


@layer.command()
def export(
    which: LayerId,
    target: Annotated[str, typer.Argument(metavar="FILE", help="Where to, or - for stdout.", show_default=False)],
    json: Json = False,
) -> None:
    """Write a layer, with all it stands on, as a raw image. In a file, zeros are holes.

    Example: ramet layer export 5f0c2a9be1d47763 disk.raw
    """

    async def work() -> None:
        from ramet.cli.progress import copying

        if target == "-" and sys.stdout.isatty():
            raise SpecError("a raw image is nothing for a terminal", hint="Name a file, or pipe it on.")
        async with client() as verbs:
            found = await verbs.get_layer(which)
            source = verbs.export_layer(which)
            if target == "-":
                await _print(source)
                return
            written = await copying(which, lambda moved: save(source, Path(target), found.size, moved))
        if json:
            text.as_json({"layer": which, "file": target, "size": found.size, "written": written})
        else:
            text.say(f"{target}: {format_size(found.size)}, {format_size(written)} of it data.")

    perform(work, json=json)


async def _print(source: AsyncIterator[bytes]) -> None:
    from ramet.cli.terminal import STDOUT, printer

    write = printer(STDOUT)
    async for part in source:
        await write(part)


async def save(source: AsyncIterator[bytes], target: Path, size: int, moved: Callable[[int, int | None], None]) -> int:
    """Write an image beside its place, zero blocks as holes, and move it there when it is whole; the bytes that are no holes.

    HostError, NoSpaceError; LayerError when the image is not `size` bytes long.
    """
    if target.exists() and not target.is_file():
        raise HostError(f"{target} is not an ordinary file", hint="`-` writes to stdout.")
    done = written = 0
    try:
        fd, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.ramet-", dir=target.parent)
        try:
            with open(fd, "wb", buffering=0) as file:
                async for part in source:
                    for begin, end in data_runs(part, done):
                        _write(file.fileno(), memoryview(part)[begin:end], done + begin)
                        written += end - begin
                    done += len(part)
                    moved(done, size)
                if done != size:
                    raise LayerError(f"the image ended after {done} of {size} bytes", hint="`ramet layer verify` tells what is wrong.")
                file.truncate(size)
                os.fchmod(fd, 0o666 & ~_umask())
            Path(name).replace(target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                Path(name).unlink()
            raise
    except OSError as error:
        kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else HostError
        raise kind(f"cannot write {target}: {error.strerror}", details={"path": str(target)}) from error
    return written


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def data_runs(part: bytes, offset: int) -> Iterator[tuple[int, int]]:
    """Where `part`, which lies at `offset` of a file, has blocks that are not zero: begin and end of each run, within `part`."""
    begin: int | None = None
    at = 0
    while at < len(part):
        end = min(len(part), at + BLOCK - (offset + at) % BLOCK)
        zero = part[at:end] == _ZEROS[: end - at]
        if zero and begin is not None:
            yield begin, at
            begin = None
        elif not zero and begin is None:
            begin = at
        at = end
    if begin is not None:
        yield begin, len(part)
