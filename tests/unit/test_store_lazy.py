"""Layers that are not here: what reading them takes, what is not done to them, and layers that are the base of others."""

from __future__ import annotations

import dataclasses
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.errors import AbsentError, LayerError, SpecError
from ramet.store import blob, layer, remote, tracing
from ramet.store.chain import Chain
from ramet.store.layer import CHUNK, CHUNK_PAGES, PAGE, Kind, Layer
from ramet.store.remote import Want
from ramet.store.tracing import Recorder
from tests.unit.faraway import bring, drop, elsewhere, give_away
from tests.unit.test_store import PAGES, STEPS, Bed, new_bed

SIZE = PAGES * PAGE
ALL: dict[int, int | None] = {number: 1 + 2 * number for number in range(PAGES)}


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    with new_bed(tmp_path / "state") as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read once may be served from memory: here it is read each time."""
    monkeypatch.setattr(blob, "frames", blob.Frames(0))


def base_layer(bed: Bed, pages: int, writes: dict[int, int | None]) -> str:
    """A sealed disk of so many pages; what a layer's `base` is to be, then."""
    made = bed.layer(
        {number: content for number, content in writes.items() if number < pages}, kind=Kind.DISK, size=pages * PAGE, sealed=True
    )
    (bed.state.root / f"layer:{made.id}").write_bytes(bed.want[made.id])  # what the bed reads of a base
    return f"layer:{made.id}"


