"""Layers that take over what they need of those below, so that chains do not grow; against the same model as the others."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.errors import LayerError
from ramet.paths import LayerDir
from ramet.store import adoption, blob, layer, store
from ramet.store.chain import Chain, published, published_owners
from ramet.store.layer import PAGE, Kind, Layer
from ramet.store.runs import Owners, Runs
from ramet.store.store import Store
from tests.unit.test_store import BASE, PAGES, WRITES, Bed, new_bed, page
from tests.unit.test_store_crash import SEAL, killed_at, leftovers

CONTENT: dict[int, int | None] = {number: 1 + 2 * number for number in range(60)}


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    with new_bed(tmp_path / "state") as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read must come from files that are there."""
    monkeypatch.setattr(blob, "frames", blob.Frames(0))


def files_of(bed: Bed) -> list[str]:
    return sorted(str(path.relative_to(bed.store.files.root)) for path in bed.store.files.root.rglob("*") if path.is_file())


def three(bed: Bed) -> tuple[Layer, Layer, Layer]:
    """Each with pages of its own, changed and unchanged ones of those below, zeros, and chunks that the next ones share."""
    first = bed.layer(CONTENT)
    second = bed.layer({0: 700, 1: 3, 17: 701, 18: None, 33: 2, 70: 5}, first.id)
    third = bed.layer({0: 800, 2: 5, 17: 701, 33: 67, 34: 0, 71: 6}, second.id)
    return first, second, third


