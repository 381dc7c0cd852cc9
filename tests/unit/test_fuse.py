"""The FUSE protocol as bytes, and the image file system's answers, without a kernel."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.errors import AbsentError, LayerError
from ramet.paths import StateDir, StoreDir
from ramet.store import fuse, imagefs, mounting
from ramet.store.fuse import Opcode
from ramet.store.imagefs import FileSystem, Part

ID = "00000000000000aa"
NODE = int(ID, 16)
CONTENT = bytes(range(256)) * 512
BODIES = {
    Opcode.READ: fuse.READ_IN.pack(0, 0, 4096, 0, 0, 0, 0),
    Opcode.READDIR: fuse.READ_IN.pack(0, 0, 4096, 0, 0, 0, 0),
    Opcode.LOOKUP: ID.encode() + b"\0",
    Opcode.SETATTR: struct.pack("=IIQQ", 0, 0, 0, 0) + bytes(64),
    Opcode.FALLOCATE: struct.pack("=QQQII", 0, 0, 4096, 3, 0),
}


class Source:
    """A layer, which can be made to fail."""

    memory = False
    opened = 0
    closed = 0
    failure: Exception | None = None
    short = 0

    def __init__(self, files: StoreDir, layer_id: str) -> None:
        if not files.layer(layer_id).record.exists():
            raise LayerError(f"the layer {layer_id} is missing")
        Source.opened += 1
        self.size = len(CONTENT)

    def read(self, offset: int, length: int) -> list[Part]:
        if Source.failure:
            raise Source.failure
        data = memoryview(CONTENT)[offset : offset + length - Source.short]
        return [data[at : at + 1000] for at in range(0, len(data), 1000)]

    def close(self) -> None:
        Source.closed += 1


@pytest.fixture
def files(tmp_path: Path) -> StoreDir:
    state = StateDir(root=tmp_path)
    state.create()
    Source.opened = Source.closed = Source.short = 0
    Source.failure = None
    return state.store


def publish(files: StoreDir, layer_id: str = ID) -> None:
    files.layer(layer_id).root.mkdir()
    files.layer(layer_id).record.write_text(json.dumps({"size": len(CONTENT)}))


def ask(system: FileSystem, opcode: int, body: bytes = b"", node: int = NODE) -> bytes:
    return b"".join(system.answer(opcode, node, memoryview(body)))


def refused(system: FileSystem, opcode: int, body: bytes = b"", node: int = NODE) -> int | None:
    with pytest.raises(OSError) as caught:
        system.answer(opcode, node, memoryview(body))
    return caught.value.errno


def test_sizes_are_those_of_the_kernel_s_structures() -> None:
    """include/uapi/linux/fuse.h: fuse_in_header, fuse_out_header, fuse_init_out, fuse_attr_out, fuse_entry_out, fuse_open_out, fuse_statfs_out."""
    attr = fuse.attributes(2, 1, 0, 0)
    kernel = fuse.Kernel(major=7, minor=31, flags=0)
    made = [fuse.IN.size, fuse.OUT.size, len(fuse.init_answer(kernel)), len(fuse.attr_answer(attr)), len(fuse.entry(2, attr))]
    assert made == [40, 16, 64, 104, 128]
    assert [len(fuse.open_answer()), len(fuse.statfs(1)), fuse.READ_IN.size, len(attr)] == [16, 80, 40, 88]


def test_init_takes_what_the_kernel_offers_and_no_more() -> None:
    request = struct.pack("=IIII", 7, 45, 131072, fuse.Flag.ASYNC_READ | 1 << 5) + bytes(48)
    kernel = fuse.init_request(request)
    assert kernel.resends and not fuse.Kernel(major=7, minor=39, flags=0).resends
    major, minor, ahead, flags, background, congested, write, _, pages = struct.unpack_from("=IIIIHHIIH", fuse.init_answer(kernel))
    assert (major, minor, ahead, flags, pages) == (7, 31, 1 << 20, fuse.Flag.ASYNC_READ, 256)
    assert 0 < congested <= background and write == 4096
    for wrong in (b"", struct.pack("=IIII", 7, 30, 0, 0), struct.pack("=IIII", 8, 0, 0, 0)):
        with pytest.raises(ValueError, match=r"INIT|speaks"):
            fuse.init_request(wrong)


@given(names=st.sets(st.integers(2, 2**63 - 1), max_size=60), size=st.integers(40, 400))
def test_a_directory_is_listed_whole_whatever_the_size_of_a_piece(names: set[int], size: int) -> None:
    entries = sorted((node, f"{node:016x}") for node in names)
    found, offset = [], 0
    while piece := fuse.directory(entries, offset, size):
        assert len(piece) <= size and len(piece) % 8 == 0
        at = 0
        while at < len(piece):
            node, offset, length, kind = struct.unpack_from("=QQII", piece, at)
            assert kind == stat.S_IFREG >> 12
            found.append((node, piece[at + 24 : at + 24 + length].decode()))
            at += (24 + length + 7) // 8 * 8
    assert found == entries


@given(opcode=st.sampled_from([*Opcode, 5, 37, 99, 4096]), node=st.integers(0, 2**64 - 1), body=st.binary(max_size=200))
def test_no_request_is_too_strange_to_refuse(tmp_path_factory: pytest.TempPathFactory, opcode: int, node: int, body: bytes) -> None:
    files = StateDir(root=tmp_path_factory.getbasetemp() / "strange")
    files.create()
    try:
        FileSystem(files.store, Source).answer(opcode, node, memoryview(body))
    except OSError as error:
        assert error.errno


@pytest.mark.parametrize("opcode", BODIES)
def test_requests_cut_short_are_refused(files: StoreDir, opcode: Opcode) -> None:
    publish(files)
    system = FileSystem(files, Source)
    node = fuse.ROOT if opcode in (Opcode.LOOKUP, Opcode.READDIR) else NODE
    ask(system, opcode, BODIES[opcode], node)
    for length in (0, 1, 16):
        assert refused(system, opcode, BODIES[opcode][:length], node) == errno.EINVAL


def test_reads_end_where_the_layer_ends(files: StoreDir) -> None:
    publish(files)
    system = FileSystem(files, Source)
    for offset, size in ((0, 10), (5000, 100_000), (len(CONTENT) - 1, 4096), (len(CONTENT), 4096), (len(CONTENT) * 9, 1), (0, 1 << 20)):
        assert ask(system, Opcode.READ, fuse.READ_IN.pack(0, offset, size, 0, 0, 0, 0)) == CONTENT[offset : offset + size]
    assert Source.opened == 1
    assert refused(system, Opcode.READ, fuse.READ_IN.pack(0, 0, (1 << 20) + 1, 0, 0, 0, 0)) == errno.EINVAL
    assert refused(system, Opcode.READ, fuse.READ_IN.pack(0, 1 << 63, 1, 0, 0, 0, 0)) == errno.EINVAL


def test_a_source_that_answers_too_little_is_not_served(files: StoreDir) -> None:
    publish(files)
    system = FileSystem(files, Source)
    Source.short = 1
    assert refused(system, Opcode.READ, BODIES[Opcode.READ]) == errno.EIO
    assert "4095 bytes came of 4096" in files.faults.read_text()


@pytest.mark.parametrize("failure", [LayerError("blob x\nis damaged"), OSError(5, "disk"), MemoryError(), RuntimeError("a bug")])
def test_whatever_fails_is_one_line_and_is_tried_again(files: StoreDir, failure: Exception) -> None:
    publish(files)
    system = FileSystem(files, Source)
    Source.failure = failure
    assert refused(system, Opcode.READ, BODIES[Opcode.READ]) == errno.EIO
    (fault,) = mounting.faults(files, ID)
    assert (fault.layer, fault.offset) == (ID, 0) and fault.message
    assert Source.closed == 1
    Source.failure = None
    assert ask(system, Opcode.READ, BODIES[Opcode.READ]) == CONTENT[:4096]


@pytest.mark.parametrize("large", [False, True])
def test_what_is_read_around_a_page_of_a_memory_is_refused_when_some_is_not_here(
    files: StoreDir, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """Never what may be one folio: the kernel asks for that once, and an error would reach the guest."""
    publish(files)
    monkeypatch.setattr(Source, "memory", True)
    monkeypatch.setattr(imagefs, "_LARGE_FOLIOS", large)
    system = FileSystem(files, Source)

    def read(offset: int, size: int) -> str:
        try:
            return "read" if ask(system, Opcode.READ, fuse.READ_IN.pack(0, offset, size, 0, 0, 0, 0)) else "nothing"
        except AbsentError:
            return "parked"
        except BlockingIOError:
            return "refused"

    assert read(0, 3 * 4096) == "read"
    Source.failure = AbsentError("it is in a registry")
    assert read(4096, 4096) == "parked"
    assert [read(0, 3 * 4096), read(4096, 8192)] == ["refused", "refused"]
    assert read(8192, 8192) == ("parked" if large else "refused")
    monkeypatch.setattr(Source, "memory", False)
    assert read(0, 3 * 4096) == "parked"
    assert not files.faults.exists()


def test_faults_do_not_fill_the_disk(files: StoreDir) -> None:
    files.faults.write_bytes(b"x" * imagefs.FAULTS_LIMIT)
    assert refused(FileSystem(files, Source), Opcode.READ, BODIES[Opcode.READ]) == errno.EIO
    assert files.faults.stat().st_size == imagefs.FAULTS_LIMIT
    files.faults.unlink()
    files.faults.mkdir()
    assert refused(FileSystem(files, Source), Opcode.READ, BODIES[Opcode.READ]) == errno.EIO


def test_few_layers_are_open_at_once(files: StoreDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagefs, "OPEN_CHAINS", 2)
    system = FileSystem(files, Source)
    for node in (2, 3, 4, 4, 3):
        if not files.layer(f"{node:016x}").root.exists():
            publish(files, f"{node:016x}")
        ask(system, Opcode.READ, BODIES[Opcode.READ], node)
    assert (Source.opened, Source.closed) == (3, 1)
    system.close()
    assert Source.closed == 3


def test_answers_of_many_pieces_fit_one_writev(files: StoreDir, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(files)
    monkeypatch.setattr(imagefs, "MAX_PARTS", 3)
    (part,) = FileSystem(files, Source).read(NODE, 0, 4096)
    assert part == CONTENT[:4096]


def test_a_layer_that_is_being_saved_has_a_size_and_no_bytes_yet(files: StoreDir) -> None:
    system = FileSystem(files, Source)
    assert refused(system, Opcode.LOOKUP, BODIES[Opcode.LOOKUP], fuse.ROOT) == errno.ENOENT
    draft = files.draft(ID)
    draft.root.mkdir()
    assert refused(system, Opcode.LOOKUP, BODIES[Opcode.LOOKUP], fuse.ROOT) == errno.ENOENT  # its record is not written yet
    draft.record.write_text(json.dumps({"size": len(CONTENT)}))
    found = ask(system, Opcode.LOOKUP, BODIES[Opcode.LOOKUP], fuse.ROOT)
    assert struct.unpack_from("=Q", found)[0] == NODE and struct.unpack_from("=QQ", found, 40) == (NODE, len(CONTENT))
    assert refused(system, Opcode.READ, BODIES[Opcode.READ]) == errno.EIO
    assert [fault.message for fault in mounting.faults(files)] == [f"the layer {ID} is still being saved"]
    draft.root.rename(files.layer(ID).root)
    assert ask(system, Opcode.READ, BODIES[Opcode.READ]) == CONTENT[:4096]


def test_a_layer_published_between_two_looks_is_served(files: StoreDir) -> None:
    looks = []

    def open_source(store: StoreDir, layer_id: str) -> Source:
        looks.append(layer_id)
        if len(looks) == 1:
            publish(store)
            raise LayerError("is missing")
        return Source(store, layer_id)

    assert ask(FileSystem(files, open_source), Opcode.READ, BODIES[Opcode.READ]) == CONTENT[:4096]
    assert len(looks) == 2


def test_what_would_change_a_layer_is_refused(files: StoreDir) -> None:
    publish(files)
    system = FileSystem(files, Source)
    assert refused(system, Opcode.WRITE, bytes(80)) == errno.EROFS
    for size, wanted in ((0, errno.EPERM), (len(CONTENT) + 1, errno.EPERM)):
        assert refused(system, Opcode.SETATTR, struct.pack("=IIQQ", fuse.SIZE_GIVEN, 0, 0, size)) == wanted
    same = ask(system, Opcode.SETATTR, struct.pack("=IIQQ", fuse.SIZE_GIVEN, 0, 0, len(CONTENT)))
    assert same == ask(system, Opcode.GETATTR) == fuse.attr_answer(fuse.attributes(NODE, len(CONTENT), os.geteuid(), os.getegid()))
    for mode, offset, length, wanted in (
        (3, 0, 1 << 40, 0),
        (1, 0, 1 << 40, 0),
        (0, 0, len(CONTENT), 0),
        (0, 1, len(CONTENT), errno.EPERM),
    ):
        body = struct.pack("=QQQII", 0, offset, length, mode, 0)
        if wanted:
            assert refused(system, Opcode.FALLOCATE, body) == wanted
        else:
            assert ask(system, Opcode.FALLOCATE, body) == b""


def test_names_that_are_no_layer_s_are_never_paths(files: StoreDir) -> None:
    system = FileSystem(files, Source)
    for name in (
        b"..",
        b".",
        b"../../etc/passwd",
        b"0" * 16,
        b"0" * 15 + b"1",
        b"f" * 16,
        b"+" + b"0" * 14 + b"2",
        b"0x" + b"0" * 14,
        b"\xff" * 16,
    ):
        assert refused(system, Opcode.LOOKUP, name + b"\0", fuse.ROOT) == errno.ENOENT
    publish(files)
    assert refused(system, Opcode.LOOKUP, BODIES[Opcode.LOOKUP], NODE) == errno.ENOENT  # a file is no directory


def request(opcode: int, body: bytes = b"", *, unique: int = 7, length: int | None = None) -> memoryview:
    size = fuse.IN.size + len(body)
    return memoryview(fuse.IN.pack(size if length is None else length, opcode, unique, NODE, 0, 0, 0, 0, 0) + body)


def test_answers_carry_the_request_s_number_and_their_length(files: StoreDir) -> None:
    publish(files)
    system = FileSystem(files, Source)
    unique = 1 << 63 | 8  # one that was sent again
    reader, writer = os.pipe()
    try:
        imagefs.respond(writer, system, request(Opcode.READ, BODIES[Opcode.READ], unique=unique))
        assert os.read(reader, 65536) == fuse.OUT.pack(16 + 4096, 0, unique) + CONTENT[:4096]
        for wrong, number in (
            (request(Opcode.READ, b""), errno.EINVAL),
            (request(99), errno.ENOSYS),
            (request(3, length=41), errno.EINVAL),
        ):
            imagefs.respond(writer, system, wrong)
            assert os.read(reader, 65536) == fuse.OUT.pack(16, -number, 7)
        os.set_blocking(reader, False)
        for opcode in (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT):
            imagefs.respond(writer, system, request(opcode, bytes(16)))
            with pytest.raises(BlockingIOError):
                os.read(reader, 1)
    finally:
        os.close(reader)
        os.close(writer)


def test_damaged_lines_of_faults_are_skipped(files: StoreDir) -> None:
    assert mounting.faults(files) == []
    files.faults.write_text(f"12.5 {ID} 4096 blob x is damaged\n\nnonsense\n13.5 {ID} 40")
    (fault,) = mounting.faults(files)
    assert fault == mounting.Fault(time=12.5, layer=ID, offset=4096, message="blob x is damaged")
    assert mounting.faults(files, since=13) == []
