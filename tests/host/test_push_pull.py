"""Snapshots sent to a registry and had from there, between two state directories; no machine runs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ramet import artifact, images, pulling, pushing, saving
from ramet.db import Database
from ramet.errors import AbsentError, ExistsError, HostError, ImageError, RametError, SpecError
from ramet.host import Host
from ramet.model import Accelerator, Compatibility, Drive, Image, ImageConfig, Snapshot, SnapshotState, Spec
from ramet.operations import Operations
from ramet.paths import StateDir
from ramet.sealing import Sealer
from ramet.storage import Transfer
from ramet.store import tracing
from ramet.store.chain import Chain
from ramet.store.fetching import fetch_now
from ramet.store.layer import PAGE, Kind, Layer
from ramet.store.runs import Runs

from .conftest import Registry

MEMORY, DISK = 64 << 20, 128 << 20
IMAGE = "sha256:" + "1" * 64
DEVICES = b"the state of the devices" * 1000


@dataclass
class Place:
    """A host: a state directory and its operations. said: what was told of the last push or pull."""

    state: StateDir
    ops: Operations
    sealer: Sealer
    said: list[tuple[str, float | None]]

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, root: Path) -> AsyncIterator[Place]:
        state = StateDir(root=root)
        root.mkdir()
        state.create()
        async with Database.open(state.database) as database:
            ops = Operations(state, database, Host(state))
            try:
                yield cls(state, ops, Sealer(ops, lambda found: None), [])
            finally:
                await ops.close()

    def say(self, step: str, fraction: float | None) -> None:
        assert fraction is None or 0 <= fraction <= 1
        self.said.append((step, fraction))

    async def push(self, found: Snapshot, reference: str) -> Transfer:
        return await pushing.push(self.ops, self.sealer, found, reference, self.say)

    async def pull(self, reference: str, *, lazy: bool = False) -> Transfer:
        return await pulling.pull(self.ops, reference, lazy=lazy, say=self.say)

    def find(self, name: str) -> Snapshot:
        return next(each for each in self.ops.snapshots.values() if each.name == name)

    def image(self) -> Image:
        """An image whose disk is a few pages of noise."""
        place = self.state.image(IMAGE)
        place.root.mkdir(exist_ok=True)
        with open(place.disk, "wb") as file:
            file.truncate(32 << 20)
            for offset in (0, 1 << 20, 9 << 20):
                file.seek(offset)
                file.write(random.Random(offset).randbytes(100 * PAGE))
        config = ImageConfig(env={"A": "b=c", "PATH": "/bin"}, user="app", workdir="/srv", entrypoint=("/init",), cmd=("now",))
        made = Image(digest=IMAGE, reference="acme/shop:1", config=config, disk_size=32 << 20, disk_used=1 << 20, created_at=1.0)
        images.admit(self.state, made, "")
        return made

    def layer(self, kind: Kind, pages: dict[int, int], *, parent: str = "", base: str = "", size: int = 0, sealed: bool = False) -> Layer:
        """A layer whose pages are noise of these seeds."""
        size = size or (MEMORY if kind is Kind.MEMORY else DISK)
        with self.ops.store.draft(kind, size, parent, base) as draft:
            draft.spool.write_bytes(b"".join(random.Random(seed).randbytes(PAGE) for seed in pages.values()))
            runs = Runs.build((page, 1, at) for at, page in enumerate(pages))
            if not sealed:
                return self.ops.store.publish(draft, runs, durable=False)
            with open(draft.spool, "rb") as file:
                draft.spool.unlink()
                return self.ops.store.publish_sealed(draft, file.fileno(), runs)

    async def snapshot(self, name: str, disk: Layer, memory: Layer | None = None, drives: tuple[Layer, ...] = ()) -> Snapshot:
        """A record that names these layers."""
        fit = Compatibility(machine="q35", qemu="7.2.0", cpu="any", accelerator=Accelerator.TCG, kernel="6.9", agent=1, format=1)
        made = Snapshot(
            id=os.urandom(6).hex(),
            name=name,
            machine="shop",
            state=SnapshotState.SAVING,
            created_at=time.time(),
            memory=memory is not None,
            spec=Spec(
                name="shop",
                image="acme/shop:1",
                memory=MEMORY,
                disk=DISK,
                env={"TOKEN": "x"},
                drives=tuple(Drive(name=f"data{number}", size=each.size, mount="/data") for number, each in enumerate(drives)),
            ),
            image_digest=IMAGE,
            disk_layer=disk.id,
            drive_layers=tuple(each.id for each in drives),
            memory_layer=memory.id if memory else "",
            compatibility=fit if memory else None,
        )
        with saving.stage(self.ops, made.id) as staged:
            if memory:
                staged.state.write_bytes(DEVICES)
            await saving.admit(self.ops, made, staged)
        return made

    def read(self, layer_id: str) -> bytes:
        with Chain.open(self.state.store, layer_id) as chain:
            return b"".join(chain.read(0, chain.size))


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Place]:
    async with Place.open(tmp_path / "here") as place:
        place.image()
        yield place


@pytest.fixture
async def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    """Which fetches nothing by itself."""
    monkeypatch.setenv("RAMET_FETCH_RATE", "0")
    async with Place.open(tmp_path / "there") as place:
        yield place


@pytest.fixture
def base(here: Place) -> str:
    return str(here.state.image(IMAGE).disk.relative_to(here.state.root))


async def test_a_snapshot_goes_and_comes(here: Place, there: Place, base: str, registry: Registry) -> None:
    disk = here.layer(Kind.DISK, {number: number for number in range(40, 90)}, base=base)
    memory = here.layer(Kind.MEMORY, {number * 3: number for number in range(300)})
    found = await here.snapshot("shop@1", disk, memory)
    name = f"{registry.address}/acme/shop:1"
    sent = await here.push(found, name)
    assert sent.snapshot == "shop@1"
    assert sent.moved == sent.size > 300 * PAGE
    came = await there.pull(name)
    assert (came.digest, came.size, came.snapshot) == (sent.digest, sent.size, name)
    got = there.find(name)
    assert there.read(got.disk_layer) == here.read(disk.id)
    assert there.read(got.memory_layer) == here.read(memory.id)
    assert there.state.snapshot(got.id).state.read_bytes() == DEVICES
    assert got.origin == f"{registry.address}/acme/shop@{sent.digest}"
    assert (got.spec, got.compatibility, got.template, got.state) == (found.spec, found.compatibility, True, SnapshotState.READY)
    assert pulling.absent(there.ops, got.layers) == 0


async def test_a_lazy_one_comes_when_it_is_read(here: Place, there: Place, base: str, registry: Registry) -> None:
    disk = here.layer(Kind.DISK, {number: number for number in range(400)}, base=base)
    name = f"{registry.address}/acme/shop:1"
    sent = await here.push(await here.snapshot("shop@1", disk), name)

    came = await there.pull(name, lazy=True)
    assert came.moved < sent.size / 20
    assert came.moved + came.shared < sent.size  # the rest is neither
    got = there.find(name)
    with pytest.raises(AbsentError):
        there.read(got.disk_layer)
    fetch = functools.partial(fetch_now, there.state.store, got.disk_layer, nudge=there.ops.layers.nudge)
    with Chain.open(there.state.store, got.disk_layer, fetch=fetch) as chain:
        assert b"".join(await asyncio.to_thread(chain.read, 0, chain.size)) == here.read(disk.id)


async def test_what_a_registry_has_is_not_sent_again(here: Place, there: Place, base: str, registry: Registry) -> None:
    disk = here.layer(Kind.DISK, {number: number for number in range(500)}, base=base)
    memory = here.layer(Kind.MEMORY, {number: number + 1000 for number in range(500)})
    name = f"{registry.address}/acme/shop"
    first = await here.push(await here.snapshot("shop@1", disk, memory), f"{name}:1")
    again = await here.push(here.find("shop@1"), f"{name}:1")
    assert again.digest == first.digest
    assert again.moved == first.size - again.shared < 5000  # the manifest
    here.said.clear()
    tagged = await here.push(here.find("shop@1"), f"{name}:same")
    assert tagged == replace(again, reference=f"{name}:same", seconds=tagged.seconds)
    assert [step for step, _ in here.said] == ["publishing"]  # nothing is packed for one more tag
    async with here.ops.layers_in_use():
        more = here.layer(Kind.DISK, {7: 9000}, parent=disk.id)
        other = here.layer(Kind.MEMORY, {9: 9001}, parent=memory.id)
        found = await here.snapshot("shop@2", more, other)
    second = await here.push(found, f"{name}:2")
    assert second.moved < 40_000 < second.shared
    # In another repository of the same registry: what is known to be there is had from there. An older Ramet knew nothing of snapshots.
    known = json.loads(here.state.pushes.read_bytes())
    here.state.pushes.write_text(json.dumps({key: known[key] for key in ("blobs", "uploads")}))
    third = await here.push(here.find("shop@2"), f"{registry.address}/other/shop:2")
    assert third.digest == second.digest
    assert third.moved < 5000
    # The second one needs only its own on a host that has the first.
    await there.pull(f"{name}:1")
    came = await there.pull(f"{name}:2")
    assert came.moved < 40_000
    assert there.read(there.find(f"{name}:2").disk_layer) == here.read(more.id)
    assert there.read(there.find(f"{name}:2").memory_layer) == here.read(other.id)


async def test_what_a_registry_has_lost_is_sent_again(here: Place, there: Place, base: str, registry: Registry) -> None:
    disk = here.layer(Kind.DISK, {number: number for number in range(500)}, base=base)
    name = f"{registry.address}/acme/shop"
    first = await here.push(await here.snapshot("shop@1", disk), f"{name}:1")
    (lost,) = here.ops.store.get(disk.id).blobs
    shutil.rmtree(registry.data / "docker/registry/v2/repositories/acme/shop/_layers/sha256" / lost.removeprefix("sha256:"))
    registry.blob(lost).unlink()
    again = await here.push(here.find("shop@1"), f"{name}:2")
    assert again.digest == first.digest
    assert again.moved > 400 * PAGE
    tracing.save(here.state.store, disk.id, [7, 1, 2])  # of which what is there knows nothing
    traced = await here.push(here.find("shop@1"), f"{name}:2")
    assert traced.digest != first.digest
    assert (await here.push(here.find("shop@1"), f"{name}:3")).digest == traced.digest
    await there.pull(f"{name}:2")
    assert there.read(there.find(f"{name}:2").disk_layer) == here.read(disk.id)


async def test_what_else_is_on_the_host_stays_there(here: Place, there: Place, base: str, registry: Registry) -> None:
    shared = {number: number for number in range(64)}
    secret = here.layer(Kind.DISK, shared | {number: number for number in range(500, 532)}, base=base, sealed=True)
    disk = here.layer(Kind.DISK, shared | {2000: 4}, base=base, sealed=True)
    assert set(here.ops.store.get(disk.id).blobs) & set(secret.blobs)
    name = f"{registry.address}/acme/shop:1"
    sent = await here.push(await here.snapshot("shop@1", disk), name)
    kept = [path.read_bytes() for path in registry.data.rglob("data") if path.is_file()]
    assert any(random.Random(5).randbytes(PAGE) in data for data in kept)  # noise is kept as it is
    assert not any(random.Random(500 + number).randbytes(PAGE) in data for number in range(32) for data in kept)
    assert (await here.push(here.find("shop@1"), f"{registry.address}/other/shop:1")).digest == sent.digest  # packed anew
    await there.pull(name)
    assert there.read(there.find(name).disk_layer) == here.read(disk.id)


async def test_what_was_pulled_goes_on_to_others(
    here: Place, there: Place, base: str, registries: Callable[..., Registry], tmp_path: Path
) -> None:
    one, two = registries(), registries()
    disk = here.layer(Kind.DISK, {number: number for number in range(500)}, base=base)
    sent = await here.push(await here.snapshot("shop@1", disk), f"{one.address}/acme/shop:1")
    await there.pull(f"{one.address}/acme/shop:1", lazy=True)
    got = there.find(f"{one.address}/acme/shop:1")
    near = await there.push(got, f"{one.address}/near/shop:1")
    assert near.moved < 50_000  # its chunks did not have to come here for that
    assert pulling.absent(there.ops, got.layers) > sent.size / 2
    async with there.ops.layers_in_use():
        own = there.layer(Kind.DISK, {3: 3000}, parent=got.disk_layer)
        found = replace(await there.snapshot("shop@2", own), image_digest=got.image_digest)
    await there.push(found, f"{two.address}/far/shop:2")
    assert pulling.absent(there.ops, got.layers) == 0  # they had to, to be sent to somebody else
    async with Place.open(tmp_path / "third") as third:
        await third.pull(f"{two.address}/far/shop:2")
        assert third.read(third.find(f"{two.address}/far/shop:2").disk_layer) == there.read(own.id)


async def test_a_tag_that_moves(here: Place, there: Place, base: str, registry: Registry) -> None:
    name = f"{registry.address}/acme/shop:1"
    old = await here.push(await here.snapshot("shop@1", here.layer(Kind.DISK, {1: 1}, base=base)), name)
    await there.pull(name)
    before = there.find(name)
    again = await there.pull(name)
    assert (again.digest, again.moved) == (old.digest, again.size - again.shared)
    assert again.moved < 5000
    assert there.find(name) == before
    async with here.ops.layers_in_use():
        found = await here.snapshot("shop@2", here.layer(Kind.DISK, {1: 2}, base=base))
    new = await here.push(found, name)
    assert (await there.pull(name)).digest == new.digest
    assert there.find(name).origin.endswith(new.digest)
    assert there.ops.snapshots[before.id].name == ""
    await there.pull(f"{registry.address}/acme/shop@{old.digest}")
    assert there.find(f"{registry.address}/acme/shop@{old.digest}").disk_layer == before.disk_layer
    await there.ops.snapshots.change(there.find(name).id, origin="")
    with pytest.raises(ExistsError):
        await there.pull(name)


async def test_other_tools_read_and_copy_it(here: Place, there: Place, base: str, registries: Callable[..., Registry]) -> None:
    one, two = registries(), registries()
    disk = here.layer(Kind.DISK, {number: number for number in range(50)}, base=base)
    sent = await here.push(await here.snapshot("shop@1", disk), f"{one.address}/acme/shop:1")
    skopeo = ["skopeo", "--override-os=linux"]
    shown = await asyncio.to_thread(
        subprocess.run,
        [*skopeo, "inspect", "--tls-verify=false", f"docker://{one.address}/acme/shop:1"],
        check=True,
        capture_output=True,
        timeout=60,
    )
    assert json.loads(shown.stdout)["Digest"] == sent.digest
    assert "PATH=/bin" in json.loads(shown.stdout)["Env"]
    words = ["copy", "--src-tls-verify=false", "--dest-tls-verify=false"]
    await asyncio.to_thread(
        subprocess.run, [*skopeo, *words, f"docker://{one.address}/acme/shop:1", f"docker://{two.address}/copy:2"], check=True, timeout=60
    )
    came = await there.pull(f"{two.address}/copy:2")
    assert came.digest == sent.digest
    assert there.read(there.find(f"{two.address}/copy:2").disk_layer) == here.read(disk.id)


async def test_a_push_that_was_cut_off_goes_on(here: Place, base: str, registry: Registry) -> None:
    disk = here.layer(Kind.DISK, {number: number for number in range(12_000)}, base=base)  # 47 MB, three pieces
    found = await here.snapshot("shop@1", disk)
    name = f"{registry.address}/acme/shop:1"
    begun = asyncio.Event()

    def say(step: str, fraction: float | None) -> None:
        if step == "sending" and fraction and fraction > 0.2:
            begun.set()

    task = asyncio.create_task(pushing.push(here.ops, here.sealer, found, name, say))
    await asyncio.wait({task, asyncio.create_task(begun.wait())}, return_when=asyncio.FIRST_COMPLETED)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    kept = json.loads(here.state.pushes.read_text())
    done = await here.push(found, name)
    assert kept["uploads"] or kept["blobs"]
    assert not json.loads(here.state.pushes.read_text())["uploads"]
    assert done.size > 47 << 20
    assert not [path for path in here.state.store.blobs.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", [artifact.CONFIG, artifact.TABLES, artifact.STATE])
async def test_wrong_bytes_are_named(here: Place, there: Place, base: str, registry: Registry, kind: str) -> None:
    memory = here.layer(Kind.MEMORY, {1: 1})
    found = await here.snapshot("shop@1", here.layer(Kind.DISK, {1: 2}, base=base), memory)
    sent = await here.push(found, f"{registry.address}/acme/shop:1")
    manifest = artifact.read_manifest(registry.blob(sent.digest).read_bytes(), "")
    part = manifest.config if kind == artifact.CONFIG else manifest.of(kind)[-1]
    place = registry.blob(part.digest)
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 1
    place.write_bytes(data)
    with pytest.raises((ImageError, HostError), match=part.digest[7:19]):
        await there.pull(f"{registry.address}/acme/shop:1")
    assert not there.ops.snapshots
    assert not list(there.state.snapshots.iterdir())
    await there.ops.collect()
    assert not list(there.state.store.layers.iterdir())
    assert not list(there.state.store.blobs.iterdir())
    assert not list(there.state.store.remotes.iterdir())


async def test_what_is_no_snapshot(here: Place, there: Place, base: str, registry: Registry) -> None:
    found = await here.snapshot("shop@1", here.layer(Kind.DISK, {1: 2}, base=base))
    for reference in ("debian:12", f"oci:{here.state.root}", f"{registry.address}/acme/shop@sha256:{'0' * 64}"):
        with pytest.raises(SpecError):
            await here.push(found, reference)
    with pytest.raises(ImageError):
        await there.pull("debian:12")
    with pytest.raises(ImageError):
        await there.pull(f"{registry.address}/acme/nothing:1")
    await here.ops.snapshots.change(found.id, state=SnapshotState.BROKEN, reason="it is")
    with pytest.raises(RametError, match="broken"):
        await here.push(here.find("shop@1"), f"{registry.address}/acme/shop:1")


async def test_traces_go_along(here: Place, there: Place, base: str, registry: Registry) -> None:
    disk = here.layer(Kind.DISK, {number: number for number in range(50)}, base=base)
    tracing.save(here.state.store, disk.id, [7, 1, 2])
    name = f"{registry.address}/acme/shop:1"
    await here.push(await here.snapshot("shop@1", disk), name)
    await there.pull(name, lazy=True)
    assert tracing.load(there.state.store, there.find(name).disk_layer) == [7, 1, 2]


async def test_several_pull_the_same(here: Place, there: Place, base: str, registry: Registry) -> None:
    disk = here.layer(Kind.DISK, {number: number for number in range(50)}, base=base)
    name = f"{registry.address}/acme/shop:1"
    await here.push(await here.snapshot("shop@1", disk), name)
    await here.push(here.find("shop@1"), f"{registry.address}/acme/shop:2")
    same = f"{registry.address}/acme/shop:2"
    pulls = [there.pull(name), there.pull(name, lazy=True), there.pull(same), there.pull(same)]
    await asyncio.gather(*pulls, there.ops.collect(), there.ops.collect())
    assert sorted(each.name for each in there.ops.snapshots.values()) == [name, same]
    await there.ops.collect()
    for found in there.ops.snapshots.values():
        assert there.read(found.disk_layer) == here.read(disk.id)


async def test_drives_go_along(here: Place, there: Place, base: str, registry: Registry) -> None:
    """Also what they began with."""
    size = 64 << 20
    blank = here.state.blank("data", size)
    with open(blank, "wb") as file:
        file.truncate(size)
        file.seek(5 << 20)
        file.write(random.Random(1).randbytes(3 * PAGE))
    drive = here.layer(Kind.DISK, {9: 9}, base=str(blank.relative_to(here.state.root)), size=size)
    found = await here.snapshot("shop@1", here.layer(Kind.DISK, {1: 1}, base=base), drives=(drive,))
    name = f"{registry.address}/acme/shop:1"
    sent = await here.push(found, name)
    assert (await here.push(found, f"{registry.address}/other/shop:1")).digest == sent.digest
    await there.pull(name)
    got = there.find(name)
    assert got.spec.drives == found.spec.drives
    assert there.read(got.drive_layers[0]) == here.read(drive.id)
    assert there.read(got.drive_layers[0])[5 << 20 :].startswith(random.Random(1).randbytes(3 * PAGE))


async def test_an_image_is_not_what_a_stranger_says(here: Place, there: Place, base: str, registry: Registry) -> None:
    """A snapshot of an image that is here keeps to its own, where its artifact says something else of it."""
    name = f"{registry.address}/acme/shop:1"
    await here.push(await here.snapshot("shop@1", here.layer(Kind.DISK, {1: 1}, base=base)), name)
    await there.pull(name)
    got = there.find(name)
    image = images.load(there.state, got.image_digest)
    assert image
    assert image.config == here.image().config
    assert got.image_digest != IMAGE
    assert images.load(there.state, IMAGE) is None
    assert images.load(there.state, got.image_digest, disk=True) is None
    # Where the same is here it is the same.
    there.image()
    async with here.ops.layers_in_use():
        found = await here.snapshot("shop@2", here.layer(Kind.DISK, {1: 2}, base=base))
    await here.push(found, name)
    await there.pull(name)
    assert there.find(name).image_digest == IMAGE
