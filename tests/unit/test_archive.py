"""Trees as tar: what comes back is what went in, and a hostile archive writes nothing outside its target."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ramet import archive
from ramet.errors import GuestError, HostError, RametError
from ramet.extract import Extractor, Report, extract

SMALL = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


async def pieces(data: bytes, size: int = 700) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


def unpack(data: bytes, target: Path, size: int = 1 << 20) -> Report:
    extractor = Extractor(target)
    try:
        for at in range(0, len(data), size):
            extractor.feed(data[at : at + size])
        return extractor.finish()
    finally:
        extractor.close()


def listing(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything below a directory: type and mode, and content or target."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        info = path.lstat()
        what: object = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        found[str(path.relative_to(root))] = (stat.filemode(info.st_mode), int(info.st_mtime), what)
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "deep/er").mkdir(parents=True)
    (root / "empty").mkdir(mode=0o700)
    (root / "file").write_bytes(b"x" * 1000)
    (root / "none").write_bytes(b"")
    (root / "block").write_bytes(b"y" * 512)
    (root / "big").write_bytes(os.urandom(700_000))
    (root / "deep/er/script").write_text("#!/bin/sh\n")
    (root / "deep/er/script").chmod(0o755)
    (root / "secret").write_text("s")
    (root / "secret").chmod(0o400)
    (root / ("n" * 200)).mkdir()
    (root / ("n" * 200) / ("ü" * 100)).write_text("long")
    (root / os.fsdecode(b"caf\xe9")).write_text("latin")
    (root / "link").symlink_to("deep/er/script")
    (root / "deep/up").symlink_to("../file")
    (root / "dangling").symlink_to("nowhere/" + "d" * 150)
    os.link(root / "file", root / "deep/hard")
    for path in root.rglob("*"):
        os.utime(path, (1e9, 1e9), follow_symlinks=False)
    return root


async def test_a_tree_comes_back(tree: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    report = await extract(archive.stream(archive.blocks(tree), seen.append), tmp_path / "copy")
    assert listing(tmp_path / "copy") == listing(tree)
    assert (tmp_path / "copy/file").stat().st_ino == (tmp_path / "copy/deep/hard").stat().st_ino
    assert report.skipped == []
    assert (report.files, report.directories, report.size) == (8, 4, archive.size_of(tree))
    assert seen == sorted(seen)
    assert seen[-1] > 700_000


def test_tarfile_reads_what_we_write(tree: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(b"".join(archive.blocks(tree)))) as tar:
        assert sorted(tar.getnames()) == sorted([".", *(f"./{path.relative_to(tree)}" for path in tree.rglob("*"))])


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_we_read_what_tarfile_writes(tree: Path, tmp_path: Path, form: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        tar.add(tree, ".")
    assert unpack(out.getvalue(), tmp_path / "copy").skipped == []
    assert listing(tmp_path / "copy") == listing(tree)


@pytest.mark.parametrize("size", [1, 511, 513])
def test_pieces_of_any_size(tree: Path, tmp_path: Path, size: int) -> None:
    (tree / "big").unlink()
    unpack(b"".join(archive.blocks(tree)), tmp_path / "copy", size)
    assert listing(tmp_path / "copy") == listing(tree)


def test_a_tree_over_another_one(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "copy/deep").mkdir(parents=True)
    (tmp_path / "copy/deep/own").write_text("stays")
    (tmp_path / "copy/file").symlink_to("deep/own")
    unpack(b"".join(archive.blocks(tree)), tmp_path / "copy")
    assert (tmp_path / "copy/deep/own").read_text() == "stays"
    assert not (tmp_path / "copy/file").is_symlink()


def test_devices_and_sockets_stay_here(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    os.mkfifo(tmp_path / "t/fifo")
    report = unpack(b"".join(archive.blocks(tmp_path / "t")), tmp_path / "copy")
    assert [name for name, _ in report.skipped] == ["./fifo"]
    assert list((tmp_path / "copy").iterdir()) == []


def test_a_file_that_shrinks(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t/log").write_bytes(b"x" * 1_000_000)
    pieces = archive.blocks(tmp_path / "t")
    for _ in range(3):
        next(pieces)
    os.truncate(tmp_path / "t/log", 10)
    with pytest.raises(HostError, match="became shorter"):
        list(pieces)


# hostile archives


def made(*members: tuple[str, dict[str, object], bytes]) -> bytes:
    """An archive as a hostile guest writes it: headers without any care."""
    out = b""
    for name, fields, data in members:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        for key, value in fields.items():
            setattr(member, key, value)
        out += member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape") + data + bytes(-len(data) % 512)
    return out + bytes(1024)


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[str, dict[str, object], bytes]:
    return name, {"type": kind, "linkname": target}, b""


def file(name: str, data: bytes = b"evil", **fields: object) -> tuple[str, dict[str, object], bytes]:
    return name, fields, data


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """A target beside a file that must not change."""
    (tmp_path / "victim").write_text("safe")
    (tmp_path / "dir").mkdir()
    yield tmp_path / "out"
    assert (tmp_path / "victim").read_text() == "safe"
    assert list((tmp_path / "dir").iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "out") == ["dir", "victim"]


@pytest.mark.parametrize("name", ["../victim", "/tmp/ramet-evil", "a/../../victim", "..", "a/..", "./../x", "x" * 5000])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_names_that_lead_out(target: Path, name: str, kind: bytes) -> None:
    with pytest.raises(GuestError):
        unpack(made((name, {"type": kind, "linkname": "x"}, b"")), target)


@pytest.mark.parametrize(
    "members",
    [
        [link("l", "../dir"), file("l/x")],
        [link("l", "/etc"), file("l/x")],
        [link("l", "inside"), file("l/x")],
        [link("a", "."), file("a/x")],
        [file("f"), file("f/x")],
    ],
)
def test_nothing_is_written_through_links(target: Path, members: list[tuple[str, dict[str, object], bytes]]) -> None:
    try:
        unpack(made(*members), target)
    except GuestError:
        return
    # the link was left out, and a directory of that name took its place
    assert not (target / members[0][0]).is_symlink()


def test_a_link_is_replaced_not_followed(target: Path) -> None:
    target.mkdir()
    (target / "l").symlink_to("../victim")
    unpack(made(file("l")), target)
    assert (target / "l").read_bytes() == b"evil"


def test_links_of_the_user_are_not_followed_either(target: Path) -> None:
    target.mkdir()
    (target / "l").symlink_to("../dir")
    with pytest.raises(GuestError, match="link"):
        unpack(made(file("l/x")), target)


@pytest.mark.parametrize(
    ("at", "to"),
    [("l", "/etc/passwd"), ("l", "../victim"), ("a/l", "../../victim"), ("a/b/c/l", "../../../../x"), ("l", "a/../../victim"), ("l", "")],
)
def test_links_that_lead_out_are_left_out(target: Path, at: str, to: str) -> None:
    report = unpack(made(link(at, to), file("after")), target)
    assert [name for name, _ in report.skipped] == [at]
    assert not (target / at).is_symlink()
    assert (target / "after").exists()


def test_chained_links_cannot_lead_out(target: Path) -> None:
    """`deep` leads to the root from three levels down; a `..` after it would leave."""
    report = unpack(made(link("a/b/c/deep", "../../.."), link("m", "a/b/c/deep/../../victim"), link("a/b/c/deep2", "../../../..")), target)
    assert [name for name, _ in report.skipped] == ["m", "a/b/c/deep2"]


@pytest.mark.parametrize("source", ["../victim", "/etc/passwd", "nowhere", "s", "d", ".", "s/x"])
def test_hard_links_only_to_files_of_the_archive(target: Path, source: str) -> None:
    archive = made(link("s", "d"), ("d", {"type": tarfile.DIRTYPE}, b""), link("h", source, tarfile.LNKTYPE))
    try:
        report = unpack(archive, target)
    except GuestError:
        return
    assert [name for name, _ in report.skipped] == ["h"]
    assert not (target / "h").exists()


def test_setuid_is_dropped(target: Path) -> None:
    unpack(made(file("s", mode=0o7777), ("d", {"type": tarfile.DIRTYPE, "mode": 0o7777}, b"")), target)
    assert stat.S_IMODE((target / "s").stat().st_mode) == 0o755
    assert stat.S_IMODE((target / "d").stat().st_mode) == 0o755


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Z"])
def test_devices_are_left_out(target: Path, kind: bytes) -> None:
    report = unpack(made(("dev", {"type": kind, "devmajor": 1, "devminor": 3}, b""), file("after")), target)
    assert [name for name, _ in report.skipped] == ["dev"]
    assert (target / "after").exists()


@pytest.mark.parametrize("end", [100, 512, 600, 1023, 1024, 1500])
def test_an_archive_that_is_cut_off(target: Path, end: int) -> None:
    with pytest.raises(GuestError, match="cut off"):
        unpack(made(file("f", b"x" * 600))[:end], target)
    assert not (target / "f").exists() or end >= 512 + 600


def test_an_archive_of_nothing(target: Path) -> None:
    with pytest.raises(GuestError, match="cut off"):
        unpack(b"", target)
    assert unpack(bytes(1024), target) == Report()


def header(change: Callable[[bytearray], None], name: str = "f") -> bytes:
    """A header with bytes changed and its checksum made right."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    change(block)
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(1024)