STEPS = st.lists(
    st.tuples(
        WRITES,
        st.integers(0, 9),
        st.sampled_from(["spool", "sealed", "durable"]),
        st.lists(st.tuples(st.integers(0, 9), st.frozensets(st.integers(0, 9), max_size=6)), max_size=3),
        st.booleans(),
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=80, deadline=None)
@given(steps=STEPS, is_disk=st.booleans(), tail=st.sampled_from([0, 512, PAGE - 512]), seed=st.integers(0, 1 << 30))
def test_any_adoption_changes_no_content(
    steps: list[tuple[dict[int, int | None], int, str, list[tuple[int, frozenset[int]]], bool]], is_disk: bool, tail: int, seed: int
) -> None:
    """Trees of spools and sealed layers, sealed and sealed anew with any others adopted, collected meanwhile, while all chains stay open."""
    kind, base, size = (Kind.DISK, BASE, PAGES * PAGE - tail) if is_disk else (Kind.MEMORY, "", PAGES * PAGE)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as root, new_bed(Path(root)) as bed:
        made: list[str] = []
        chains: dict[str, Chain] = {}
        for writes, which, how, to_seal, collect in steps:
            parent = made[which % len(made)] if made and which else ""
            new = bed.layer(
                writes, parent, kind=kind, size=size, base="" if parent else base, durable=how == "durable", sealed=how == "sealed"
            )
            made.append(new.id)
            chains[new.id] = Chain.open(bed.store.files, new.id)
            for number, others in to_seal:
                adopt = {made[other % len(made)] for other in others} - {made[number % len(made)]}
                sealed = bed.store.seal(made[number % len(made)], adopt=adopt)
                assert not adopt & {*sealed.chain, *sealed.beneath}
                assert sealed == bed.store.get(sealed.id)
            if collect:
                made = rng.sample(made, rng.randrange(1, len(made) + 1))
                bed.store.gc(made)
                for name in chains.keys() - set(made):
                    chains.pop(name).close()
            for name, chain in chains.items():
                for _ in range(3):
                    offset, length = rng.randrange(size), rng.randrange(1, size)
                    assert b"".join(chain.read(offset, length)) == bed.want[name][offset : offset + length]
            bed.check(*made)
        for chain in chains.values():
            chain.close()
        last = made[-1]
        bed.store.seal(last, adopt=bed.store.adoptable(last, [last]))
        bed.store.gc([last])
        assert [each.id for each in bed.store.layers()] == [last]
        bed.check(last)


@pytest.mark.parametrize("sealed", [(), (0,), (0, 1), (0, 1, 2), (2,), (1, 2), (2, 1, 0)])
def test_what_was_adopted_can_go(bed: Bed, sealed: tuple[int, ...]) -> None:
    layers = three(bed)
    last = layers[2].id
    for number in sealed:
        bed.store.seal(layers[number].id)
    with Chain.open(bed.store.files, last) as chain, Chain.open(bed.store.files, last) as unread:
        assert b"".join(chain.read(0, 1 << 30)) == bed.want[last]
        record = bed.store.seal(last, adopt=[layers[0].id, layers[1].id])
        assert (record.sealed, record.chain, record.beneath) == (True, (last,), ())
        bed.check()
        assert set(bed.store.gc([last]).layers) == {layers[0].id, layers[1].id}
        assert len(bed.blobs()) == 1
        assert b"".join(chain.read(0, 1 << 30)) == bed.want[last]
        assert b"".join(unread.read(0, 1 << 30)) == bed.want[last]
    assert len(files_of(bed)) == 4
    bed.check(last)
    assert record.stored_bytes == bed.blobs()[0].stat().st_size + layer.index_file(bed.store.files.layer(last), record).stat().st_size
    assert bed.store.seal(last, adopt=[layers[0].id]) == record  # there is nothing left to adopt


def test_a_reader_that_was_just_told_of_what_is_gone_then(bed: Bed) -> None:
    first, second, third = three(bed)
    find = published(bed.store.files)
    old = find(third.id)
    told: list[str] = []

    def locate(name: str) -> tuple[Layer, LayerDir]:
        told.append(name)
        if len(told) != 2:
            return find(name)
        bed.store.seal(third.id, adopt=[first.id, second.id])
        bed.store.gc([third.id])
        return old

    with Chain.open(bed.store.files, third.id, locate) as chain:
        assert b"".join(chain.read(0, 1 << 30)) == bed.want[third.id]
    assert told.count(third.id) == 3


def test_what_stands_on_it_meanwhile_is_not_touched(bed: Bed) -> None:
    first, second, third = three(bed)
    above = bed.layer({5: 900}, third.id)
    bed.store.seal(third.id, adopt=[first.id, second.id])
    assert bed.store.get(above.id) == above
    bed.check()
    assert set(bed.store.adoptable(above.id, [third.id])) == {first.id, second.id}
    bed.store.gc([above.id, third.id])
    bed.check(above.id, third.id)
    after = bed.layer({6: 900}, third.id)
    assert after.chain == (third.id, after.id)
    record = bed.store.seal(above.id, adopt=[first.id, second.id])
    assert record.chain == (third.id, above.id)
    assert set(bed.store.gc([above.id, after.id]).layers) == {first.id, second.id}
    bed.check(above.id, third.id, after.id)


def test_large_layers_stay_where_they_are(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = three(bed)
    bed.store.seal(first.id)
    monkeypatch.setattr(adoption, "LARGEST", 8 * PAGE)
    record = bed.store.seal(third.id, adopt=[first.id, second.id])
    assert record.chain == (first.id, third.id)
    assert record.data_bytes <= 8 * PAGE
    assert bed.store.gc([third.id]).layers == (second.id,)
    bed.check(third.id)
    assert bed.store.seal(third.id, adopt=[first.id]) == record
    monkeypatch.setattr(adoption, "LARGEST", 60 * PAGE)
    assert bed.store.seal(third.id, adopt=[first.id]).chain == (third.id,)
    bed.store.gc([third.id])
    bed.check(third.id)


def test_zeros_weigh_nothing(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bed.layer(CONTENT)
    bed.store.seal(first.id)
    second = bed.layer(dict.fromkeys(range(50), None), first.id)
    third = bed.layer({70: 1}, second.id)
    monkeypatch.setattr(adoption, "LARGEST", 0)
    assert bed.store.seal(third.id, adopt=[second.id]).chain == (first.id, third.id)
    bed.store.gc([third.id])
    bed.check(third.id)


def test_a_large_layer_is_not_written_again(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adoption, "LARGEST", 20 * PAGE)
    monkeypatch.setattr(store, "LARGEST", 20 * PAGE)
    first = bed.layer({number: 500 + number for number in range(60, 70)})
    large = bed.store.seal(bed.layer(CONTENT, first.id).id)
    record = bed.store.seal(large.id, adopt=[first.id])
    bed.store.gc([large.id])
    assert record.chain == (large.id,)
    assert set(large.blobs) < set(record.blobs)
    assert len(bed.blobs()) == 2
    assert record.stored_bytes > sum(path.stat().st_size for path in bed.blobs())
    assert bed.store.files.blob(record.blobs[0]).stat().st_size < 20 * PAGE  # two chunks of five
    bed.check(large.id)


def test_identical_frames_of_those_that_stay_are_referred_to(bed: Bed) -> None:
    twin = bed.store.seal(bed.layer(CONTENT).id)
    first = bed.layer(CONTENT)
    second = bed.layer({70: 1}, first.id)
    record = bed.store.seal(second.id, adopt=[first.id])
    assert twin.blobs[0] in record.blobs
    bed.store.gc([second.id])
    bed.check(second.id)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("step", [*SEAL, "seal owners"])
def test_killed_while_adopting(bed: Bed, step: str, sealed: bool) -> None:
    first, second, third = three(bed)
    bed.store.seal(first.id)
    if sealed:
        bed.store.seal(third.id)
    adopt = [first.id, second.id]
    before = bed.store.get(third.id)
    with Chain.open(bed.store.files, third.id) as chain:
        assert killed_at(bed, step, lambda store: store.seal(third.id, adopt=adopt))
        assert (bed.store.get(third.id) == before) is (step != "seal spool")
        bed.check()
        bed.store.gc([third.id])
        assert not leftovers(bed)
        bed.check(third.id)
        assert b"".join(chain.read(0, 1 << 30)) == bed.want[third.id]
        assert bed.store.seal(third.id, adopt=adopt).chain == (third.id,)
        bed.store.gc([third.id])
        assert b"".join(chain.read(0, 1 << 30)) == bed.want[third.id]
    assert len(files_of(bed)) == 4  # record, owners, index, blob
    bed.check(third.id)


def test_damage_is_not_adopted(bed: Bed) -> None:
    first, second, third = three(bed)
    bed.store.seal(first.id)
    [path] = bed.blobs()
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    with pytest.raises(LayerError, match=first.id):
        bed.store.seal(third.id, adopt=[first.id, second.id])
    assert bed.store.get(third.id) == third
    assert not leftovers(bed)
    assert bed.read(third.id, 40 * PAGE, PAGE) == bed.want[third.id][40 * PAGE : 41 * PAGE]


def test_fifty_generations_leave_nothing_behind(bed: Bed) -> None:
    """Fork, delete the parent: a memory and a disk with a base, sealed in the background or too late."""
    rng = random.Random(3)
    heads = {Kind.MEMORY: bed.store.seal(bed.layer(CONTENT).id), Kind.DISK: bed.layer(CONTENT, kind=Kind.DISK, base=BASE)}
    counts, sizes = [], []
    for generation in range(50):
        for kind, head in heads.items():
            writes: dict[int, int | None] = {rng.randrange(PAGES - 4): 1000 + 2 * generation + number for number in range(3)}
            heads[kind] = new = bed.layer(writes | {5: 6, 6: None, 20 + generation % 4: 7}, head.id, kind=kind)
            if generation % 7 == 3:
                bed.store.seal(new.id)
            if generation % 5:
                bed.store.seal(new.id, adopt=bed.store.adoptable(new.id, [each.id for each in heads.values()]))
        bed.store.gc([each.id for each in heads.values()])
        counts.append((len(bed.store.layers()), len(files_of(bed))))
        sizes.append(sum(path.stat().st_size for path in bed.store.files.root.rglob("*") if path.is_file()))
        bed.check(*(each.id for each in heads.values()))
    assert {count for number, count in enumerate(counts) if number % 5} == {(2, 8)}
    assert max(counts) <= (4, 18)
    assert max(sizes) < 1.6 * 2 * PAGES * PAGE
    assert max(sizes[25:]) < 1.2 * max(sizes[:25])


def test_generations_whose_parents_live_on_for_a_while(bed: Bed) -> None:
    """Each parent is deleted after its child was sealed: what both need is adopted by the child all the same."""
    heads = [bed.store.seal(bed.layer(CONTENT).id).id]
    for generation in range(50):
        twins = [bed.layer({generation % 60: 2000 + generation, 60 + twin: 3000 + generation}, heads[-1]).id for twin in range(2)]
        for new in twins:
            record = bed.store.seal(new, adopt=bed.store.adoptable(new, [*heads, *twins], shared=True))
            assert {*record.chain, *record.beneath} <= {new, *heads, *twins}
        bed.check(*heads, *twins)
        heads = twins
        bed.store.gc(heads)
        assert len(bed.store.layers()) <= 3
        assert len(bed.blobs()) <= 6
    bed.check(*heads)


def test_adoptable(bed: Bed) -> None:
    first, second, third = three(bed)
    for each in (first, second, third):
        bed.store.seal(each.id)
    assert set(bed.store.adoptable(third.id, [third.id])) == {first.id, second.id}
    assert set(bed.store.adoptable(third.id, [])) == {first.id, second.id}
    assert bed.store.adoptable(third.id, [third.id, first.id]) == [second.id]
    assert bed.store.adoptable(third.id, [second.id]) == []  # it needs the first one itself
    assert bed.store.adoptable(third.id, [second.id], shared=True) == [first.id]
    other = bed.layer({3: 4}, first.id)
    assert bed.store.adoptable(third.id, [third.id, other.id]) == [second.id]
    unsealed = bed.layer(dict.fromkeys(range(PAGES), 9), second.id)
    assert unsealed.chain == (unsealed.id,)
    assert bed.store.adoptable(third.id, [unsealed.id]) == []  # it is compared with its parent when it is sealed
    assert bed.store.adoptable(layer.new_id(), [third.id]) == []


def test_the_process_that_seals_adopts(bed: Bed) -> None:
    first, second, third = three(bed)
    other = bed.layer({1: 1}, kind=Kind.DISK)
    words = [
        sys.executable,
        "-m",
        "ramet.store.seal",
        str(bed.store.files.root),
        third.id,
        other.id,
        "--adopt",
        first.id,
        "--adopt",
        second.id,
    ]
    done = subprocess.run(words, capture_output=True, check=True, text=True)
    assert [line for line in done.stdout.splitlines() if line.endswith("1.000")] == [f"{third.id} 1.000", f"{other.id} 1.000"]
    assert bed.store.get(third.id).chain == (third.id,)
    assert bed.store.get(other.id).sealed
    bed.check()


def test_a_parent_that_adopts_while_its_child_is_published(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child was told of the layers that the parent does without by now, and a gc is quick."""
    first, second, third = three(bed)
    bed.store.seal(third.id)

    def adopt() -> None:
        bed.store.seal(third.id, adopt=[second.id])
        bed.store.gc([third.id])

    late = Store(bed.store.files, step=lambda name: adopt() if name == "publish files" else None)
    child = Bed(bed.state, late, bed.want).layer({3: 4}, third.id)
    assert second.id in child.chain
    assert bed.store.gc([third.id, child.id]).layers == ()
    bed.check(child.id, third.id, first.id)

    def read_then_adopted(files: object, layer_id: str) -> tuple[Layer, Owners]:
        found = published_owners(bed.store.files, layer_id)
        if first.id in found[0].chain:
            bed.store.seal(third.id, adopt=[first.id])
            bed.store.gc([third.id])
        return found

    monkeypatch.setattr(store, "published_owners", read_then_adopted)
    early = bed.layer({3: 4}, third.id)
    assert early.chain == (third.id, early.id)
    bed.check(early.id, third.id)


def test_a_gc_that_looked_before_the_child_was_there(bed: Bed) -> None:
    """What it is told to keep and has not seen, it looks at."""
    first, second, third = three(bed)
    made: list[str] = []

    def keep() -> list[str]:
        made.append(bed.layer({3: 4}, third.id).id)
        return made

    assert bed.store.gc(keep).layers == ()
    bed.check(*made, first.id, second.id)


def test_a_layer_that_is_sealed_anew_is_in_somebodys_hands(bed: Bed) -> None:
    first, second, third = three(bed)
    bed.store.seal(third.id)
    freed = []
    busy = Store(bed.store.files, step=lambda name: freed.append(bed.store.gc([])) if name == "seal blob" else None)
    assert busy.seal(third.id, adopt=[first.id, second.id]).chain == (third.id,)
    assert [each.layers for each in freed] == [()]
    bed.check(third.id)


def test_records_with_impossible_tables_are_refused(bed: Bed) -> None:
    made = bed.layer(CONTENT)
    layer.save(bed.store.files.layer(made.id), dataclasses.replace(made, tables=-1), durable=False)
    with pytest.raises(LayerError, match="damaged"):
        bed.store.get(made.id)


def test_a_child_made_from_a_file_of_a_parent_that_adopted(bed: Bed) -> None:
    first, second, third = three(bed)
    bed.store.seal(third.id, adopt=[first.id])
    child = bed.layer({0: 1, 40: 81, 41: None}, third.id, sealed=True)
    assert second.id in child.chain
    assert first.id not in child.chain
    bed.store.gc([child.id])
    bed.check(child.id)
    with bed.store.draft(Kind.MEMORY, PAGES * PAGE, child.id) as draft:
        draft.spool.write_bytes(page(1))
        made = bed.store.publish(draft, Runs.build([(0, 1, 0)]), durable=True)
    assert bed.read(made.id, PAGE) == bed.want[child.id][PAGE:]


def test_one_that_is_named_and_owns_nothing_is_no_hindrance(bed: Bed) -> None:
    """The page that is the same in all three is the first one's once the second is sealed; asked for is more than is named."""
    first = bed.layer({0: 700})
    second = bed.layer({0: 700, 1: 5}, first.id)
    third = bed.layer({0: 700}, second.id)
    bed.store.seal(second.id)
    sealed = bed.store.seal(third.id, adopt={first.id, second.id})
    assert (sealed.chain, sealed.beneath) == ((third.id,), ())
    bed.check(third.id)
