"""The layers of a snapshot as they leave a host, and how they become another's."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from ramet import packing, tables
from ramet.errors import LayerError
from ramet.paths import StateDir
from ramet.reference import sha256
from ramet.store import admission, index, remote
from ramet.store.chain import Chain
from ramet.store.layer import PAGE, Kind
from ramet.store.remote import Source
from ramet.store.runs import Runs
from ramet.store.store import Store

from .test_store import BASE, PAGES, WRITES, Bed, new_bed

SOURCE = Source(host="registry.example.com", path="acme/shop")


def trim_base(bed: Bed) -> str:
    """The base as file systems are: whole pages. A layer of it."""
    path = bed.state.root / BASE
    path.write_bytes(path.read_bytes()[: (PAGES - 9) * PAGE])
    content = path.read_bytes()
    with open(path, "rb") as file, bed.store.draft(Kind.DISK, len(content)) as draft:
        made = bed.store.publish_sealed(draft, file.fileno(), Runs.build([(0, len(content) // PAGE, 0)]))
    return made.id


@contextlib.contextmanager
def packed(bed: Bed, *heads: str, base: str = "") -> Iterator[packing.Packer]:
    with contextlib.ExitStack() as stack:
        packer = packing.Packer(
            bed.state.store, stack, {BASE: base} if base else {}, lambda head, wants: pytest.fail("nothing is elsewhere")
        )
        packer.pack(heads)
        yield packer


def admitted(packer: packing.Packer, root: Path) -> Store:
    """Another host's store, with all that was packed."""
    state = StateDir(root=root)
    state.create()
    store = Store(state.store)
    sizes = {cargo.digest: cargo.size for sent in packer.sent.values() for cargo in sent.blobs}
    for sent in packer.sent.values():
        found = tables.unpack(sent.data, sent.name)
        assert found.pack() == sent.data
        assert tables.fits(found, sizes) == ""
        admission.admit(store, found.record(sent.name), found.owners, found.index, sizes, SOURCE)
        for cargo in sent.blobs:
            content = cargo.read(0, cargo.size)
            assert sha256(content) == cargo.digest
            state.store.blob(cargo.digest).write_bytes(content)
    return store


def read(store: Store, layer_id: str) -> bytes:
    with Chain.open(store.files, layer_id) as chain:
        return b"".join(chain.read(0, chain.size))


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    with new_bed(tmp_path / "here") as bed:
        yield bed


# --- packing ---


def test_layers_read_the_same_elsewhere(bed: Bed, tmp_path: Path) -> None:
    base = trim_base(bed)
    below = bed.layer({0: 9, 4: None, 70: 3}, kind=Kind.DISK, base=BASE, sealed=True)
    disk = bed.layer({0: 9, 6: 11, 5: None}, kind=Kind.DISK, parent=below.id, sealed=True)
    memory = bed.layer({0: 1, 1: 2, 40: 3}, sealed=True)
    more = bed.layer({1: 2, 2: 5, 40: None}, parent=memory.id, sealed=True)
    with packed(bed, disk.id, more.id, base=base) as packer:
        store = admitted(packer, tmp_path / "there")
        for made in (disk, more):
            name = tables.local_id(packer.sent[made.id].name)
            assert read(store, name) == bytes(bed.want[made.id])
            assert store.verify(name) == []


@settings(max_examples=40, deadline=None)
@given(first=WRITES, second=WRITES, third=WRITES, other=WRITES, disk=WRITES)
def test_any_chain_reads_the_same_elsewhere(
    tmp_path_factory: pytest.TempPathFactory, first: Any, second: Any, third: Any, other: Any, disk: Any
) -> None:
    root = tmp_path_factory.mktemp("pack")
    with new_bed(root / "here") as bed:
        base = trim_base(bed)
        bed.layer(other, sealed=True)  # what it shares with the others stays here
        parent = ""
        for writes in (first, second, third):
            parent = bed.layer(writes, parent=parent, sealed=True).id
        over = bed.layer(disk, kind=Kind.DISK, base=BASE, sealed=True).id
        with packed(bed, over, parent, base=base) as packer:
            store = admitted(packer, root / "there")
            for made in (over, parent):
                assert read(store, tables.local_id(packer.sent[made].name)) == bytes(bed.want[made])
            assert sent_frames(packer) <= all_marks(bed, *packer.sent)


def all_marks(bed: Bed, *layers: str) -> set[bytes]:
    found = [(bed.store.files.layer(name), bed.store.get(name)) for name in layers]
    indexes = [index.of_layer(files, record) for files, record in found]
    return {each.mark(row) for each in indexes for row in range(len(each))}


def sent_frames(packer: packing.Packer) -> set[bytes]:
    """The marks of all frames in all blobs that go, by the blobs' own tables."""
    found = set()
    for cargo in (cargo for sent in packer.sent.values() for cargo in sent.blobs):
        content = cargo.read(0, cargo.size)
        count = int.from_bytes(content[-9:-5], "little")
        at = 0
        for number in range(count):
            entry = content[len(content) - 9 - 8 * (count - number) :]
            length = int.from_bytes(entry[:4], "little")
            found.add(hashlib.sha256(content[at : at + length]).digest()[:16])
            at += length
    return found


