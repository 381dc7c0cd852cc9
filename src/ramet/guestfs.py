"""Files of a guest, through the agent's builtins: each call is one process in the guest, so that a slow disk blocks nobody else."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator

from ramet import agentwire
from ramet.errors import GuestError, GuestNotFoundError
from ramet.guest import Guest, Stream
from ramet.model import Channel, Command, Exit, FileInfo, Output

_ERROR_LIMIT = 4096
_LIST_LIMIT = 64 << 20  # bytes of a directory's listing


def _error(text: bytes, code: int) -> GuestError:
    """The error for a builtin's `errno message: path` on stderr."""
    number, _, message = agentwire.printable(text).strip().partition(" ")
    name = errno.errorcode.get(int(number), number) if number.isdigit() else "EIO"
    kind = GuestNotFoundError if name == "ENOENT" else GuestError
    return kind(message or f"the agent's file operation failed with status {code}", details={"errno": name})


async def _output(stream: Stream) -> AsyncGenerator[bytes, None]:
    """stdout of a builtin; raises its error at the end."""
    errors = b""
    events = stream.events()
    try:
        async for event in events:
            if isinstance(event, Output) and event.channel is Channel.STDOUT:
                yield event.data
            elif isinstance(event, Output):
                errors = (errors + event.data)[:_ERROR_LIMIT]
            elif isinstance(event, Exit) and event.status:
                raise _error(errors, event.status)
    finally:
        await events.aclose()


def _start(guest: Guest, user: str, *argv: str, stdin: bool = False) -> Stream:
    return guest.execute(Command(argv=argv, user=user, stdin=stdin), builtin=True)


async def _call(guest: Guest, user: str, *argv: str) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in _output(_start(guest, user, *argv)):
        size += len(part)
        if size > _LIST_LIMIT:
            raise GuestError(f"the listing of {argv[1]} is too long")
        parts.append(part)
    return b"".join(parts)


async def _feed(stream: Stream, data: AsyncIterable[bytes]) -> None:
    """Send a builtin its stdin and see it end; its own error tells more than our broken pipe."""

    async def send() -> None:
        try:
            async for piece in data:
                await stream.write(piece)
        except GuestError as error:
            if error.details.get("errno") != "EPIPE":
                raise
        stream.eof()

    async def receive() -> None:
        async for _ in _output(stream):
            pass

    sender = asyncio.create_task(send())
    receiver = asyncio.create_task(receive())
    try:
        await asyncio.wait({sender, receiver}, return_when=asyncio.FIRST_EXCEPTION)
        if sender.done() and sender.exception():
            stream.close()  # the source failed: an unfinished write must not look finished
            await sender
        await receiver
    finally:
        stream.close()
        for task in (sender, receiver):
            task.cancel()
        await asyncio.gather(sender, receiver, return_exceptions=True)


def read(guest: Guest, path: str, offset: int, length: int, user: str) -> AsyncIterator[bytes]:
    """The bytes of a file; length -1: to its end."""
    return _output(_start(guest, user, "read", path, str(offset), str(length)))


async def write(guest: Guest, path: str, data: AsyncIterable[bytes], *, mode: int, offset: int, flags: str, user: str) -> None:
    await _feed(_start(guest, user, "write", path, str(offset), f"{mode:o}", flags, stdin=True), data)


async def stat(guest: Guest, path: str, user: str) -> FileInfo:
    found = agentwire.parse_files(await _call(guest, user, "stat", path))
    if len(found) != 1:
        raise agentwire.ProtocolError("the guest's agent answered stat with another number of records than one")
    return found[0]


async def entries(guest: Guest, path: str, user: str) -> list[FileInfo]:
    found = agentwire.parse_files(await _call(guest, user, "list", path))
    for each in found:
        if os.sep in each.name or each.name in ("", ".", ".."):
            raise agentwire.ProtocolError("the guest's agent listed a name that cannot be one")
    return sorted(found, key=lambda each: each.name)


async def remove(guest: Guest, path: str, *, recursive: bool, user: str) -> None:
    await _call(guest, user, "remove", path, "r" if recursive else "")


async def rename(guest: Guest, path: str, target: str, user: str) -> None:
    await _call(guest, user, "rename", path, target)


async def make_dir(guest: Guest, path: str, *, mode: int, parents: bool, user: str) -> None:
    await _call(guest, user, "mkdir", path, f"{mode:o}", "p" if parents else "")


def pack(guest: Guest, path: str, user: str) -> AsyncIterator[bytes]:
    return _output(_start(guest, user, "pack", path))


async def unpack(guest: Guest, path: str, data: AsyncIterable[bytes], *, owners: bool, user: str) -> None:
    await _feed(_start(guest, user, "unpack", path, "o" if owners else "", stdin=True), data)


async def sync(guest: Guest, deadline: float) -> None:
    """Have the guest write all that it holds back to its disk."""
    try:
        async with asyncio.timeout(deadline):
            await _call(guest, "", "sync")
    except TimeoutError:
        raise GuestError(f"the guest did not write its files to the disk within {deadline:.0f} s") from None
