"""Chunks that a registry has too are given up: the right ones, whole, and nothing else, also when it is cut off at any step."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.errors import AbsentError
from ramet.paths import StoreDir
from ramet.store import blob, disk, eviction, index, remote, tracing
from ramet.store.chain import Chain
from ramet.store.layer import CHUNK, CHUNK_PAGES, PAGE, Kind, Layer
from ramet.store.remote import Remote, Source
from ramet.store.runs import Runs
from ramet.store.store import Store
from tests.unit.test_store import BASE, PAGES, WRITES, Bed, new_bed
from tests.unit.test_store_crash import killed_at, leftovers

SOURCE = Source(host="registry.example", path="acme/shop")
ALL = 1 << 40
BLOCK = 4096


def pages(who: int, end: int = PAGES) -> dict[int, int | None]:
    """Contents that do not compress, and that nobody else has."""
    return {number: 1001 + 2000 * who + 2 * number for number in range(end)}


@dataclass
class Cache:
    """A bed whose blobs a registry has too: `elsewhere` is the registry."""

    bed: Bed
    elsewhere: Path

    def publish(self, *layers: Layer) -> list[str]:
        """Have all the blobs of sealed layers be had elsewhere; used in that order, long ago."""
        digests = list(dict.fromkeys(digest for each in layers for digest in self.bed.store.get(each.id).blobs))
        for at, digest in enumerate(digests):
            path = self.files.blob(digest)
            shutil.copyfile(path, self.elsewhere / path.name)
            remote.save(self.files, Remote(digest=digest, size=path.stat().st_size, sources=(SOURCE,), whole=True))
            os.utime(self.files.remote(digest), (1000 + at, 1000 + at))
        return digests

    @property
    def files(self) -> StoreDir:
        return self.bed.store.files

    def taken(self) -> int:
        return sum(disk.allocated(path) for path in self.files.blobs.iterdir())

    def fetch(self, layer_id: str, number: int) -> None:
        """One chunk of a layer, as the fetcher does it."""
        with Chain.open(self.files, layer_id) as chain:
            for want in chain.wants(number * CHUNK_PAGES, (number + 1) * CHUNK_PAGES):
                with open(self.elsewhere / self.files.blob(want.blob).name, "rb") as whole, open(self.files.blob(want.blob), "r+b") as here:
                    here.seek(want.offset)
                    here.write(os.pread(whole.fileno(), want.length, want.offset))

    def chunks(self, layer_id: str) -> list[bool]:
        """Which chunks of a layer are here; what is read is right."""
        found = []
        want = self.bed.want[layer_id]
        blob.frames = blob.Frames()  # what it remembers needs no file
        with Chain.open(self.files, layer_id) as chain:
            for at in range(0, chain.size, CHUNK):
                try:
                    found.append(b"".join(chain.read(at, CHUNK)) == want[at : at + CHUNK])
                    assert found[-1], f"wrong bytes at {at}"
                except AbsentError:
                    found.append(False)
        return found

    def sound(self) -> None:
        """What is not here is not damaged, and says so; all that is not elsewhere is here."""
        for layer_id in self.bed.want:
            assert self.bed.store.verify(layer_id) == []
            self.chunks(layer_id)
        for path in self.files.remotes.iterdir():
            found = remote.load(self.files, path.name.replace("-", ":", 1))
            assert found
            assert not found.whole or not remote.absent(self.files, found.digest)


@contextmanager
def new_cache(root: Path) -> Iterator[Cache]:
    with new_bed(root / "state") as bed:
        (root / "elsewhere").mkdir()
        yield Cache(bed, root / "elsewhere")


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with new_cache(tmp_path) as made:
        yield made


def test_what_was_used_longest_ago_goes_first(cache: Cache) -> None:
    layers = [cache.bed.layer(pages(first), sealed=True) for first in range(3)]
    digests = cache.publish(*layers)
    os.utime(cache.files.remote(digests[0]), (5000, 5000))
    before = cache.taken()
    given = cache.bed.store.evict(1, list)
    assert given.blobs == (digests[1],)
    assert given.bytes == before - cache.taken()
    assert given.bytes > 70 * PAGE  # all of it is one piece
    assert not any(cache.chunks(layers[1].id))
    assert all(cache.chunks(layers[0].id) + cache.chunks(layers[2].id))
    assert cache.bed.store.evict(1, list).blobs == (digests[2],)
    assert cache.bed.store.evict(ALL, list).blobs == (digests[0],)
    assert cache.bed.store.evict(ALL, list) == eviction.Evicted()
    assert cache.taken() == 0
    for at, digest in enumerate(digests):
        found = remote.load(cache.files, digest)
        assert found
        assert (found.whole, found.evicted) == (False, True)
        assert remote.used(cache.files, digest) == (5000 if at == 0 else 1000 + at)  # nobody used it
    cache.sound()


def test_what_is_in_use_or_nowhere_else_stays(cache: Cache) -> None:
    mine = cache.bed.layer(pages(0), sealed=True)
    below = cache.bed.layer(pages(1, 40), sealed=True)
    used = cache.bed.layer(pages(2, 9), below.id, sealed=True)
    other = cache.bed.layer(pages(3), sealed=True)
    digests = cache.publish(below, used, other)
    given = cache.bed.store.evict(ALL, lambda: [used.id])
    assert given.blobs == (digests[2],)
    assert given.postponed == ()
    cache.bed.check(mine.id, below.id, used.id)
    assert [remote.used(cache.files, each) > 1e9 for each in digests] == [True, True, False]  # it counts as used now
    cache.sound()


def test_a_layer_below_which_another_lies_keeps_it(cache: Cache) -> None:
    below = cache.bed.layer(pages(0), kind=Kind.DISK, sealed=True)
    with cache.bed.store.draft(Kind.DISK, PAGES * PAGE, base=f"layer:{below.id}") as draft:
        draft.spool.write_bytes(b"")
        above = cache.bed.store.publish(draft, Runs.build([]), durable=True)
    cache.publish(below)
    assert cache.bed.store.evict(ALL, lambda: [above.id]) == eviction.Evicted()
    assert len(cache.bed.store.evict(ALL, list).blobs) == 1


def test_machines_that_start_meanwhile_keep_theirs(cache: Cache) -> None:
    layers = [cache.bed.layer(pages(first), sealed=True) for first in range(3)]
    digests = cache.publish(*layers)
    asked: list[int] = []

    def in_use() -> list[str]:
        asked.append(1)
        return [layers[1].id] if len(asked) > 1 else []

    assert cache.bed.store.evict(ALL, in_use).blobs == (digests[0], digests[2])
    cache.bed.check(layers[1].id)


def test_chunks_of_a_trace_go_last(cache: Cache) -> None:
    below = cache.bed.layer(pages(0), sealed=True)
    above = cache.bed.layer(pages(1, 20), below.id, sealed=True)
    cache.publish(below, above)
    tracing.save(cache.files, above.id, [0, 3, 999])
    before = cache.taken()
    given = cache.bed.store.evict(before - 40 * PAGE, list)
    assert given.bytes == before - cache.taken() >= before - 40 * PAGE
    assert cache.chunks(above.id) == [True, False, False, True, False]
    assert cache.bed.store.evict(ALL, list).bytes > 30 * PAGE
    assert cache.taken() == 0
    cache.sound()


def test_a_damaged_trace_protects_nothing_and_hinders_nothing(cache: Cache) -> None:
    made = cache.bed.layer(pages(0), sealed=True)
    cache.publish(made)
    cache.files.layer(made.id).trace.write_bytes(b"RAMETTRC nonsense")
    cache.bed.store.evict(ALL, list)
    assert cache.taken() == 0


def test_a_dry_run_says_what_would_go_and_changes_nothing(cache: Cache) -> None:
    layers = [cache.bed.layer(pages(first), sealed=True) for first in range(2)]
    cache.publish(*layers)
    tracing.save(cache.files, layers[0].id, [1])
    for most in (1, 90 * PAGE, ALL):
        would = cache.bed.store.evict(most, list, dry_run=True)
        assert all(cache.chunks(layers[0].id) + cache.chunks(layers[1].id))
        assert would.blobs
        assert would.bytes >= min(most, 150 * PAGE)
    assert all(remote.load(cache.files, digest).whole for digest in would.blobs)  # type: ignore[union-attr]
    did = cache.bed.store.evict(ALL, list)
    assert did.blobs == would.blobs
    assert abs(did.bytes - would.bytes) <= 4 * BLOCK


@pytest.mark.parametrize("step", ["evict record", "evict chunks"])
def test_killed_while_giving_up(cache: Cache, step: str) -> None:
    made = cache.bed.layer(pages(0), sealed=True)
    cache.publish(made)
    assert killed_at(cache.bed, step, lambda store: store.evict(ALL, list))
    cache.sound()
    assert cache.bed.store.evict(ALL, list).blobs
    cache.sound()
    for number in range(len(cache.chunks(made.id))):
        cache.fetch(made.id, number)
    cache.bed.check()


def test_a_record_that_is_damaged_keeps_its_blob(cache: Cache) -> None:
    made = cache.bed.layer(pages(0), sealed=True)
    [digest] = cache.publish(made)
    cache.files.remote(digest).write_bytes(b"{")
    given = cache.bed.store.evict(ALL, list)
    assert (given.blobs, len(given.postponed)) == ((), 1)
    assert digest in given.postponed[0]
    assert all(cache.chunks(made.id))


def test_somebody_who_seals_or_pulls_is_not_disturbed(cache: Cache) -> None:
    cache.publish(cache.bed.layer(pages(0), sealed=True))
    with cache.bed.store.referring():
        given = cache.bed.store.evict(ALL, list)
    assert (given.bytes, given.postponed) == (0, ("no chunks were given up: a layer is being sealed or pulled",))
    assert cache.bed.store.evict(ALL, list).bytes


def test_a_blob_that_is_being_fetched_whole_stays(cache: Cache) -> None:
    digests = cache.publish(*(cache.bed.layer(pages(who), sealed=True) for who in range(2)))
    with open(cache.files.blob(digests[0]), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        given = cache.bed.store.evict(ALL, list)
    assert given.blobs == (digests[1],)
    assert given.postponed == (f"blob {digests[0]} stays as it is: it is being fetched as a whole",)


def test_use_is_noted_once_a_minute(cache: Cache) -> None:
    [digest] = cache.publish(cache.bed.layer(pages(0), sealed=True))
    remote.touch(cache.files, [digest, "sha256:" + "0" * 64])
    first = remote.used(cache.files, digest)
    assert first > 1e9
    remote.touch(cache.files, [digest])
    assert remote.used(cache.files, digest) == first


@settings(max_examples=15, deadline=None)
@given(
    steps=st.lists(st.tuples(WRITES, st.integers(0, 5), st.lists(st.integers(0, 9), max_size=3)), min_size=1, max_size=5),
    rounds=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 8), st.integers(0, 9)), min_size=1, max_size=4),
    is_disk=st.booleans(),
    piece=st.sampled_from([6000, 16 << 20]),
)
def test_any_tree_reads_right_or_says_what_is_not_here(
    steps: list[tuple[dict[int, int | None], int, list[int]]], rounds: list[tuple[int, int, int]], is_disk: bool, piece: int
) -> None:
    """Frames are here whole or not at all, what was given up is what the disk got back, and fetching all makes it what it was."""
    kind, base = (Kind.DISK, BASE) if is_disk else (Kind.MEMORY, "")
    with tempfile.TemporaryDirectory() as root, new_cache(Path(root)) as cache, pytest.MonkeyPatch.context() as patch:
        patch.setattr(eviction, "_PIECE", piece)
        made: list[Layer] = []
        for writes, which, trace in steps:
            parent = made[which % len(made)].id if made and which else ""
            made.append(cache.bed.layer(writes, parent, kind=kind, base=base, sealed=True))
            tracing.save(cache.files, made[-1].id, trace)
        cache.publish(*made)
        for most, which, number in rounds:
            before = cache.taken()
            given = cache.bed.store.evict(most * PAGE, list)
            assert given.bytes == before - cache.taken()
            assert given.bytes >= most * PAGE or cache.taken() == 0
            assert given.bytes <= most * PAGE + piece + 2 * CHUNK  # a piece ends with a frame
            _no_half_frames(cache, made)
            cache.sound()
            cache.fetch(made[which % len(made)].id, number)
        for each in made:
            for number in range(PAGES // CHUNK_PAGES + 1):
                cache.fetch(each.id, number)
        cache.bed.check()


def _no_half_frames(cache: Cache, layers: list[Layer]) -> None:
    for each in layers:
        record = cache.bed.store.get(each.id)
        rows = index.of_layer(cache.files.layer(each.id), record)
        for row in range(len(rows)):
            if rows.length[row]:
                path = cache.files.blob(record.blobs[rows.blob[row]])
                here, whole = path.read_bytes(), (cache.elsewhere / path.name).read_bytes()
                frame = slice(rows.offset[row], rows.offset[row] + rows.length[row])
                assert here[frame] == whole[frame] or not any(here[frame])


@pytest.mark.parametrize(("piece", "gone"), [(1, 1), (CHUNK + 5000, 1), (2 * CHUNK + 5000, 2), (1 << 30, 5)])
def test_no_more_goes_than_must(cache: Cache, monkeypatch: pytest.MonkeyPatch, piece: int, gone: int) -> None:
    """A piece at a time, each of whole frames."""
    monkeypatch.setattr(eviction, "_PIECE", piece)
    made = cache.bed.layer(pages(0), sealed=True)
    cache.publish(made)
    cache.bed.store.evict(1, list)
    assert cache.chunks(made.id) == [False] * gone + [True] * (5 - gone)
    _no_half_frames(cache, [made])
    cache.sound()


def test_who_fetches_and_reads_meanwhile_gets_the_right_bytes_in_the_end(cache: Cache) -> None:
    made = cache.bed.layer(pages(0), sealed=True)
    cache.publish(made)
    done = threading.Event()
    rounds = 0

    def give_up() -> None:
        nonlocal rounds
        while not done.is_set():
            Store(cache.files).evict(ALL, list)
            rounds += 1

    thread = threading.Thread(target=give_up)
    thread.start()
    try:
        want = cache.bed.want[made.id]
        for number in range(len(want) // CHUNK + 1):
            for _ in range(100_000):  # each time that it was given up before it was read
                cache.fetch(made.id, number)
                with suppress(AbsentError), Chain.open(cache.files, made.id) as chain:
                    assert b"".join(chain.read(number * CHUNK, CHUNK)) == want[number * CHUNK : (number + 1) * CHUNK]
                    break
            else:
                pytest.fail(f"chunk {number} was never here")
    finally:
        done.set()
        thread.join()
    assert rounds


# What a collection removes


def test_gc_takes_records_with_their_blobs(cache: Cache) -> None:
    kept, gone = cache.bed.layer(pages(0), sealed=True), cache.bed.layer(pages(1), sealed=True)
    digests = cache.publish(kept, gone)
    (cache.files.remotes / f"{disk.STAGED}sha256-{'0' * 64}").write_bytes(b"cut off")
    would = cache.bed.store.gc([kept.id], dry_run=True)
    assert len(list(cache.files.remotes.iterdir())) == 3
    assert (would.layers, would.blobs) == ((gone.id,), (digests[1],))
    assert all(cache.chunks(gone.id))
    did = cache.bed.store.gc([kept.id])
    assert did == would
    assert [path.name for path in cache.files.remotes.iterdir()] == [cache.files.remote(digests[0]).name]
    assert not cache.files.blob(digests[1]).exists()
    cache.bed.check(kept.id)


@pytest.mark.parametrize("step", ["gc blob", "gc remote"])
def test_killed_while_collecting_what_is_elsewhere(cache: Cache, step: str) -> None:
    """What is pulled again then is known to be not here, however far the collection came."""
    gone = cache.bed.layer(pages(0), sealed=True)
    [digest] = cache.publish(gone)
    size = cache.files.blob(digest).stat().st_size
    cache.bed.store.evict(1, list)
    remote.save(cache.files, dataclasses.replace(remote.load(cache.files, digest), whole=True))  # type: ignore[type-var]
    assert killed_at(cache.bed, step, lambda store: store.gc([]))
    assert remote.is_remote(cache.files, digest)
    remote.expect(cache.files, digest, size, SOURCE)
    found = remote.load(cache.files, digest)
    assert found
    assert found.whole is (step == "gc blob")  # nothing was removed yet
    assert cache.files.blob(digest).stat().st_size == size
    cache.bed.store.gc([])
    assert not leftovers(cache.bed)
    assert not list(cache.files.remotes.iterdir())
    assert not cache.bed.blobs()


def test_gc_forgets_a_record_without_a_blob(cache: Cache) -> None:
    remote.save(cache.files, Remote(digest="sha256:" + "a" * 64, size=5, sources=(SOURCE,), whole=True))
    cache.bed.store.gc([])
    assert not list(cache.files.remotes.iterdir())