def test_only_what_the_layers_need_goes(bed: Bed) -> None:
    """A blob that is shared with others goes as another, of what is needed alone."""
    shared = {number: number + 200 for number in range(16)}
    bed.layer(shared | {number: number + 300 for number in range(16, 48)}, sealed=True)
    own = bed.layer(shared | {64: 999}, sealed=True)
    assert len(own.blobs) == 2
    with packed(bed, own.id) as packer:
        (sent,) = packer.sent.values()
        assert sent_frames(packer) == all_marks(bed, own.id)
        assert not {cargo.digest for cargo in sent.blobs} >= set(own.blobs)
        names = sent.name, [cargo.digest for cargo in sent.blobs]
    with packed(bed, own.id) as packer:  # the same the next time
        (sent,) = packer.sent.values()
        assert (sent.name, [cargo.digest for cargo in sent.blobs]) == names
    assert not [path for path in bed.blobs() if path.name.startswith(".")]


def test_what_is_the_same_is_called_the_same(bed: Bed) -> None:
    """Also when another snapshot is sent with it, so that a registry has it once."""
    memory = bed.layer({0: 1, 1: 2, 40: 3}, sealed=True)
    more = bed.layer({1: 5}, parent=memory.id, sealed=True)
    with packed(bed, memory.id) as one, packed(bed, more.id) as two:
        assert one.sent[memory.id].name == two.sent[memory.id].name
        assert one.sent[memory.id].data == two.sent[memory.id].data


def test_a_layer_of_which_only_the_pages_are_left(bed: Bed, tmp_path: Path) -> None:
    first = bed.layer({0: 1, 20: 3}, sealed=True)
    second = bed.layer({20: 5, 30: 7}, parent=first.id, sealed=True)
    third = bed.layer({0: 2, 40: 9}, parent=second.id, sealed=True)
    bed.store.gc([third.id])
    assert first.id not in {each.id for each in bed.store.layers()}
    with packed(bed, third.id) as packer:
        assert set(packer.sent) == {second.id, third.id}
        store = admitted(packer, tmp_path / "there")
        assert read(store, tables.local_id(packer.sent[third.id].name)) == bytes(bed.want[third.id])


def test_damage_does_not_go(bed: Bed) -> None:
    shared = {number: number + 201 for number in range(0, 32, 2)}
    bed.layer(shared | {40: 301}, sealed=True)
    own = bed.layer(shared, sealed=True)
    path = bed.store.files.blob(own.blobs[0])
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(LayerError, match="damaged"), packed(bed, own.id):
        pass
    path.unlink()
    with pytest.raises(LayerError, match="missing"), packed(bed, own.id):
        pass
    with pytest.raises(LayerError, match="not compressed"), packed(bed, bed.layer({1: 1}).id):
        pass


# --- admission ---


def test_a_layer_is_admitted_once(bed: Bed, tmp_path: Path) -> None:
    made = bed.layer({0: 1, 20: 3}, sealed=True)
    with packed(bed, made.id) as packer:
        store = admitted(packer, tmp_path / "there")
        (sent,) = packer.sent.values()
    found = tables.unpack(sent.data, sent.name)
    record = found.record(sent.name)
    sizes = {digest: store.files.blob(digest).stat().st_size for digest in found.blobs}
    here = store.get(record.id)
    assert here.origin == sent.name
    other = Source(host="other.example.com", path="shop")
    assert admission.admit(store, record, found.owners, found.index, sizes, other) == here
    known = remote.load(store.files, found.blobs[0])
    assert known is not None
    assert known.sources == (other, SOURCE)
    with pytest.raises(LayerError, match="another"):
        admission.admit(store, replace(record, origin="sha256:" + "0" * 64), found.owners, found.index, sizes, SOURCE)
    with pytest.raises(LayerError, match="bytes here"):
        admission.admit(store, record, found.owners, found.index, dict.fromkeys(sizes, 5), SOURCE)
    assert store.files.blob(found.blobs[0]).stat().st_size == sizes[found.blobs[0]]


def test_an_admission_that_is_killed_leaves_nothing_in_the_way(bed: Bed, tmp_path: Path) -> None:
    made = bed.layer({0: 1, 20: 3}, sealed=True)
    with packed(bed, made.id) as packer:
        (sent,) = packer.sent.values()
        content = {cargo.digest: cargo.read(0, cargo.size) for cargo in sent.blobs}
    found = tables.unpack(sent.data, sent.name)
    record = found.record(sent.name)
    sizes = {digest: len(data) for digest, data in content.items()}
    for step in range(100):
        state = StateDir(root=tmp_path / f"there{step}")
        state.create()
        store = Store(state.store)
        if not (pid := os.fork()):
            dying(step)
            admission.admit(store, record, found.owners, found.index, sizes, SOURCE)
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        if step % 2:
            store.gc([])
        admission.admit(store, record, found.owners, found.index, sizes, SOURCE)
        for digest, data in content.items():
            state.store.blob(digest).write_bytes(data)
        assert read(store, record.id) == bytes(bed.want[made.id])
        assert [path.name for path in state.store.layers.iterdir()] == [record.id]
        if not killed:
            break
    assert step > 10


def dying(step: int) -> None:
    """Have this process end at its step-th change of the disk."""
    left = [step]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return real(*arguments, **named)

        return call

    for name in ("open", "ftruncate", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    Path.rename = counted(Path.rename)  # type: ignore[method-assign]
    Path.replace = counted(Path.replace)  # type: ignore[method-assign]