def absent(bed: Bed, layer_id: str, offset: int = 0, length: int = SIZE) -> AbsentError:
    with pytest.raises(AbsentError) as caught:
        bed.read(layer_id, offset, length)
    return caught.value


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, below=st.sampled_from(["", "layer"]), pages=st.integers(1, PAGES + 3), seed=st.integers(0, 1 << 30))
def test_what_a_read_wants_is_what_it_needs(
    steps: list[tuple[dict[int, int | None], int, str, list[int]]], below: str, pages: int, seed: int
) -> None:
    """Of random trees, some layers of which are spools: with the frames that are wanted a read succeeds, and without any one of them it does not."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as root, new_bed(Path(root)) as bed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(blob, "frames", blob.Frames(0))
        base = base_layer(bed, pages, ALL) if below else ""
        made: list[Layer] = []
        for writes, which, how, to_seal in steps:
            parent = made[which % len(made)].id if made and which else ""
            new = bed.layer(writes, parent, kind=Kind.DISK, base="" if parent else base, sealed=how == "sealed")
            made.append(new)
            for number in to_seal:
                bed.store.seal(made[number % len(made)].id)
        digests = give_away(bed.store.files, *bed.store.layers())
        for _ in range(6):
            first = rng.randrange(PAGES)
            end = rng.randint(first + 1, PAGES)
            drop(bed.store.files, digests)
            with Chain.open(bed.store.files, rng.choice(made).id) as chain:
                check_wants(bed, chain, first, end, rng)


def check_wants(bed: Bed, chain: Chain, first: int, end: int, rng: random.Random) -> None:
    wanted = bed.want[chain._head.id][first * PAGE : end * PAGE]
    wants = chain.wants(first, end)
    if wants:
        left_out = rng.choice(wants)
        bring(bed.store.files, (each for each in wants if each != left_out))
        with pytest.raises(AbsentError) as caught:
            chain.read(first * PAGE, (end - first) * PAGE)
        assert caught.value.details == {"blob": left_out.blob, "offset": left_out.offset}
        bring(bed.store.files, [left_out])
    assert b"".join(chain.read(first * PAGE, (end - first) * PAGE)) == wanted


def test_what_is_missing_is_fetched_and_read(bed: Bed) -> None:
    made = bed.layer(ALL, sealed=True)
    give_away(bed.store.files, made)
    asked: list[list[Want]] = []

    def fetch(wants: list[Want]) -> None:
        asked.append(wants)
        bring(bed.store.files, wants)

    with Chain.open(bed.store.files, made.id, fetch=fetch) as chain:
        assert b"".join(chain.read(5 * PAGE, 3 * PAGE)) == bed.want[made.id][5 * PAGE : 8 * PAGE]
        assert b"".join(chain.read(0, SIZE)) == bed.want[made.id]
        assert b"".join(chain.read(0, SIZE)) == bed.want[made.id]
    assert [len(wants) for wants in asked] == [1, 5]
    drop(bed.store.files, made.blobs)
    with open(bed.state.root / "out", "w+b") as out:
        bed.store.export(made.id, out, fetch=fetch)
        assert (bed.state.root / "out").read_bytes() == bed.want[made.id]


def test_what_cannot_be_fetched_is_said_and_what_is_gone_at_once_ends(bed: Bed) -> None:
    made = bed.layer(ALL, sealed=True)
    give_away(bed.store.files, made)

    def refuse(wants: list[Want]) -> None:
        raise AbsentError("the registry is closed")

    rounds: list[int] = []
    with Chain.open(bed.store.files, made.id, fetch=refuse) as chain, pytest.raises(AbsentError, match="the registry is closed"):
        chain.read(0, PAGE)
    with Chain.open(bed.store.files, made.id, fetch=lambda wants: rounds.append(1)) as chain, pytest.raises(AbsentError, match=made.id):
        chain.read(0, PAGE)
    assert 1 < len(rounds) < 100


def test_a_blob_without_a_source_is_damaged_not_absent(bed: Bed) -> None:
    made = bed.layer(ALL, sealed=True)
    [digest] = give_away(bed.store.files, made)
    assert absent(bed, made.id).details["blob"] == digest
    bed.store.files.remote(digest).unlink()
    with pytest.raises(LayerError, match="damaged") as caught:
        bed.read(made.id)
    assert not isinstance(caught.value, AbsentError)
    with Chain.open(bed.store.files, made.id) as chain:
        assert chain.wants(0, PAGES) == []


def test_a_file_that_is_gone_or_short_is_absent_too(bed: Bed) -> None:
    made = bed.layer(ALL, sealed=True)
    [digest] = give_away(bed.store.files, made)
    os.truncate(bed.store.files.blob(digest), 100)
    absent(bed, made.id)
    bed.store.files.blob(digest).unlink()
    absent(bed, made.id)
    with Chain.open(bed.store.files, made.id) as chain:
        with pytest.raises(AbsentError):
            chain.read(0, PAGE)
        bed.store.files.blob(digest).write_bytes(elsewhere(bed.store.files, digest).read_bytes())
        assert b"".join(chain.read(0, SIZE)) == bed.want[made.id]


def test_verify_takes_what_is_elsewhere_for_whole_and_names_what_is_damaged_here(bed: Bed) -> None:
    made = bed.layer(ALL, sealed=True)
    [digest] = give_away(bed.store.files, made)
    child = bed.layer({3: 7}, made.id)
    assert bed.store.verify(child.id) == []
    with Chain.open(bed.store.files, made.id) as chain:
        wants = chain.wants(0, PAGES)
    bring(bed.store.files, wants[1:3])
    assert bed.store.verify(child.id) == []  # also where a block has the end of one frame and the begin of another
    middle = wants[1].offset + wants[1].length // 2
    with open(bed.store.files.blob(digest), "r+b") as file:
        flipped = os.pread(file.fileno(), 1, middle)[0] ^ 1
        os.pwrite(file.fileno(), bytes([flipped]), middle)
    [problem] = bed.store.verify(child.id)
    assert f"layer {made.id}, chunk 1: blob {digest} is damaged at {wants[1].offset}" in problem
    absent(bed, made.id, CHUNK, PAGE)  # it is fetched again where it is needed
    bring(bed.store.files, wants)
    assert bed.store.verify(child.id) == [] and bed.read(child.id) == bed.want[child.id]


def test_a_remote_blob_that_is_all_here_is_held_against_its_name(bed: Bed) -> None:
    made = bed.layer(ALL, sealed=True)
    [digest] = give_away(bed.store.files, made)
    good = elsewhere(bed.store.files, digest).read_bytes()
    bed.store.files.blob(digest).write_bytes(good[:-1] + b"x")
    assert bed.store.verify(made.id) == []
    found = remote.load(bed.store.files, digest)
    assert found
    remote.save(bed.store.files, dataclasses.replace(found, whole=True))
    [problem] = bed.store.verify(made.id)
    assert "does not match its name" in problem


def test_sealing_neither_fetches_nor_refers_to_what_can_be_given_up(bed: Bed) -> None:
    """A page that is as in the parent is kept again where the parent is not here, and a chunk that another's remote blob has is written once more."""
    parent, other = bed.layer(ALL, sealed=True), bed.layer({number: 1 + number for number in range(16)}, sealed=True)
    digests = give_away(bed.store.files, parent, other)
    again = {**{number: ALL[number] for number in range(32)}, 40: 8, 41: 0, 42: None}
    new = bed.layer(again, parent.id)
    same = bed.layer({number: 1 + number for number in range(16)} | {60: 9})
    sealed = [bed.store.seal(new.id), bed.store.seal(same.id)]
    for made in sealed:
        assert made.blobs and not set(made.blobs) & set(digests)
    assert sealed[0].data_bytes >= 33 * PAGE
    assert sum(remote.absent(bed.store.files, digest) for digest in digests) > 0
    with Chain.open(bed.store.files, parent.id) as chain:
        bring(bed.store.files, chain.wants(0, CHUNK_PAGES))
    twice = bed.store.seal(bed.layer(again, parent.id).id)
    assert sealed[0].data_bytes - twice.data_bytes == CHUNK  # what is here is compared, and pointed to
    with Chain.open(bed.store.files, parent.id) as chain:
        bring(bed.store.files, chain.wants(0, PAGES))
    bed.check(new.id, same.id, twice.id)


