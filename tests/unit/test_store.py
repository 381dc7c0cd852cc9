"""The layer store, against a model that is a plain bytearray."""

from __future__ import annotations

import ctypes
import dataclasses
import io
import json
import mmap
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.errors import BusyError, LayerError, NotFoundError, SpecError
from ramet.paths import StateDir
from ramet.store import layer, qcow2
from ramet.store.chain import Chain
from ramet.store.layer import PAGE, Kind, Layer
from ramet.store.runs import ZERO, Runs
from ramet.store.store import Store

PAGES = 75  # four chunks and a part of one
BASE = "images/one/disk.raw"


def page(content: int) -> bytes:
    """A page of its own for each number; 0 is zeros. Odd ones do not compress."""
    if not content:
        return bytes(PAGE)
    return random.Random(content).randbytes(PAGE) if content % 2 else f"{content:08}".encode() * (PAGE // 8)


@dataclass
class Bed:
    """A store, and what each of its layers must read as."""

    state: StateDir
    store: Store
    want: dict[str, bytearray] = field(default_factory=dict)

    def layer(
        self,
        writes: dict[int, int | None],
        parent: str = "",
        *,
        kind: Kind = Kind.MEMORY,
        size: int = PAGES * PAGE,
        base: str = "",
        durable: bool = False,
        sealed: bool = False,
    ) -> Layer:
        """A layer whose pages are written with page(content), None by a run of zeros; spooled in an order that is not theirs."""
        with self.store.draft(kind, size, parent, base) as draft:
            want = self._before(parent, size, base)
            order = sorted((number for number, content in writes.items() if content is not None), key=lambda number: number * 7919 % 101)
            with open(draft.spool, "wb") as file:
                for number in order:
                    file.write(page(writes[number] or 0))
            runs = [(number, 1, at) for at, number in enumerate(order)]
            runs += [(number, 1, ZERO) for number, content in writes.items() if content is None]
            for number, content in writes.items():
                want[number * PAGE : (number + 1) * PAGE] = page(content or 0)
            del want[size:]
            if sealed:
                with open(draft.spool, "rb") as file:
                    draft.spool.unlink()
                    made = self.store.publish_sealed(draft, file.fileno(), Runs.build(runs))
            else:
                made = self.store.publish(draft, Runs.build(runs), durable=durable)
            self.want[made.id] = want
        return made

    def _before(self, parent: str, size: int, base: str) -> bytearray:
        if parent:
            return bytearray(self.want[parent])
        data = (self.state.root / base).read_bytes() if base else b""
        return bytearray(data[:size].ljust(size, b"\0"))

    def read(self, layer_id: str, offset: int = 0, length: int = 1 << 40) -> bytes:
        with Chain.open(self.store.files, layer_id) as chain:
            return b"".join(chain.read(offset, length))

    def check(self, *layer_ids: str) -> None:
        """They read as they must, and nothing is wrong with them."""
        for layer_id in layer_ids or self.want:
            assert self.read(layer_id) == self.want[layer_id]
            assert self.store.verify(layer_id) == []

    def blobs(self) -> list[Path]:
        return sorted(self.store.files.blobs.iterdir())


@contextmanager
def new_bed(root: Path) -> Iterator[Bed]:
    state = StateDir(root=root)
    state.create()
    (root / BASE).parent.mkdir()
    (root / BASE).write_bytes(b"".join(page(100 + number % 9) if number % 3 else bytes(PAGE) for number in range(PAGES - 9)) + b"tail")
    yield Bed(state, Store(state.store))


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    with new_bed(tmp_path / "state") as bed:
        yield bed


WRITES = st.dictionaries(st.integers(0, PAGES - 1), st.one_of(st.none(), st.sampled_from([0, 1, 2, 3, 102, 103])), max_size=60)
STEPS = st.lists(
    st.tuples(WRITES, st.integers(0, 9), st.sampled_from(["spool", "sealed", "durable"]), st.lists(st.integers(0, 9), max_size=3)),
    min_size=1,
    max_size=7,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, is_disk=st.booleans(), tail=st.sampled_from([0, 512, PAGE - 512]), seed=st.integers(0, 1 << 30))
def test_any_tree_of_layers_reads_as_it_was_written(
    steps: list[tuple[dict[int, int | None], int, str, list[int]]], is_disk: bool, tail: int, seed: int
) -> None:
    """Branches, spools and sealed layers mixed, sealed in any order while chains are open; then everything that is not kept is collected."""
    kind, base, size = (Kind.DISK, BASE, PAGES * PAGE - tail) if is_disk else (Kind.MEMORY, "", PAGES * PAGE)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as root, new_bed(Path(root)) as bed:
        made: list[str] = []
        open_chains: dict[str, Chain] = {}
        for writes, which, how, to_seal in steps:
            parent = made[which % len(made)] if made and which else ""
            new = bed.layer(
                writes, parent, kind=kind, size=size, base="" if parent else base, durable=how == "durable", sealed=how == "sealed"
            )
            made.append(new.id)
            open_chains[new.id] = Chain.open(bed.store.files, new.id)
            b"".join(open_chains[new.id].read(rng.randrange(size), rng.randrange(size)))
            for number in to_seal:
                bed.store.seal(made[number % len(made)])
            for layer_id, chain in open_chains.items():
                for _ in range(3):
                    offset, length = rng.randrange(size), rng.randrange(1, size)
                    assert b"".join(chain.read(offset, length)) == bed.want[layer_id][offset : offset + length]
        for chain in open_chains.values():
            chain.close()
        bed.check()
        kept = rng.sample(made, rng.randrange(1, len(made) + 1))
        bed.store.gc(kept)
        bed.check(*kept)
        for layer_id in kept:
            bed.store.seal(layer_id)
        bed.store.gc(kept)
        bed.check(*kept)


def test_twenty_layers_deep(bed: Bed) -> None:
    """And every layer that owns nothing any more is out of the chain."""
    parent = ""
    for number in range(20):
        new = bed.layer({number: number + 1, 40: number + 1, 60: 2}, parent)
        parent = new.id
    assert len(new.chain) == 20
    bed.check(parent)
    for layer_id in list(bed.want):
        bed.store.seal(layer_id)
    bed.check()
    over = bed.layer(dict.fromkeys(range(PAGES), 999), parent)
    assert over.chain == (over.id,)
    bed.store.gc([over.id])
    assert bed.store.get(parent).id == over.parent  # it is compared with it when it is sealed
    bed.store.seal(over.id)
    bed.store.gc([over.id])
    assert [each.id for each in bed.store.layers()] == [over.id]
    bed.check(over.id)


def test_unchanged_and_zero_pages_are_not_stored(bed: Bed) -> None:
    first = bed.layer({number: 2 + number for number in range(32)})
    second = bed.layer({0: 2, 1: 3, 5: 0, 6: 9, 50: 0, 51: None}, first.id)
    sealed = bed.store.seal(second.id)
    assert sealed.data_bytes == PAGE  # page 6; 0 and 1 are as before, 5 has become zero, below 50 and 51 there is nothing
    assert sealed.zero_bytes == PAGE
    third = bed.layer({7: 1}, second.id)
    bed.store.seal(first.id)
    bed.check()
    bed.store.gc([third.id])
    bed.check(third.id)


def test_unchanged_twice_over(bed: Bed) -> None:
    """What is as before in a layer that itself has it from before, whichever is sealed first."""
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        first = bed.layer({3: 7, 4: 8})
        second = bed.layer({3: 7, 4: 9}, first.id)
        third = bed.layer({3: 7, 4: 9}, second.id)
        for which in order:
            bed.store.seal((first, second, third)[which].id)
        assert bed.store.get(third.id).data_bytes == 0
        bed.check()


def test_identical_chunks_are_stored_once(bed: Bed) -> None:
    content: dict[int, int | None] = {number: 1 + 2 * number for number in range(32)}
    one = bed.store.seal(bed.layer(content).id)
    two = bed.store.seal(bed.layer(content).id)
    assert two.blobs == one.blobs
    assert len(bed.blobs()) == 1
    # Twice in one layer, too.
    three = bed.store.seal(bed.layer({n: 1001 + 2 * (n % 16) for n in range(48)}).id)
    [own] = [bed.store.files.blob(digest) for digest in three.blobs]
    assert own.stat().st_size < 17 * PAGE
    bed.check()
    assert bed.store.gc([two.id, three.id]).blobs == ()
    bed.check(two.id, three.id)
    assert len(bed.store.gc([three.id]).blobs) == 1


def test_other_tools_unpack_a_blob(bed: Bed) -> None:
    content: dict[int, int | None] = {number: 1 + number for number in (0, 1, 5, 20, 21, 70)}
    made = bed.store.seal(bed.layer(content).id)
    [blob] = bed.blobs()
    unpacked = subprocess.run(["zstd", "-d", "-c", blob], capture_output=True, check=True).stdout
    assert unpacked == b"".join(page(content[number] or 0) for number in sorted(content))
    listed = subprocess.run(["zstd", "-l", "-v", blob], capture_output=True, check=True).stdout.decode()
    assert re.search(r"Zstandard Frames: 3\b", listed)
    assert re.search(r"Skippable Frames: 1\b", listed)
    assert blob.name == made.blobs[0].replace(":", "-")


def test_the_same_content_makes_the_same_blob(tmp_path: Path) -> None:
    names = []
    for name in ("a", "b"):
        with new_bed(tmp_path / name) as bed:
            bed.store.seal(bed.layer({number: number for number in range(40)}).id)
            names.append([blob.name for blob in bed.blobs()])
    assert names[0] == names[1]
    assert len(names[0]) == 1


def test_sealed_straight_from_a_process_memory(bed: Bed) -> None:
    first = bed.layer({number: 1 + number for number in range(30)})
    with mmap.mmap(-1, PAGES * PAGE) as memory:
        buffer = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(buffer)
        want = bytearray(bed.want[first.id])
        for number, content in ((0, 1), (1, 900), (40, 902), (41, 0)):
            memory[number * PAGE : (number + 1) * PAGE] = want[number * PAGE : (number + 1) * PAGE] = page(content)
        with open("/proc/self/mem", "rb") as file, bed.store.draft(Kind.MEMORY, PAGES * PAGE, first.id) as draft:
            runs = Runs.build([(0, 2, address // PAGE), (40, 2, address // PAGE + 40)])
            made = bed.store.publish_sealed(draft, file.fileno(), runs)
            assert not draft.spool.exists()
        del buffer
    bed.want[made.id] = want
    assert (made.sealed, made.boot, made.data_bytes) == (True, "", 2 * PAGE)
    assert not bed.store.get(first.id).boot
    bed.check(made.id)


def test_export_is_sparse_and_pipes_get_every_byte(bed: Bed, tmp_path: Path) -> None:
    made = bed.layer({0: 1, 70: 2}, size=(1 << 20) * 8)
    seen: list[float] = []
    with open(tmp_path / "raw", "wb") as out:
        bed.store.export(made.id, out, seen.append)
    assert (tmp_path / "raw").read_bytes() == bed.want[made.id]
    assert (tmp_path / "raw").stat().st_blocks * 512 < 1 << 20
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    pipe, end = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            bed.store.export(made.id, end)
        finally:
            os._exit(0)
    os.close(end)
    with io.FileIO(pipe) as file:
        assert file.readall() == bed.want[made.id]
    os.waitpid(pid, 0)


def test_what_does_not_fit_is_refused(bed: Bed) -> None:
    first = bed.layer({0: 1})
    with pytest.raises(SpecError, match="cannot stand on"):
        bed.store.draft(Kind.MEMORY, 2 * PAGES * PAGE, first.id)
    with pytest.raises(SpecError, match="cannot stand on"):
        bed.store.draft(Kind.DISK, PAGES * PAGE, first.id)
    with pytest.raises(SpecError, match="base"):
        bed.store.draft(Kind.DISK, PAGES * PAGE, base="../etc/passwd")
    with pytest.raises(SpecError, match="base"):
        bed.store.draft(Kind.MEMORY, PAGES * PAGE, base=BASE)
    with pytest.raises(LayerError, match="missing"):
        bed.store.draft(Kind.MEMORY, PAGES * PAGE, layer.new_id())
    with pytest.raises(LayerError, match="is not a layer's id"):
        Chain.open(bed.store.files, "../../etc")
    with pytest.raises(NotFoundError):
        bed.store.get(layer.new_id())
    with bed.store.draft(Kind.MEMORY, PAGES * PAGE) as draft:
        draft.spool.write_bytes(page(1))
        with pytest.raises(LayerError, match="not in it"):
            bed.store.publish(draft, Runs.build([(0, 1, 40)]), durable=False)
        with pytest.raises(LayerError, match="pages, and its runs"):
            bed.store.publish(draft, Runs.build([(PAGES, 1, 0)]), durable=False)
    assert [path.name for path in bed.store.files.layers.iterdir()] == [first.id]


def test_a_draft_tells_its_size_and_goes_when_it_is_not_published(bed: Bed) -> None:
    with bed.store.draft(Kind.MEMORY, PAGES * PAGE) as draft:
        assert layer.load(bed.store.files.draft(draft.id), draft.id).size == PAGES * PAGE
        with pytest.raises(LayerError, match="missing"):
            Chain.open(bed.store.files, draft.id)
    assert not list(bed.store.files.layers.iterdir())


def test_sealing_is_idempotent_and_for_one_at_a_time(bed: Bed) -> None:
    made = bed.layer({number: number for number in range(40)})
    again = Store(bed.store.files, step=lambda name: _refused(bed, made.id) if name == "seal pages" else None)
    sealed = again.seal(made.id)
    assert bed.store.seal(made.id) == sealed
    assert bed.store.get(made.id) == sealed
    assert sorted(path.name for path in bed.store.files.layer(made.id).root.iterdir()) == ["index", "layer.json", "owners"]


def _refused(bed: Bed, layer_id: str) -> None:
    with pytest.raises(BusyError):
        bed.store.seal(layer_id)


def test_the_process_that_seals(bed: Bed) -> None:
    one, two = bed.layer({1: 1}), bed.layer({2: 2})
    command = [sys.executable, "-m", "ramet.store.seal", str(bed.store.files.root)]
    done = subprocess.run([*command, one.id, two.id], capture_output=True, check=True, text=True)
    assert [line for line in done.stdout.splitlines() if line.endswith("1.000")] == [f"{one.id} 1.000", f"{two.id} 1.000"]
    assert all(each.sealed for each in bed.store.layers())
    bed.check()
    failed = subprocess.run([*command, layer.new_id()], capture_output=True, check=False, text=True)
    assert failed.returncode == LayerError.exit
    assert json.loads(failed.stderr)["code"] == "layer"


def test_readers_load_no_heavy_modules() -> None:
    code = "import sys, ramet.store.chain; print([m for m in ('asyncio', 'subprocess', 'pydantic', 'sqlalchemy', 'tempfile') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "[]\n"


def test_a_layer_that_was_not_on_the_disk_when_the_host_went_down_is_not_served(bed: Bed) -> None:
    made = bed.layer({0: 1})
    child = bed.layer({1: 1}, made.id)
    assert made.boot
    files = bed.store.files.layer(made.id)
    layer.save(files, dataclasses.replace(made, boot="another"), durable=False)
    for layer_id in (made.id, child.id):
        with pytest.raises(LayerError, match=f"layer {made.id} was not on the disk"):
            bed.read(layer_id)
        assert made.id in bed.store.verify(layer_id)[0]
    with pytest.raises(LayerError, match="was not on the disk"):
        bed.store.seal(made.id)


def test_a_durable_layer_has_what_it_stands_on_on_the_disk(bed: Bed) -> None:
    first = bed.layer({0: 1})
    second = bed.layer({1: 1}, first.id)
    assert second.boot
    third = bed.layer({2: 1}, second.id, durable=True)
    assert not any(bed.store.get(each.id).boot for each in (first, second, third))
    bed.check()


def write_with_qemu(disk: Path, base: Path, want: Path) -> None:
    """Put a base below an overlay, write to it, and say what it reads as."""
    subprocess.run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", base, disk], check=True)
    commands = ["write -P 1 0 1000", "write -P 2 1M 200k", "write -z 64k 128k", "write -P 3 39M 64k", "discard 1M 64k", "write -P 0 2M 64k"]
    subprocess.run(["qemu-io", "-f", "qcow2", *[word for each in commands for word in ("-c", each)], disk], check=True, capture_output=True)
    subprocess.run(["qemu-img", "convert", "-O", "raw", disk, want], check=True)


async def test_disks_of_qemu(bed: Bed, tmp_path: Path) -> None:
    """A frozen overlay becomes a layer without being copied, and reads as qemu-img says."""
    size = 40 << 20
    base = bed.state.root / BASE
    base.write_bytes(b"".join(page(300 + number) for number in range(500)))
    want = tmp_path / "want.raw"
    with bed.store.draft(Kind.DISK, size, base=BASE) as draft:
        await qcow2.create(draft.spool, size)
        write_with_qemu(draft.spool, base, want)
        made = bed.store.publish(draft, qcow2.runs(draft.spool, size), durable=True)
    assert bed.read(made.id) == want.read_bytes()
    sealed = bed.store.seal(made.id)
    assert bed.read(made.id) == want.read_bytes()
    assert bed.store.verify(made.id) == []
    assert sealed.stored_bytes < 1 << 17
