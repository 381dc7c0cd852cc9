"""Killed, failed or out of space at any step: the store is whole, and a gc removes the rest. And gc itself."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ramet.errors import HostError, LayerError, NoSpaceError
from ramet.store import disk, layer
from ramet.store.blob import Writer
from ramet.store.chain import Chain
from ramet.store.layer import PAGE, Kind
from ramet.store.runs import Runs
from ramet.store.store import Store
from tests.unit.test_store import PAGES, Bed, new_bed, page

CONTENT: dict[int, int | None] = {number: 1 + 2 * number for number in range(60)}


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    with new_bed(tmp_path / "state") as made:
        yield made


def killed_at(bed: Bed, step: str, work: Callable[[Store], object]) -> bool:
    """Do something in a process that is killed at a step; whether it got there."""
    pid = os.fork()
    if not pid:
        try:
            work(Store(bed.store.files, step=lambda name: os.kill(os.getpid(), signal.SIGKILL) if name == step else None))
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def leftovers(bed: Bed) -> list[str]:
    files = bed.store.files
    return [str(path) for path in files.root.rglob("*") if path.name.startswith(disk.STAGED)]


SEAL = ["seal pages", "seal index", "seal blob", "seal read back", "seal record", "seal spool"]
PUBLISH = ["publish files", "publish rename"]


@pytest.mark.parametrize("step", SEAL)
def test_killed_while_sealing(bed: Bed, step: str) -> None:
    first = bed.layer(CONTENT)
    second = bed.layer({0: 1, 1: 999, 2: None}, first.id)
    bed.store.seal(first.id)
    with Chain.open(bed.store.files, second.id) as chain:
        assert killed_at(bed, step, lambda store: store.seal(second.id))
        assert b"".join(chain.read(0, 1 << 30)) == bed.want[second.id]
        bed.check()
        bed.store.gc([second.id])
        assert not leftovers(bed)
        bed.check(second.id)
        assert bed.store.seal(second.id).sealed
        assert b"".join(chain.read(0, 1 << 30)) == bed.want[second.id]
    assert not bed.store.files.layer(second.id).spool.exists()
    bed.check(second.id)
    assert len(bed.store.gc([second.id]).blobs) == 0


@pytest.mark.parametrize("step", PUBLISH)
@pytest.mark.parametrize("durable", [True, False])
def test_killed_while_publishing(bed: Bed, step: str, durable: bool) -> None:
    first = bed.layer(CONTENT)

    def work(store: Store) -> None:
        with store.draft(Kind.MEMORY, PAGES * PAGE, first.id) as draft:
            draft.spool.write_bytes(page(5))
            store.publish(draft, Runs.build([(3, 1, 0)]), durable=durable)

    assert killed_at(bed, step, work)
    assert [each.id for each in bed.store.layers()] == [first.id]
    assert leftovers(bed)
    freed = bed.store.gc([first.id])
    assert (freed.drafts, freed.layers, freed.postponed) == (1, (), ())
    assert not leftovers(bed)
    bed.check()


@pytest.mark.parametrize("step", ["seal pages", "seal index", "seal blob", "seal read back", "publish rename"])
def test_killed_while_publishing_sealed(bed: Bed, step: str) -> None:
    first = bed.layer(CONTENT)
    work: Callable[[Store], object] = lambda store: Bed(bed.state, store, bed.want).layer({9: 999}, first.id, sealed=True)  # noqa: E731
    assert killed_at(bed, step, work)
    assert [each.id for each in bed.store.layers()] == [first.id]
    bed.store.gc([first.id])
    assert not leftovers(bed)
    assert not bed.blobs()
    bed.check()
    made = bed.layer({9: 999}, first.id, sealed=True)
    bed.check(made.id)


@pytest.mark.parametrize("step", ["gc draft", "gc layer", "gc blob"])
def test_killed_while_collecting(bed: Bed, step: str) -> None:
    keep = bed.layer(CONTENT)
    bed.store.seal(keep.id)
    for number in range(3):
        bed.store.seal(bed.layer({0: 700 + number}).id)
        bed.layer({1: 1}, keep.id)
        assert killed_at(bed, "publish rename", lambda store: Bed(bed.state, store, bed.want).layer({1: 1}))
    assert killed_at(bed, step, lambda store: store.gc([keep.id]))
    for each in bed.store.layers():
        bed.check(each.id)
    bed.store.gc([keep.id])
    assert [each.id for each in bed.store.layers()] == [keep.id]
    assert len(bed.blobs()) == 1
    assert not leftovers(bed)
    bed.check(keep.id)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("step", [*SEAL[:-1], *PUBLISH])
def test_a_failing_disk(bed: Bed, step: str, number: int) -> None:
    def fail(name: str) -> None:
        if name == step:
            with disk.guard("write", Path("there")):
                raise OSError(number, os.strerror(number), "there")

    first = bed.layer(CONTENT)
    failing = Bed(bed.state, Store(bed.store.files, step=fail), bed.want)
    with pytest.raises(HostError, match="there") as caught:
        failing.layer({0: 3}, first.id) if step in PUBLISH else failing.store.seal(first.id)
    assert isinstance(caught.value, NoSpaceError) is (number != errno.EIO)
    assert [each.id for each in bed.store.layers()] == [first.id]
    assert not leftovers(bed)
    bed.check()
    bed.store.seal(first.id)
    bed.check()


def test_no_room_for_the_blob_really(bed: Bed) -> None:
    """The kernel refuses the write in the middle of a blob, as it does when a disk or a quota is full."""
    made = bed.layer({number: 1 + 2 * number for number in range(PAGES)}, size=PAGES * PAGE)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            try:
                bed.store.seal(made.id)
            except NoSpaceError as error:
                code = 0 if str(bed.store.files.blobs) in error.message else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not leftovers(bed)
    assert not bed.blobs()
    bed.check()


def test_gc_keeps_what_is_needed_and_nothing_else(bed: Bed) -> None:
    first = bed.layer(CONTENT)
    second = bed.layer({0: 999}, first.id)
    other = bed.layer({5: 5}, first.id)
    assert bed.store.gc([second.id]).layers == (other.id,)
    third = bed.layer(dict.fromkeys(range(60), 997), second.id)
    assert third.chain == (third.id,)
    bed.store.seal(third.id)
    freed = bed.store.gc([third.id])
    assert set(freed.layers) == {first.id, second.id}
    assert freed.bytes > 60 * PAGE
    bed.check(third.id)
    assert len(bed.store.gc([]).layers) == 1
    assert not list(bed.store.files.layers.iterdir())
    assert not bed.blobs()


def test_gc_leaves_what_is_in_somebodys_hands(bed: Bed) -> None:
    first = bed.layer(CONTENT)
    with bed.store.draft(Kind.MEMORY, PAGES * PAGE, first.id) as draft:
        draft.spool.write_bytes(page(5))
        assert bed.store.gc([]).layers == ()  # the draft stands on it
        made = bed.store.publish(draft, Runs.build([(3, 1, 0)]), durable=False)
        assert bed.store.gc([]).layers == ()  # nobody has had the time to write down that it exists
        assert bed.read(made.id)[3 * PAGE : 4 * PAGE] == page(5)
    assert len(bed.store.gc([]).layers) == 2


def test_gc_asks_what_to_keep_after_it_has_looked(bed: Bed) -> None:
    made: list[str] = []

    def keep() -> list[str]:
        made.append(bed.layer({1: 1}).id)  # published and let go while the list was made
        return []

    assert bed.store.gc(keep).layers == ()
    bed.check(*made)


def test_no_blob_goes_while_a_layer_is_sealed(bed: Bed) -> None:
    old = bed.layer(CONTENT)
    bed.store.seal(old.id)
    new = bed.layer(CONTENT)
    freed = []

    def step(name: str) -> None:
        if name == "seal blob":
            freed.append(bed.store.gc([new.id]))  # the frames that it is about to refer to are in a blob that nobody else needs

    sealed = Store(bed.store.files, step=step).seal(new.id)
    assert freed[0].layers == (old.id,)
    assert freed[0].blobs == ()
    assert freed[0].postponed == ("no blobs were removed: a layer is being sealed or pulled",)
    assert len(sealed.blobs) == 1
    assert bed.store.gc([new.id]).blobs == ()
    bed.check(new.id)


def test_gc_removes_nothing_when_it_cannot_know(bed: Bed) -> None:
    first = bed.layer(CONTENT)
    second = bed.layer({0: 999}, first.id)
    bed.store.seal(first.id)
    record = bed.store.files.layer(second.id).record
    good = record.read_bytes()
    record.write_bytes(good[:50])
    freed = bed.store.gc([second.id])
    assert (freed.layers, freed.blobs) == ((), ())
    assert second.id in freed.postponed[0]
    record.write_bytes(good)
    bed.check()
    record.write_bytes(good[:50])
    assert set(bed.store.gc([]).layers) == {first.id, second.id}


def test_generations_do_not_pile_up(bed: Bed) -> None:
    """Fork, delete the parent, again and again: what is on the disk is what the last one needs."""
    now = bed.layer(CONTENT)
    bed.store.seal(now.id)
    sizes = []
    for number in range(30):
        now = bed.layer({number % 7: 100 + number}, now.id)
        bed.store.seal(now.id)
        bed.store.gc([now.id])
        sizes.append((len(bed.store.layers()), len(bed.blobs())))
    assert max(sizes[10:]) <= (8, 8)
    bed.check(now.id)


def test_a_blob_that_was_not_finished_leaves_nothing(bed: Bed) -> None:
    with pytest.raises(RuntimeError), Writer(bed.store.files.blobs) as writer:
        writer.add(b"frame", 5)
        raise RuntimeError
    assert not bed.blobs()
    with Writer(bed.store.files.blobs) as writer:
        assert writer.finish() == ""
        writer.publish()
    assert not bed.blobs()


def test_sealing_what_is_gone(bed: Bed) -> None:
    with pytest.raises(LayerError, match="missing"):
        bed.store.seal(layer.new_id())


def test_what_a_killed_process_has_not_named_goes_with_a_collection(bed: Bed) -> None:
    made = bed.layer(CONTENT)
    place = bed.store.files.layer(made.id).root
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    ended, ours = (place / f"{disk.STAGED}layer.json.{pid}" for pid in (child, os.getpid()))
    for path in (ended, ours):
        path.write_bytes(b"half")
    bed.store.gc([made.id], dry_run=True)
    assert ended.exists()
    bed.store.gc([made.id])
    assert (ended.exists(), ours.exists()) == (False, True), "somebody writes the other one"
    ours.unlink()
    bed.check()
