"""The files of a machine, for the SDK."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import os
import stat
import tempfile
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ramet.errors import GuestError, GuestNotFoundError, HostError
from ramet.model import FileInfo, FileType
from ramet.verbs import WRITE_FLAGS, Verbs

if TYPE_CHECKING:
    from ramet.extract import Report

Moved = Callable[[int, int | None], None]  # bytes so far, bytes in all where that is known


class AsyncFiles:
    """Paths are the guest's, absolute. user: who does it in the guest; empty: root. GuestNotFoundError for what is not there."""

    def __init__(self, verbs: Verbs, machine: str) -> None:
        self._verbs, self._machine = verbs, machine

    def stream(self, path: str, *, offset: int = 0, length: int = -1, user: str = "") -> AsyncIterator[bytes]:
        """The bytes of a file as they come. length -1: to its end."""
        return self._verbs.read_file(self._machine, path, offset=offset, length=length, user=user)

    async def read(self, path: str, *, offset: int = 0, length: int = -1, user: str = "") -> bytes:
        """The bytes of a file."""
        return b"".join([part async for part in self.stream(path, offset=offset, length=length, user=user)])

    async def read_text(self, path: str, *, encoding: str = "utf-8", user: str = "") -> str:
        """A file as text. UnicodeDecodeError when it is none."""
        return (await self.read(path, user=user)).decode(encoding)

    async def write(
        self,
        path: str,
        data: bytes | str | AsyncIterable[bytes],
        *,
        mode: int = 0o644,
        append: bool = False,
        atomic: bool = False,
        user: str = "",
    ) -> None:
        """Make or replace a file, its directories where they are missing. mode: of a new one. atomic: readers see the old one or the new."""
        flags = WRITE_FLAGS.replace("t", "a") if append else WRITE_FLAGS + ("r" if atomic else "")
        source = data if isinstance(data, AsyncIterable) else _once(data.encode() if isinstance(data, str) else data)
        await self._verbs.write_file(self._machine, path, source, mode=mode, flags=flags, user=user)

    async def list(self, path: str, *, user: str = "") -> builtins.list[FileInfo]:
        """The entries of a directory, by name."""
        return await self._verbs.list_files(self._machine, path, user=user)

    async def stat(self, path: str, *, user: str = "") -> FileInfo:
        """What a path is; a symbolic link is not followed."""
        return await self._verbs.stat_file(self._machine, path, user=user)

    async def exists(self, path: str, *, user: str = "") -> bool:
        """Whether there is something, be it a link to nowhere."""
        try:
            await self.stat(path, user=user)
        except GuestNotFoundError:
            return False
        return True

    async def is_dir(self, path: str, *, user: str = "") -> bool:
        """Whether it is a directory, or a link to one."""
        try:
            info = await self.stat(path, user=user)
            if info.type is FileType.LINK:
                info = await self.stat(f"{path}/.", user=user)
        except GuestError:
            return False
        return info.type is FileType.DIRECTORY

    async def remove(self, path: str, *, recursive: bool = False, user: str = "") -> None:
        await self._verbs.remove_file(self._machine, path, recursive=recursive, user=user)

    async def rename(self, path: str, target: str, *, user: str = "") -> None:
        await self._verbs.rename_file(self._machine, path, target, user=user)

    async def make_dir(self, path: str, *, mode: int = 0o755, parents: bool = True, user: str = "") -> None:
        await self._verbs.make_dir(self._machine, path, mode=mode, parents=parents, user=user)

    async def upload(self, local: str | Path, path: str, *, user: str = "", progress: Moved | None = None) -> None:
        """Copy a file to `path`, or the contents of a directory into the directory `path`. Modes and times are kept, owners are `user`."""
        from ramet import archive

        local = Path(local)
        if local.is_dir():
            total = await asyncio.to_thread(archive.size_of, local)
            source = archive.stream(archive.blocks(local), _counter(progress, total))
            await self._verbs.unpack(self._machine, path, source, user=user)
            return
        try:
            info = local.stat()
            data = archive.stream(_pieces(local), _counter(progress, info.st_size))
            await self._verbs.write_file(self._machine, path, data, mode=stat.S_IMODE(info.st_mode) & 0o777, user=user)
        except OSError as error:
            raise HostError(f"cannot read {local}: {error.strerror}") from error

    async def download(self, path: str, local: str | Path, *, user: str = "", progress: Moved | None = None) -> Report:
        """Copy a file to `local`, or the contents of a directory into the directory `local`; says what was made and what left out.

        The guest is not trusted: nothing is written outside `local`, setuid and devices stay behind, links that lead out are left out.
        """
        from ramet.extract import extract

        local = Path(local)
        info = await self.stat(path, user=user)
        if await self.is_dir(path, user=user):
            source = self._verbs.pack(self._machine, path if info.type is FileType.DIRECTORY else f"{path}/.", user=user)
            return await extract(source, local, _counter(progress, None))
        total = info.size if info.type is FileType.FILE else None
        mode = info.mode if info.type is FileType.FILE else 0o644
        return await _save(self.stream(path, user=user), local, mode, _counter(progress, total))


def _counter(progress: Moved | None, total: int | None) -> Callable[[int], None] | None:
    return (lambda done: progress(done, total)) if progress else None


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while data := file.read(256 << 10):
            yield data


async def _save(source: AsyncIterator[bytes], target: Path, mode: int, progress: Callable[[int], None] | None) -> Report:
    """Write a file beside its place and move it there when it is whole."""
    from ramet.extract import MODES, Report

    done = 0
    try:
        fd, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.ramet-", dir=target.parent)
        try:
            with open(fd, "wb", buffering=0) as file:
                async for part in source:
                    view = memoryview(part)
                    while view:
                        view = view[await asyncio.to_thread(file.write, view) :]
                    done += len(part)
                    if progress:
                        progress(done)
                os.fchmod(fd, mode & MODES)
            Path(name).replace(target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                Path(name).unlink()
            raise
    except OSError as error:
        raise HostError(f"cannot write {target}: {error.strerror}", details={"path": str(target)}) from error
    return Report(files=1, size=done)
