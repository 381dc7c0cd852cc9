"""Files of a machine: parts and wholes, kinds and modes, trees both ways, and refusals."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import tarfile
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from ramet.errors import GuestError, GuestNotFoundError
from ramet.model import FileType
from tests.fixtures import Box


async def once(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), 100_000):
        yield data[at : at + 100_000]


async def joined(parts: AsyncIterable[bytes]) -> bytes:
    return b"".join([part async for part in parts])


async def read(box: Box, path: str, **options: int | str) -> bytes:
    return await joined(box.engine.read_file(box.name, path, **options))  # type: ignore[arg-type]


async def write(box: Box, path: str, data: bytes, **options: int | str) -> None:
    await box.engine.write_file(box.name, path, once(data), **options)  # type: ignore[arg-type]


@pytest_asyncio.fixture(loop_scope="session")
async def home(box: Box) -> AsyncIterator[str]:
    """A directory for one test."""
    await box.engine.make_dir(box.name, "/srv/test")
    yield "/srv/test"
    await box.engine.remove_file(box.name, "/srv/test", recursive=True)


# --- one file ---


async def test_what_is_written_is_read(box: Box, home: str) -> None:
    for data in (b"", b"x", bytes(range(256)) * 2000):
        await write(box, f"{home}/a", data)
        assert await read(box, f"{home}/a") == data


async def test_ranges(box: Box, home: str) -> None:
    await write(box, f"{home}/a", b"0123456789")
    assert await read(box, f"{home}/a", offset=3) == b"3456789"
    assert await read(box, f"{home}/a", offset=3, length=4) == b"3456"
    assert await read(box, f"{home}/a", offset=8, length=100) == b"89"
    assert await read(box, f"{home}/a", offset=100) == b""
    assert await read(box, f"{home}/a", length=0) == b""
    await write(box, f"{home}/a", b"XX", offset=4, flags="")
    assert await read(box, f"{home}/a") == b"0123XX6789"
    await write(box, f"{home}/sparse", b"end", offset=1 << 20)
    assert (await box.engine.stat_file(box.name, f"{home}/sparse")).size == (1 << 20) + 3
    assert await read(box, f"{home}/sparse", length=4) == bytes(4)


async def test_flags(box: Box, home: str) -> None:
    await write(box, f"{home}/a", b"one", flags="c")
    await write(box, f"{home}/a", b"two", flags="a")
    assert await read(box, f"{home}/a") == b"onetwo"
    with pytest.raises(GuestError) as caught:
        await write(box, f"{home}/a", b"three", flags="cx")
    assert caught.value.details["errno"] == "EEXIST"
    with pytest.raises(GuestNotFoundError):
        await write(box, f"{home}/b", b"", flags="t")
    with pytest.raises(GuestNotFoundError):
        await write(box, f"{home}/no/such/b", b"", flags="c")
    await write(box, f"{home}/no/such/b", b"deep", flags="cp")
    assert await read(box, f"{home}/no/such/b") == b"deep"


async def test_modes_and_owners(box: Box, home: str) -> None:
    await write(box, f"{home}/script", b"#!/bin/sh\necho ran\n", mode=0o755)
    assert await box.text(f"{home}/script") == "ran"
    await write(box, f"{home}/setuid", b"", mode=0o4711)
    assert (await box.engine.stat_file(box.name, f"{home}/setuid")).mode in (0o4711, 0o711)
    await box.sh(f"chmod 777 {home}")
    await write(box, f"{home}/theirs", b"x", user="app", mode=0o600)
    info = await box.engine.stat_file(box.name, f"{home}/theirs")
    assert (info.uid, info.gid, info.mode) == (1000, 1000, 0o600)
    await write(box, f"{home}/mine", b"secret", mode=0o600)
    with pytest.raises(GuestError) as caught:
        await read(box, f"{home}/mine", user="app")
    assert caught.value.details["errno"] == "EACCES"


async def test_replacing_is_all_or_nothing(box: Box, home: str) -> None:
    await write(box, f"{home}/a", b"old")

    async def broken() -> AsyncIterator[bytes]:
        yield b"new" * 10_000
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        await box.engine.write_file(box.name, f"{home}/a", broken(), flags="cr")
    async with asyncio.timeout(60):
        while await box.text(f"ls -A {home}") != "a":  # the aside file goes when the agent has killed its writer
            pass
    assert await read(box, f"{home}/a") == b"old"
    await write(box, f"{home}/a", b"new", flags="cr")
    assert await read(box, f"{home}/a") == b"new"
    assert await box.text(f"ls -A {home}") == "a"


async def test_a_reader_that_stops_in_the_middle(box: Box, home: str) -> None:
    await box.sh(f"dd if=/dev/zero of={home}/big bs=1M count=8 2>/dev/null")
    parts = box.engine.read_file(box.name, f"{home}/big")
    assert await anext(parts)
    await parts.aclose()  # type: ignore[attr-defined]
    assert await box.text("ps | grep -c '[r]amet-agent.*read'", check=False) in ("0", "")
    await read(box, f"{home}/big", length=10)


async def test_a_big_file_both_ways(box: Box, home: str, tmp_path: Path) -> None:
    block = os.urandom(1 << 20)

    async def source() -> AsyncIterator[bytes]:
        for number in range(32):
            yield number.to_bytes(4, "big") + block[4:]

    expected = hashlib.sha256(b"".join([part async for part in source()])).hexdigest()
    await box.engine.write_file(box.name, f"{home}/big", source())
    assert (await box.text(f"sha256sum < {home}/big")).split()[0] == expected
    found = hashlib.sha256()
    async for part in box.engine.read_file(box.name, f"{home}/big"):
        found.update(part)
    assert found.hexdigest() == expected


# --- directories ---


async def test_kinds(box: Box, home: str) -> None:
    await box.sh(
        f"cd {home}; echo hello > file; mkdir dir; ln -s file link; mkfifo fifo; mknod char c 1 3; mknod block b 7 0; ln file hard"
    )
    found = {info.name: info for info in await box.engine.list_files(box.name, home)}
    assert {name: info.type for name, info in found.items()} == {
        "file": FileType.FILE, "hard": FileType.FILE, "dir": FileType.DIRECTORY, "link": FileType.LINK, "fifo": FileType.FIFO,
        "char": FileType.CHARACTER, "block": FileType.BLOCK,
    }  # fmt: skip
    assert (found["link"].target, found["file"].links, found["file"].size) == ("file", 2, 6)
    assert (await box.engine.stat_file(box.name, f"{home}/link")).type is FileType.LINK


async def test_names_of_any_bytes(box: Box, home: str) -> None:
    names = ["with space", "new\nline", "ü", "\udcff\udcfe", "-rf", "'\"$(id)`", "x" * 255, "\x1b[31m"]
    for name in names:
        await write(box, f"{home}/{name}", name.encode(errors="surrogateescape"))
    assert sorted(info.name for info in await box.engine.list_files(box.name, home)) == sorted(names)
    for name in names:
        assert await read(box, f"{home}/{name}") == name.encode(errors="surrogateescape")


async def test_a_directory_of_thousands(box: Box, home: str) -> None:
    await box.sh(f"cd {home}; for i in $(seq 3000); do : > file$i; done")
    assert len(await box.engine.list_files(box.name, home)) == 3000
    assert await box.engine.list_files(box.name, "/srv/test/..") != []


async def test_making_renaming_removing(box: Box, home: str) -> None:
    await box.engine.make_dir(box.name, f"{home}/a/b", mode=0o700)
    await box.engine.make_dir(box.name, f"{home}/a/b")  # with parents, one that is there is fine
    with pytest.raises(GuestError) as caught:
        await box.engine.make_dir(box.name, f"{home}/a/b", parents=False)
    assert caught.value.details["errno"] == "EEXIST"
    assert (await box.engine.stat_file(box.name, f"{home}/a/b")).mode == 0o700
    await box.engine.rename_file(box.name, f"{home}/a", f"{home}/c")
    with pytest.raises(GuestNotFoundError):
        await box.engine.stat_file(box.name, f"{home}/a")
    with pytest.raises(GuestError) as caught:
        await box.engine.remove_file(box.name, f"{home}/c")
    assert caught.value.details["errno"] in ("ENOTEMPTY", "EISDIR")
    await box.engine.remove_file(box.name, f"{home}/c", recursive=True)
    with pytest.raises(GuestNotFoundError):
        await box.engine.remove_file(box.name, f"{home}/c")


async def test_removing_follows_no_link(box: Box, home: str) -> None:
    await box.sh(f"cd {home}; mkdir keep tree; echo x > keep/file; ln -s ../keep tree/link; ln -s keep top")
    await box.engine.remove_file(box.name, f"{home}/tree", recursive=True)
    await box.engine.remove_file(box.name, f"{home}/top", recursive=True)
    assert await box.text(f"cat {home}/keep/file; ls {home}") == "x\nkeep"


@pytest.mark.parametrize("path", ["/no/such", "relative/such", "/srv/test/\0x", "/" + "x" * 5000])
async def test_paths_that_are_not_there(box: Box, home: str, path: str) -> None:
    for call in (box.engine.stat_file, box.engine.list_files):
        with pytest.raises(GuestError):
            await call(box.name, path)
    with pytest.raises(GuestError):
        await read(box, path)
    await box.sh("true")


async def test_a_full_disk(box: Box, home: str) -> None:
    free = int((await box.engine.metrics(box.name))["disk_free"])
    await box.sh(f"fallocate -l {free - (24 << 20)} {home}/most")

    async def zeroes() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield bytes(1 << 20)

    with pytest.raises(GuestError) as caught:
        await box.engine.write_file(box.name, f"{home}/huge", zeroes())
    assert caught.value.details["errno"] == "ENOSPC"
    await box.engine.remove_file(box.name, f"{home}/huge")
    await write(box, f"{home}/small", b"fits")


# --- trees ---


async def test_a_tree_out_and_in_again(box: Box, home: str) -> None:
    await box.sh(
        f"mkdir -p {home}/from/empty {home}/from/dir; cd {home}/from; echo data > dir/file; chown 1000:50 dir/file; chmod 4750 dir/file;"
        "ln -s /etc/passwd absolute; ln -s nowhere dangling; ln dir/file hard; chmod 1777 empty; mkfifo fifo; mknod char c 1 3;"
        "head -c 300000 /dev/urandom > dir/random; touch -d '2001-02-03 04:05:06' dir"
    )
    archive = await joined(box.engine.pack(box.name, f"{home}/from"))
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = {member.name.removeprefix("./"): member for member in tar}
        assert members["dir/file"].mode == 0o4750 or members["dir/file"].islnk()
        assert members["absolute"].linkname == "/etc/passwd"
        assert sum(member.islnk() for member in members.values()) == 1
        assert members["dir"].mtime == 981173106
        assert members["char"].ischr()
        assert members["fifo"].isfifo()
        names = set(members)
    assert {"empty", "dir", "dir/file", "dangling", "hard", "dir/random"} <= names
    await box.engine.unpack(box.name, f"{home}/to", once(archive), owners=True)
    await box.sh(f"cd {home}; cmp from/dir/random to/dir/random; [ to/hard -ef to/dir/file ]")
    listing = "cd {}; find . | sort | xargs stat -c '%n %F %a %u %g %s'; stat -c %Y dir; readlink absolute; readlink dangling"
    there, here = await box.text(listing.format(f"{home}/to")), await box.text(listing.format(f"{home}/from"))
    assert there == here


async def test_one_file_as_a_tree(box: Box, home: str) -> None:
    await write(box, f"{home}/a", b"alone")
    with tarfile.open(fileobj=io.BytesIO(await joined(box.engine.pack(box.name, f"{home}/a")))) as tar:
        assert [(member.name, member.size) for member in tar] == [("a", 5)]


async def test_a_tree_belongs_to_the_user_who_unpacks_it(box: Box, home: str) -> None:
    await box.sh(f"chmod 777 {home}")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("file")
        info.uid, info.size = 4711, 2
        tar.addfile(info, io.BytesIO(b"hi"))
    await box.engine.unpack(box.name, f"{home}/theirs", once(out.getvalue()), user="app")
    assert (await box.engine.stat_file(box.name, f"{home}/theirs/file")).uid == 1000


def archive(*members: tuple[str, bytes, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mode = kind, link, 0o755
            data = b"evil" if kind == tarfile.REGTYPE else b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize("members", [
    [("../escaped", tarfile.REGTYPE, "")],
    [("/srv/escaped", tarfile.REGTYPE, "")],
    [("a/../../escaped", tarfile.REGTYPE, "")],
    [("link", tarfile.SYMTYPE, "/srv"), ("link/escaped", tarfile.REGTYPE, "")],
    [("link", tarfile.SYMTYPE, ".."), ("link/escaped", tarfile.REGTYPE, "")],
    [("hard", tarfile.LNKTYPE, "../../etc/passwd"), ("hard", tarfile.REGTYPE, "")],
    [("hard", tarfile.LNKTYPE, "/etc/passwd")],
], ids=["dots", "absolute", "dots inside", "link out", "link up", "hard link out", "absolute hard link"])  # fmt: skip
async def test_archives_that_want_out(box: Box, home: str, members: list[tuple[str, bytes, str]]) -> None:
    before = await box.text("sha256sum /etc/passwd; ls /srv")
    with pytest.raises(GuestError):
        await box.engine.unpack(box.name, f"{home}/in", once(archive(*members)))
    assert await box.text("sha256sum /etc/passwd; ls /srv") == before
    assert await box.text(f"ls {home}") in ("in", "")


@pytest.mark.parametrize("data", [b"not a tar at all" * 100, b"\xff" * 2048, archive(("a", tarfile.REGTYPE, ""))[:700]])
async def test_archives_that_are_none(box: Box, home: str, data: bytes) -> None:
    with pytest.raises(GuestError):
        await box.engine.unpack(box.name, f"{home}/in", once(data))