def test_nothing_of_a_fetched_layer_is_adopted(bed: Bed) -> None:
    first = bed.layer(dict.fromkeys(range(8), 2), sealed=True)
    second = bed.layer({9: 3}, first.id, sealed=True)
    third = bed.layer({20: 5}, second.id)
    assert bed.store.adoptable(third.id, [third.id]) == sorted([first.id, second.id])
    give_away(bed.store.files, first)
    assert bed.store.adoptable(third.id, [third.id]) == [second.id]
    made = bed.store.seal(third.id, adopt=[first.id, second.id])
    assert made.chain == (first.id, third.id)
    freed = bed.store.gc([third.id])
    assert freed.layers == (second.id,)
    files = bed.store.files.layer(third.id)
    layer.save(files, dataclasses.replace(made, origin="sha256:" + "0" * 64), durable=False)
    assert bed.store.adoptable(third.id, [third.id]) == []
    assert bed.store.seal(third.id, adopt=[first.id]).tables == made.tables
    with Chain.open(bed.store.files, third.id) as chain:
        bring(bed.store.files, chain.wants(0, PAGES))
    bed.check(third.id)


def test_a_layer_as_base(bed: Bed) -> None:
    base = base_layer(bed, 30, ALL)
    base_id = base.removeprefix("layer:")
    bottom = bed.layer({0: 2, 5: None, 29: 0, 31: 7}, kind=Kind.DISK, base=base)
    child = bed.layer({1: 102, 6: None, 50: 0}, bottom.id, kind=Kind.DISK)
    assert child.base == base and bottom.base_layer == base_id
    bed.check(bottom.id, child.id)
    for each in (bottom.id, child.id):
        bed.store.seal(each)
    bed.check()
    assert bed.store.adoptable(child.id, [child.id]) == [bottom.id]
    bed.store.seal(child.id, adopt=[bottom.id])
    freed = bed.store.gc([child.id])
    assert freed.layers == (bottom.id,) and base_id not in freed.layers
    bed.check(child.id)
    [digest] = bed.store.get(base_id).blobs
    bed.store.files.blob(digest).unlink()
    assert any(base_id in problem for problem in bed.store.verify(child.id))
    assert set(bed.store.gc([]).layers) == {base_id, child.id}


