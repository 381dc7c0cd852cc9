"""Damage of every kind is found and named, and never served."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.errors import LayerError
from ramet.store import blob, columns, layer
from ramet.store.chain import Chain
from ramet.store.layer import CHUNK, PAGE, Kind
from ramet.store.runs import Owners, Runs
from tests.unit.test_store import BASE, PAGES, Bed, new_bed


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    with new_bed(tmp_path / "state") as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was verified once may be served from memory, whatever becomes of the file: here it is read each time."""
    monkeypatch.setattr(blob, "frames", blob.Frames(0))


CONTENT: dict[int, int | None] = {number: 1 + 2 * number for number in range(2, 70)}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def refused(bed: Bed, layer_id: str, offset: int = 0, length: int = PAGES * PAGE) -> str:
    """What a read that must fail says; and `verify` says something too."""
    with pytest.raises(LayerError) as caught:
        bed.read(layer_id, offset, length)
    problems = bed.store.verify(layer_id)
    assert problems
    assert layer_id in caught.value.message
    return caught.value.message


def test_a_flipped_bit_in_a_frame_is_found_and_the_rest_is_served(bed: Bed) -> None:
    made = bed.store.seal(bed.layer(CONTENT).id)
    [file] = bed.blobs()
    good = file.read_bytes()
    rng = random.Random(5)
    for at in [0, 3, 4, len(good) // 2, *(rng.randrange(len(good) - 200) for _ in range(20))]:
        flip(file, at)
        bad = []
        for chunk in range(5):
            with Chain.open(bed.store.files, made.id) as chain:
                try:
                    data = b"".join(chain.read(chunk * CHUNK, CHUNK))
                except LayerError as error:
                    bad.append(chunk)
                    assert f"layer {made.id}, chunk {chunk}" in error.message
                    assert file.name in error.message
                else:
                    assert data == bed.want[made.id][chunk * CHUNK : (chunk + 1) * CHUNK]
        assert len(bad) == 1
        problems = bed.store.verify(made.id)
        assert any(f"chunk {bad[0]}" in problem and file.name in problem for problem in problems)
        assert any("does not match its name" in problem for problem in problems)
        refused(bed, made.id)
        file.write_bytes(good)
    bed.check()


def test_a_flipped_bit_in_the_seek_table_is_found(bed: Bed) -> None:
    """Reading does not need it; it must be right all the same."""
    made = bed.store.seal(bed.layer(CONTENT).id)
    [file] = bed.blobs()
    flip(file, file.stat().st_size - 12)
    assert bed.read(made.id) == bed.want[made.id]
    [problem] = bed.store.verify(made.id)
    assert file.name in problem
    assert made.id in problem


def test_a_truncated_or_missing_blob(bed: Bed) -> None:
    made = bed.store.seal(bed.layer(CONTENT).id)
    [file] = bed.blobs()
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    assert "truncated" in refused(bed, made.id)
    assert bed.read(made.id, 0, CHUNK) == bed.want[made.id][:CHUNK]
    file.write_bytes(b"")
    assert "truncated" in refused(bed, made.id)
    file.unlink()
    message = refused(bed, made.id)
    assert f"{file.name} is missing" in message
    assert any(f"{file.name}, of layer {made.id}, is missing" in problem for problem in bed.store.verify(made.id))


def test_two_frames_swapped(bed: Bed) -> None:
    """Each is whole and hashes to something, but not to what belongs there."""
    made = bed.store.seal(bed.layer({number: 2 * number % 22 + 100 for number in range(32)}).id)
    [file] = bed.blobs()
    data = file.read_bytes()
    second = data.index(b"\x28\xb5\x2f\xfd", 4)
    third = data.index(b"\x5e\x2a\x4d\x18")
    file.write_bytes(data[second:third] + data[:second] + data[third:])
    refused(bed, made.id)


@pytest.mark.parametrize("name", ["index", "owners", "runs", "layer.json"])
@pytest.mark.parametrize("where", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_tables(bed: Bed, name: str, where: float) -> None:
    made = bed.layer(CONTENT)
    if name == "index":
        bed.store.seal(made.id)
    path = bed.store.files.layer(made.id).root / name
    good = path.read_bytes()
    what = {"index": "the index of", "owners": "the table of owners of", "runs": "the table of runs of", "layer.json": "the record of"}[
        name
    ]
    flip(path, int(len(good) * where))
    said = refused(bed, made.id)
    assert f"{what} layer {made.id}" in said
    path.write_bytes(good[: int((len(good) - 2) * where)])
    refused(bed, made.id)
    path.write_bytes(good + b"x")
    refused(bed, made.id)
    path.unlink()
    refused(bed, made.id)
    path.write_bytes(good)
    bed.check()


def test_a_spool_that_lost_its_end(bed: Bed) -> None:
    made = bed.layer(CONTENT)
    spool = bed.store.files.layer(made.id).spool
    spool.write_bytes(spool.read_bytes()[:-1])
    assert "truncated" in refused(bed, made.id)
    with pytest.raises(LayerError, match="truncated"):
        bed.store.seal(made.id)
    spool.unlink()
    assert "missing" in refused(bed, made.id)
    with pytest.raises(LayerError, match="missing"):
        bed.store.seal(made.id)
    assert not bed.blobs()


def test_a_chain_without_one_of_its_layers(bed: Bed) -> None:
    first = bed.layer(CONTENT)
    second = bed.layer({0: 1}, first.id)
    bed.store.files.layer(first.id).record.unlink()
    for problem in (*bed.store.verify(second.id), _message(lambda: bed.read(second.id))):
        assert first.id in problem


def _message(call: Callable[[], object]) -> str:
    with pytest.raises(LayerError) as caught:
        call()
    return caught.value.message


def test_a_missing_base(bed: Bed) -> None:
    made = bed.layer({0: 1}, kind=Kind.DISK, base=BASE)
    (bed.state.root / BASE).unlink()
    assert "base image" in refused(bed, made.id)


def test_records_that_name_paths_are_refused(bed: Bed) -> None:
    made = bed.layer(CONTENT)
    files = bed.store.files.layer(made.id)
    changes: list[dict[str, object]] = [
        {"base": "/etc/passwd"},
        {"base": "a/../../b"},
        {"parent": "../../x"},
        {"chain": ("..", made.id)},
        {"blobs": ("sha256:../../x",)},
        {"beneath": ("x",)},
        {"size": 0},
        {"size": 1 << 60},
        {"id": layer.new_id()},
    ]
    for change in changes:
        layer.save(files, dataclasses.replace(made, **change), durable=False)  # type: ignore[arg-type]
        with pytest.raises(LayerError, match="damaged"):
            bed.store.get(made.id)
    layer.save(files, dataclasses.replace(made, format=2), durable=False)
    with pytest.raises(LayerError, match="newer"):
        bed.store.get(made.id)
    value = json.loads(files.record.read_text())
    files.record.write_text(json.dumps(value | {"format": 1}))  # without its check
    with pytest.raises(LayerError, match="digest"):
        bed.store.get(made.id)


def test_damage_below_is_no_reason_not_to_seal(bed: Bed) -> None:
    first = bed.store.seal(bed.layer(CONTENT).id)
    second = bed.layer(CONTENT | {3: 50}, first.id)
    [file] = bed.blobs()
    flip(file, 100)
    sealed = bed.store.seal(second.id)
    assert bed.read(second.id) == bed.want[second.id]  # it has the damaged chunk itself
    assert sealed.data_bytes < len(CONTENT) * PAGE
    file.unlink()
    third = bed.store.seal(bed.layer(CONTENT).id)  # refers to no frame that is not there
    assert bed.read(third.id) == bed.want[third.id]


RUNS = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 9), st.integers(0, 1 << 40)), max_size=30)


@settings(max_examples=200, deadline=None)
@given(runs=RUNS, cut=st.integers(0, 1 << 20), bit=st.integers(0, 7))
def test_every_bit_of_a_table_counts(runs: list[tuple[int, int, int]], cut: int, bit: int) -> None:
    made = Runs.build((100 * n, count, where) for n, (_, count, where) in enumerate(runs))
    data = made.dump()
    assert list(Runs.load(data, "it")) == list(made)
    at = cut % len(data)
    for wrong in (data[:at], data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :], data + b"\0"):
        with pytest.raises(LayerError, match=r"^it is damaged"):
            Runs.load(wrong, "it")


def test_tables_of_another_kind_or_layer_are_refused() -> None:
    owners = Owners.nobody(7)
    with pytest.raises(LayerError):
        Runs.load(owners.dump(), "it")
    with pytest.raises(LayerError, match="not 8"):
        Owners.load(owners.dump(), "it", pages=8, layers=1)
    with pytest.raises(LayerError):
        columns.load(b"RAMETOWN", "II", owners.dump(), "it")
    with pytest.raises(LayerError, match="overlap"):
        Runs.build([(0, 5, 0), (4, 1, 9)])
