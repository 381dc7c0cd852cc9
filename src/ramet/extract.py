"""A tar stream from a guest, unpacked on this host. The guest is not trusted: nothing is written outside the target, whatever the archive says.

What protects: every path is walked from the target's own descriptor, component by component, with O_NOFOLLOW; files are made with O_EXCL;
names that are absolute or hold `..` end the extraction; symbolic links are kept only where they cannot lead out; devices and pipes are left
out; setuid, setgid and sticky bits and others' write permission are dropped; owners are the caller's. Our own reader rather than tarfile's:
Debian 12's Python has neither its filters nor the fixes of the years after, and it holds extended headers of any size in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import stat
import tarfile
from collections.abc import AsyncIterable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ramet.archive import BLOCK, Progress
from ramet.errors import GuestError, HostError, NoSpaceError

HEADER_LIMIT = 1 << 20  # bytes of an extended header
NAME_LIMIT = 4096  # bytes of a path: the kernel's PATH_MAX
MODES = 0o755  # permission bits that are kept: no setuid, nothing that others may write
SKIPPED_LIMIT = 1000  # names that are remembered

Reader = Generator[int, bytes, None]  # yields how many bytes it wants at most, is sent at least one


@dataclass(kw_only=True)
class Report:
    """files, directories, links: what was made; size: bytes of files.

    skipped: name and reason of what was left out, the first ones; more: how many beyond those.
    """

    files: int = 0
    directories: int = 0
    links: int = 0
    size: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    more: int = 0

    def skip(self, name: str, reason: str) -> None:
        if len(self.skipped) < SKIPPED_LIMIT:
            self.skipped.append((name, reason))
        else:
            self.more += 1


def _bad(what: str) -> GuestError:
    return GuestError(
        f"the guest's archive is not acceptable: {what}", hint="Nothing was written outside the target. Copy single files instead."
    )


def _parts(name: str, what: str) -> tuple[str, ...]:
    """The components of a name. GuestError for one that could lead out of the target."""
    if len(name.encode(errors="surrogateescape")) > NAME_LIMIT:
        raise _bad(f"{what} of more than {NAME_LIMIT} bytes")
    if name.startswith("/"):
        raise _bad(f"{what} {name!r} is absolute")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts or any("\0" in part for part in parts):
        raise _bad(f"{what} {name!r} leads out of the target")
    return parts


def _stays(parts: tuple[str, ...], target: str) -> bool:
    """Whether a symbolic link at `parts` stays inside the tree. Only leading `..` count: after a name, which may itself be a link,
    `..` is not what it looks like."""
    if target.startswith("/") or not target:
        return False
    steps = [step for step in target.split("/") if step not in ("", ".")]
    up = next((at for at, step in enumerate(steps) if step != ".."), len(steps))
    return ".." not in steps[up:] and up < len(parts)


class Tree:
    """A directory on this host, written to by names that are not trusted."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._last: tuple[tuple[str, ...], int] = ((), self._root)

    def close(self) -> None:
        self._forget()
        os.close(self._root)

    def _forget(self) -> None:
        if self._last[1] != self._root:
            os.close(self._last[1])
        self._last = ((), self._root)

    def enter(self, parts: tuple[str, ...], *, make: bool = True) -> int:
        """A descriptor of the directory at `parts`, valid until the next call. Made where it is not there, never reached through a link."""
        if parts != self._last[0]:
            self._forget()
            current = self._root
            try:
                for part in parts:
                    following = self._step(current, part, make)
                    if current != self._root:
                        os.close(current)
                    current = following
            except BaseException:
                if current != self._root:
                    os.close(current)
                raise
            self._last = (parts, current)
        return self._last[1]

    @staticmethod
    def _step(at: int, part: str, make: bool) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=at)
        try:
            return os.open(part, flags, dir_fd=at)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            raise _bad(f"{part!r} is written through, but is a link or a file") from error

    def clear(self, at: int, name: str) -> None:
        """Make room for a file: what is there is removed, unless it is a directory."""
        try:
            os.unlink(name, dir_fd=at)
        except FileNotFoundError:
            pass
        except IsADirectoryError as error:
            raise _bad(f"{name!r} is a directory here") from error