def put(at: int, data: bytes) -> Callable[[bytearray], None]:
    def change(block: bytearray) -> None:
        block[at : at + len(data)] = data

    return change


@pytest.mark.parametrize(
    "change",
    [
        put(124, b"\xff" * 12),  # a negative size
        put(124, b"99999999999\0"),  # no octal number
        put(124, b"\x80" + b"\x7f" * 11),  # more bytes than there are
        put(156, b"S"),  # GNU sparse
    ],
)
def test_headers_that_lie(target: Path, change: Callable[[bytearray], None]) -> None:
    with pytest.raises(GuestError):
        unpack(header(change), target)
    assert not (target / "f").exists()


@pytest.mark.parametrize(
    ("records", "fine"),
    [
        (b"13 path=../x\n", False),
        (b"99 path=x\n", False),
        (b"0 path=x\n", False),
        (b"path=x\n", False),
        (b"9 size=-1\n", False),
        (b"11 size=1e9\n", False),
        (b"13 mtime=nan\n", True),
        (b"15 mtime=1e999\n", True),
        (b"30 GNU.sparse.realsize=10000\n\n", False),
        (b"11 path=a\0b\n"[:11], False),
    ],
)
def test_extended_headers_that_lie(target: Path, records: bytes, fine: bool) -> None:
    data = made(("pax", {"type": tarfile.XHDTYPE}, records), file("f"))
    if fine:
        unpack(data, target)
    else:
        with pytest.raises(GuestError):
            unpack(data, target)


