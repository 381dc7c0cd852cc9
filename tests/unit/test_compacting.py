"""What compacting asks of the store: large layers give way where much of them is not read any more, and a trimmed disk costs next to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ramet.store import adoption, blob, index
from ramet.store.layer import Kind
from tests.unit.test_store import BASE, PAGES, Bed, new_bed, page


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    with new_bed(tmp_path / "state") as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blob, "frames", blob.Frames(0))


@pytest.fixture(autouse=True)
def all_layers_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adoption, "LARGEST", 0)


@pytest.mark.parametrize(("overwritten", "goes"), [(9, False), (15, True), (39, True)])
@pytest.mark.parametrize("sealed", [False, True])
def test_a_large_layer_goes_where_enough_of_it_is_not_read_any_more(bed: Bed, overwritten: int, goes: bool, sealed: bool) -> None:
    below = bed.store.seal(bed.layer({number: 1 + 2 * number for number in range(40)}).id)
    top = bed.layer({number: 201 + 2 * number for number in range(overwritten)} | {50: 1}, below.id, sealed=sealed)
    assert bed.store.seal(top.id, adopt=[below.id]).chain == (below.id, top.id)
    assert bed.store.seal(top.id, adopt=[below.id], thorough=True).chain == ((top.id,) if goes else (below.id, top.id))
    before = sum(path.stat().st_size for path in bed.blobs())
    assert bed.store.gc([top.id]).layers == ((below.id,) if goes else ())
    if goes:
        assert before - sum(path.stat().st_size for path in bed.blobs()) > overwritten * len(page(1)) // 2
    bed.check(top.id)


def test_what_is_trimmed_and_was_never_used_takes_no_room(bed: Bed) -> None:
    """Zeros over what is zero in the base: a guest that trims says so of all that its file system has free."""
    made = bed.layer(dict.fromkeys(range(PAGES), None), kind=Kind.DISK, base=BASE)
    record = bed.store.seal(made.id)
    bed.check(made.id)
    rows = index.of_layer(bed.store.files.layer(made.id), record)
    zeros = {16 * chunk + bit for chunk, mask in zip(rows.chunk, rows.zero, strict=True) for bit in range(16) if mask >> bit & 1}
    base = (bed.state.root / BASE).read_bytes()
    assert zeros == {number for number in range(PAGES) if any(base[number * 4096 : (number + 1) * 4096])}


def test_zeros_over_another_layer_s_pages_stay_zeros(bed: Bed) -> None:
    below = bed.store.seal(bed.layer({0: 3, 1: 5, 30: 7}, kind=Kind.DISK, base=BASE).id)
    top = bed.layer({0: None, 1: 0, 3: None, 30: None}, below.id, kind=Kind.DISK)
    bed.store.seal(top.id, adopt=[below.id], thorough=True)
    bed.store.gc([top.id])
    bed.check(top.id)