class Extractor:
    """Takes a tar stream piece by piece. Blocking; `extract` runs it in threads."""

    def __init__(self, target: Path) -> None:
        self.report = Report()
        self._tree = Tree(target)
        self._directories: dict[tuple[str, ...], tuple[int, float]] = {}  # mode and time, set last: a read-only one could not be filled
        self._reader = self._archive()
        self._wanted: int | None = next(self._reader)

    def feed(self, data: bytes) -> None:
        """Take the next bytes. GuestError for an archive that is not acceptable, HostError for what this host cannot write."""
        at = 0
        try:
            while self._wanted is not None and at < len(data):
                piece = data[at : at + self._wanted]
                at += len(piece)
                self._wanted = self._reader.send(piece)
        except StopIteration:
            self._wanted = None  # the archive is over; what follows is padding
        except OSError as error:
            kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else HostError
            raise kind(f"cannot write {error.filename or 'a file'}: {error.strerror}") from error

    def finish(self) -> Report:
        """The end of the stream. GuestError when it came too early."""
        if self._wanted is not None:
            raise _bad("it is cut off")
        for parts, (mode, modified) in reversed(self._directories.items()):
            with contextlib.suppress(OSError, GuestError):
                at = self._tree.enter(parts, make=False)
                os.fchmod(at, mode)
                os.utime(at, (modified, modified))
        return self.report

    def close(self) -> None:
        """Let go of everything; a file under way is removed."""
        self._reader.close()
        self._tree.close()

    # reading

    def _exactly(self, size: int) -> Generator[int, bytes, bytes]:
        parts = bytearray()
        while len(parts) < size:
            parts += yield size - len(parts)
        return bytes(parts)

    def _archive(self) -> Reader:
        """The whole stream, member by member, until two blocks of zeros."""
        extra: dict[str, str] = {}
        zeros = 0
        while zeros < 2:
            block = yield from self._exactly(BLOCK)
            if not block.strip(b"\0"):
                zeros += 1
                continue
            zeros = 0
            try:
                member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except (tarfile.HeaderError, ValueError) as error:
                raise _bad(f"a header is not valid ({error})") from error
            if member.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                extra |= yield from self._extended(member)
                continue
            yield from self._member(self._complete(member, extra))
            extra = {}

    def _extended(self, member: tarfile.TarInfo) -> Generator[int, bytes, dict[str, str]]:
        """What an extended header says about the next member. A global one would hold for all; nobody writes names or sizes there."""
        if not 0 <= member.size <= HEADER_LIMIT:
            raise _bad(f"an extended header of {member.size} bytes")
        data = (yield from self._exactly(-(-member.size // BLOCK) * BLOCK))[: member.size]
        if member.type == tarfile.GNUTYPE_LONGNAME:
            return {"path": data.rstrip(b"\0").decode(errors="surrogateescape")}
        if member.type == tarfile.GNUTYPE_LONGLINK:
            return {"linkpath": data.rstrip(b"\0").decode(errors="surrogateescape")}
        return dict(_records(data)) if member.type == tarfile.XHDTYPE else {}

    def _complete(self, member: tarfile.TarInfo, extra: dict[str, str]) -> tarfile.TarInfo:
        """The header with what its extended header says instead."""
        if member.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in extra):
            raise _bad(f"{member.name!r} is stored sparsely")
        try:
            member.name = extra.get("path", member.name)
            member.linkname = extra.get("linkpath", member.linkname)
            member.size = int(extra.get("size", member.size))
            modified = float(extra.get("mtime", member.mtime))
        except ValueError as error:
            raise _bad(f"an extended header is not valid ({error})") from error
        member.mtime = min(max(modified, 0.0), 1e11) if math.isfinite(modified) else 0.0
        if member.size < 0:
            raise _bad(f"{member.name!r} has a size below zero")
        return member

    # writing

    def _member(self, member: tarfile.TarInfo) -> Reader:
        parts = _parts(member.name, "the name")
        size = member.size if member.type not in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE) else 0
        if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE) and parts:
            yield from self._file(parts, member)
        elif member.type == tarfile.DIRTYPE:
            self._tree.enter(parts)
            if parts:
                self._directories[parts] = (member.mode & MODES, member.mtime)
                self.report.directories = len(self._directories)
        elif member.type == tarfile.SYMTYPE and parts:
            self._symbolic(parts, member)
        elif member.type == tarfile.LNKTYPE and parts:
            self._hard(parts, member)
        else:
            self.report.skip(member.name, "neither file, directory nor link")
            yield from self._skip(size)

    def _skip(self, size: int) -> Reader:
        left = -(-size // BLOCK) * BLOCK
        while left:
            left -= len((yield left))

    def _file(self, parts: tuple[str, ...], member: tarfile.TarInfo) -> Reader:
        *above, name = parts
        at = os.dup(self._tree.enter(tuple(above)))
        try:
            self._tree.clear(at, name)
            out = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=at)
            try:
                left = member.size
                while left:
                    piece = yield left
                    left -= len(piece)
                    view = memoryview(piece)
                    while view:
                        view = view[os.write(out, view) :]
                os.fchmod(out, member.mode & MODES)
                os.utime(out, (member.mtime, member.mtime))
            except BaseException:
                os.unlink(name, dir_fd=at)
                raise
            finally:
                os.close(out)
        finally:
            os.close(at)
        self.report.files += 1
        self.report.size += member.size
        if member.size % BLOCK:
            yield from self._exactly(BLOCK - member.size % BLOCK)

    def _symbolic(self, parts: tuple[str, ...], member: tarfile.TarInfo) -> None:
        if not _stays(parts, member.linkname) or len(os.fsencode(member.linkname)) >= NAME_LIMIT or "\0" in member.linkname:
            self.report.skip(member.name, f"a symbolic link that leads out, to {member.linkname[:100]}")
            return
        *above, name = parts
        at = self._tree.enter(tuple(above))
        self._tree.clear(at, name)
        os.symlink(member.linkname, name, dir_fd=at)
        with contextlib.suppress(OSError):
            os.utime(name, (member.mtime, member.mtime), dir_fd=at, follow_symlinks=False)
        self.report.links += 1

    def _hard(self, parts: tuple[str, ...], member: tarfile.TarInfo) -> None:
        """Only to a regular file: a hard link to a symbolic one would move it to where its target means something else."""
        source = _parts(member.linkname, "the link target")
        if source == parts:
            return
        try:
            origin = os.dup(self._tree.enter(source[:-1], make=False))
        except (FileNotFoundError, IndexError):
            self.report.skip(member.name, "a hard link to what is not in the archive")
            return
        try:
            if not source or not stat.S_ISREG(os.stat(source[-1], dir_fd=origin, follow_symlinks=False).st_mode):
                raise FileNotFoundError
            at = self._tree.enter(parts[:-1])
            self._tree.clear(at, parts[-1])
            os.link(source[-1], parts[-1], src_dir_fd=origin, dst_dir_fd=at, follow_symlinks=False)
            self.report.links += 1
        except FileNotFoundError:
            self.report.skip(member.name, "a hard link to what is not a file of the archive")
        finally:
            os.close(origin)


def _records(data: bytes) -> Iterator[tuple[str, str]]:
    """pax: `LENGTH KEY=VALUE\\n` each, LENGTH counting itself. Values as bytes, for names that are not UTF-8."""
    while data.strip(b"\0"):
        digits, _, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        record = data[len(digits) + 1 : length]
        if length <= len(digits) + 1 or length > len(data) or not record.endswith(b"\n") or b"=" not in record:
            raise _bad("an extended header is not valid")
        key, _, value = record[:-1].partition(b"=")
        yield key.decode(errors="surrogateescape"), value.decode(errors="surrogateescape")
        data = data[length:]


async def extract(source: AsyncIterable[bytes], target: Path, progress: Progress | None = None) -> Report:
    """Unpack a tar stream into the directory `target`, made if missing. progress is called with the bytes taken so far.

    GuestError for an archive that is cut off or tries to leave the target; what came before stays, as after an interrupted copy.
    """
    extractor = await asyncio.to_thread(Extractor, target)
    done = 0
    try:
        async for piece in source:
            await asyncio.to_thread(extractor.feed, piece)
            done += len(piece)
            if progress:
                progress(done)
        return await asyncio.to_thread(extractor.finish)
    finally:
        extractor.close()