def test_extended_headers_have_a_limit(target: Path) -> None:
    member = tarfile.TarInfo("pax")
    member.type, member.size = tarfile.XHDTYPE, 8 << 30
    with pytest.raises(GuestError, match="extended header of"):
        unpack(member.tobuf(tarfile.USTAR_FORMAT if member.size < 8 << 30 else tarfile.GNU_FORMAT), target)


NAMES = st.lists(st.sampled_from(["a", "b", "l", "..", ".", "", "ü"]), min_size=1, max_size=4).map("/".join)
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])
MEMBERS = st.lists(st.tuples(NAMES, KINDS, st.one_of(NAMES, NAMES.map("/".__add__), NAMES.map("../".__add__))), max_size=8)


@SMALL
@given(MEMBERS)
@example([("l", tarfile.SYMTYPE, ".."), ("l/a", tarfile.REGTYPE, "")])
@example([("a/b/l", tarfile.SYMTYPE, "../.."), ("b", tarfile.LNKTYPE, "a/b/l"), ("b/a", tarfile.REGTYPE, "")])
def test_no_archive_leaves_its_target(tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, bytes, str]]) -> None:
    base = tmp_path_factory.mktemp("h")
    (base / "victim").write_text("safe")
    target = base / "x/y/out"
    data = made(*((name, {"type": kind, "linkname": to}, b"evil" if kind == tarfile.REGTYPE else b"") for name, kind, to in members))
    with contextlib.suppress(GuestError):
        unpack(data, target)
    assert sorted(str(p.relative_to(base)) for p in base.rglob("*") if not p.is_relative_to(target)) == ["victim", "x", "x/y"]
    assert (base / "victim").read_text() == "safe"
    for path in target.rglob("*"):
        if path.is_symlink():
            # os.path.realpath follows every link there is: where it ends must be inside, existing or not
            assert Path(os.path.realpath(path)).is_relative_to(os.path.realpath(target)), path


@SMALL
@given(st.binary(max_size=3000), st.integers(0, 3000))
def test_rubbish_is_refused_cleanly(tmp_path_factory: pytest.TempPathFactory, rubbish: bytes, at: int) -> None:
    good = made(file("a", b"x" * 700), link("l", "a"), file("n" * 150))
    target = tmp_path_factory.mktemp("r")
    with contextlib.suppress(RametError):
        unpack(good[:at] + rubbish + good[at + len(rubbish) :], target / "out", 100)
    assert list(target.iterdir()) == [target / "out"]


async def test_the_file_under_way_is_removed(target: Path) -> None:
    async def torn() -> AsyncIterator[bytes]:
        yield made(file("done", b"1"), file("half", b"x" * 5000))[:3000]
        raise RuntimeError("the line broke")

    with pytest.raises(RuntimeError):
        await extract(torn(), target)
    assert [p.name for p in target.iterdir()] == ["done"]


async def test_memory_does_not_grow_with_the_archive(tmp_path: Path) -> None:
    import tracemalloc

    async def large() -> AsyncIterator[bytes]:
        member = tarfile.TarInfo("big")
        member.size = 64 << 20
        yield member.tobuf(tarfile.GNU_FORMAT)
        for _ in range(256):
            yield bytes(256 << 10)
        yield bytes(1024)

    tracemalloc.start()
    await extract(large(), tmp_path / "out")
    async for _ in archive.stream(archive.blocks(tmp_path / "out")):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