def test_a_draft_keeps_its_base(bed: Bed) -> None:
    base = base_layer(bed, 30, ALL)
    with bed.store.draft(Kind.DISK, SIZE, base=base):
        assert bed.store.gc([]).layers == ()
    assert bed.store.gc([]).layers == (base.removeprefix("layer:"),)


def test_what_cannot_be_a_base(bed: Bed) -> None:
    spool = bed.layer({1: 1}, kind=Kind.DISK)
    memory = bed.layer({1: 1}, sealed=True)
    based = bed.layer({1: 1}, kind=Kind.DISK, base=base_layer(bed, 3, ALL), sealed=True)
    for wrong in (spool.id, memory.id, based.id, "../../../../etc/passwd", "0" * 16, ""):
        with pytest.raises(SpecError):
            bed.store.draft(Kind.DISK, SIZE, base=f"layer:{wrong}")
    with pytest.raises(LayerError, match="is missing"):
        bed.store.draft(Kind.DISK, SIZE, base="layer:00000000000000aa")
    with pytest.raises(SpecError, match="only a disk"):
        bed.store.draft(Kind.MEMORY, SIZE, base=based.base)


def test_a_record_with_a_base_in_a_circle_is_damage(bed: Bed) -> None:
    one, two = (bed.layer({1: 1}, kind=Kind.DISK, sealed=True) for _ in range(2))
    for this, other in ((one, two), (two, one)):
        layer.save(bed.store.files.layer(this.id), dataclasses.replace(this, base=f"layer:{other.id}"), durable=False)
    with pytest.raises(LayerError, match="that is no disk without a base"):
        bed.read(one.id)
    assert bed.store.verify(one.id)


def test_a_hostile_origin_is_damage(bed: Bed) -> None:
    made = bed.layer({1: 1})
    layer.save(bed.store.files.layer(made.id), dataclasses.replace(made, origin="../../x"), durable=False)
    with pytest.raises(LayerError, match="no blob"):
        bed.store.get(made.id)


def test_a_trace_has_each_chunk_once_in_the_order_of_first_touch(bed: Bed) -> None:
    made = bed.layer(ALL)
    files = bed.store.files.layer(made.id)
    assert tracing.load(bed.store.files, made.id) == []
    assert bed.store.end_trace(made.id) == []
    nobody = Recorder(files.tracing)
    nobody.note(0, PAGE)
    assert not nobody and not files.tracing.exists()
    bed.store.begin_trace(made.id)
    recorders = [Recorder(files.tracing) for _ in range(2)]
    recorders[0].note(3 * CHUNK + 5, 2 * CHUNK)
    recorders[1].note(0, 1)
    recorders[0].note(4 * CHUNK, 0)
    recorders[1].note(4 * CHUNK - 1, CHUNK)
    recorders[0].note(99 * CHUNK, 1)  # there is no such chunk, as there is no chunk 5
    assert bed.store.end_trace(made.id) == [3, 4, 0] == tracing.load(bed.store.files, made.id)
    assert not files.tracing.exists()
    for recorder in recorders:
        recorder.note(0, 1)
        recorder.close()
    data = bytearray(files.trace.read_bytes())
    data[-1] ^= 1
    files.trace.write_bytes(data)
    assert tracing.load(bed.store.files, made.id) == []


def test_a_trace_on_a_full_disk_is_cut_short(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bed.layer(ALL)
    bed.store.begin_trace(made.id)
    recorder = Recorder(bed.store.files.layer(made.id).tracing)
    recorder.note(CHUNK, 1)
    whole = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: whole(fd, data[:3]))
    recorder.note(2 * CHUNK, 1)
    monkeypatch.undo()
    recorder.note(3 * CHUNK, 1)
    assert not recorder
    assert bed.store.end_trace(made.id) == [1]
