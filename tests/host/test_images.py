"""Images from a real registry and from files: made whole, made once, and nothing left when the maker dies."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from ramet import images, tree
from ramet.errors import ImageError, NotFoundError
from ramet.model import Image, ImageConfig
from ramet.paths import StateDir

from .conftest import Registry, need
from .fakes import serving
from .imaging import (
    DISK_NODE,
    PING,
    RICH,
    SETTINGS,
    STEPS,
    check_rich,
    debugfs,
    disk_of,
    ensure,
    kill_with_children,
    listing,
    root_only,
    silent,
    start,
)
from .layouts import Entry, Layout, file, layer, make

pytestmark = pytest.mark.usefixtures("image_programs", "only_images_left")


def test_a_registry_image_with_all_its_attributes(state: StateDir, registry: Registry, rich: Layout) -> None:
    steps: list[tuple[str, float | None]] = []
    name = registry.push(rich, "acme/rich:1")
    image = asyncio.run(images.ensure(state, name, progress=lambda step, part: steps.append((step, part))))
    assert image.digest == rich.manifest
    assert image.reference == name
    assert image.config == ImageConfig(env={"A": "1"}, user="app", workdir="/srv", entrypoint=("/bin/app",), cmd=("-x",))
    disk = disk_of(state, image)
    assert (disk.stat().st_size, disk.stat().st_blocks * 512) == (image.disk_size, image.disk_used)
    assert image.disk_used < 4 << 20
    check_rich(disk)
    assert list(dict.fromkeys(step for step, _ in steps)) == STEPS
    assert all(part is None or 0 <= part <= 1 for _, part in steps)


@root_only
def test_device_nodes(state: StateDir, tmp_path: Path) -> None:
    nodes = [Entry(name="dev/null", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666), DISK_NODE]
    disk = disk_of(state, ensure(state, make(tmp_path / "devices", layer(*nodes)).reference))
    assert listing(disk, "/dev")["null"][:3] == ("020666", 0, 0)
    assert listing(disk, "/srv")["disk"][:3] == ("060660", 0, 6)
    assert "major/minor number: 08:17" in debugfs(disk, "stat /srv/disk")


@root_only
def test_the_disk_mounts_and_has_room_to_grow(state: StateDir, rich: Layout, tmp_path: Path) -> None:
    image = ensure(state, rich.reference)
    copy, place = tmp_path / "copy.raw", tmp_path / "mnt"
    subprocess.run(["cp", "--sparse=always", state.image(image.digest).disk, copy], check=True)
    copy.chmod(0o600)
    header = subprocess.run(["dumpe2fs", "-h", copy], check=True, capture_output=True, text=True).stdout
    assert "Reserved block count:     0\n" in header
    assert "resize_inode" in header
    assert "meta_bg" not in header
    for size in (8 << 30, 1 << 40):
        os.truncate(copy, size)
        subprocess.run(["resize2fs", copy], check=True, capture_output=True, timeout=120)
        subprocess.run(["e2fsck", "-fn", copy], check=True, capture_output=True, timeout=120)
    assert "meta_bg" not in subprocess.run(["dumpe2fs", "-h", copy], check=True, capture_output=True, text=True).stdout
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", copy, place], check=True)
    try:
        assert os.getxattr(place / "bin/ping", "security.capability") == PING
        assert (place / "home/app/secret").stat().st_uid == 1000
        assert os.statvfs(place).f_blocks * 4096 > 0.98 * (1 << 40) * 0.98
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("form", ["oci", "oci-archive", "docker-archive", "index"])
def test_local_images(state: StateDir, tmp_path: Path, form: str) -> None:
    layout = make(tmp_path / "layout", *RICH, config=SETTINGS, index=form == "index")
    name = layout.reference
    if "archive" in form:
        target = f"{form}:{tmp_path}/image.tar" + ("" if form == "oci-archive" else ":acme/rich:1")
        subprocess.run(["skopeo", "copy", "-q", name, target], check=True, timeout=60)
        name = f"{form}:{tmp_path}/image.tar"
    image = ensure(state, name)
    assert image.config.entrypoint == ("/bin/app",)
    check_rich(disk_of(state, image))
    again = ensure(state, name)
    assert again == image
    if form != "docker-archive":
        assert image.digest == layout.manifest


def test_zstd_layers(state: StateDir, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    need("zstd")
    monkeypatch.setattr("tests.host.layouts.LAYER", "application/vnd.oci.image.layer.v1.tar+zstd")
    zstd = ["zstd", "-c"]
    monkeypatch.setattr("gzip.compress", lambda data, *_, **__: subprocess.run(zstd, input=data, capture_output=True, check=True).stdout)
    layout = make(tmp_path / "zstd", *RICH)
    image = ensure(state, registry.push(layout, "acme/zstd:1"))
    assert image.digest == layout.manifest
    check_rich(disk_of(state, image))


def test_many_small_files_and_a_sparse_one(state: StateDir, tmp_path: Path) -> None:
    entries = [file(f"d{n % 7}/f{n}", b"") for n in range(20_000)] + [file("zeros", bytes(64 << 20))]
    image = ensure(state, make(tmp_path / "many", layer(*entries)).reference)
    assert image.disk_size >= 20_000 * tree.INODE_RATIO
    assert image.disk_used < 32 << 20  # zeros take nothing
    assert listing(disk_of(state, image))["zeros"][3] == 64 << 20


def test_a_cached_digest_fetches_nothing(state: StateDir, rich: Layout) -> None:
    with serving(rich) as fake:
        first = ensure(state, fake.reference)
        fetched = dict(fake.asked)
        assert ensure(state, fake.reference) == first
        assert {d: n for d, n in fake.asked.items() if d not in (rich.manifest,)} == {
            d: n for d, n in fetched.items() if d != rich.manifest
        }
        pinned = f"{fake.address}/x@{rich.manifest}"
        asked = fake.asked[rich.manifest]
        assert ensure(state, pinned) == dataclasses.replace(first, reference=pinned)
        assert fake.asked[rich.manifest] == asked  # not even the manifest
        assert asyncio.run(images.resolve(fake.reference)) == first.digest
    assert images.list_images(state) == [first]
    with pytest.raises(ImageError) as caught:  # the registry is gone, and a tag is the registry's to resolve
        ensure(state, fake.reference)
    assert f"/x@{rich.manifest}" in caught.value.hint
    asyncio.run(images.remove_image(state, first.digest))
    assert images.list_images(state) == []
    with pytest.raises(NotFoundError):
        asyncio.run(images.remove_image(state, first.digest))


def test_a_digest_that_names_an_index(state: StateDir, registry: Registry, tmp_path: Path) -> None:
    layout = make(tmp_path / "index", *RICH, index=True)
    name = registry.push(layout, "acme/multi:1")
    top = json.loads((layout.path / "index.json").read_text())["manifests"][0]["digest"]
    assert top != layout.manifest
    image = ensure(state, f"{name.rpartition(':')[0]}@{top}")
    assert image.digest == layout.manifest
    shutil.rmtree(registry.data)  # neither name needs it any more
    for digest in (top, layout.manifest):
        assert ensure(state, f"{name.rpartition(':')[0]}@{digest}").digest == layout.manifest


def test_a_moved_tag_is_another_image(state: StateDir, registry: Registry, tmp_path: Path) -> None:
    name = registry.push(make(tmp_path / "a", layer(file("a"))), "x:1")
    first = ensure(state, name)
    registry.push(make(tmp_path / "b", layer(file("b"))), "x:1")
    second = ensure(state, name)
    assert first.digest != second.digest
    assert len(images.list_images(state)) == 2
    asyncio.run(images.remove_image(state, name))
    assert images.list_images(state) == []


def test_two_at_once_do_the_work_once(state: StateDir, rich: Layout) -> None:
    async def both(name: str) -> list[Image]:
        return await asyncio.gather(*(images.ensure(state, name, progress=silent) for _ in range(4)))

    with serving(rich) as fake:
        results = asyncio.run(both(fake.reference))
        assert len(set(map(repr, results))) == 1
        assert [fake.asked[digest] for digest in rich.layers] == [1, 1]


def test_two_processes_do_the_work_once(state: StateDir, rich: Layout) -> None:
    with serving(rich) as fake:
        outputs = [process.communicate(timeout=60)[0] for process in [start(state, fake.reference) for _ in range(3)]]
        assert {output.splitlines()[-1] for output in outputs} == {rich.manifest}
        assert [fake.asked[digest] for digest in rich.layers] == [1, 1]


@pytest.mark.parametrize("step", ["looking up the image", "unpacking the image", "writing the disk"])
def test_kill_9_at_any_step(state: StateDir, rich: Layout, step: str) -> None:
    process = start(state, rich.reference, step)
    assert process.stdout is not None
    while not process.stdout.readline().startswith(f"step {step}"):
        assert process.poll() is None
    kill_with_children(process)
    left = [p for p in state.images.iterdir() if p.name.startswith(".work-")]
    assert bool(left) == (step != "looking up the image")
    assert images.list_images(state) == []
    check_rich(disk_of(state, ensure(state, rich.reference)))


def test_kill_9_takes_the_programs_along(state: StateDir, rich: Layout) -> None:
    with serving(rich) as fake:
        fake.hang.add(rich.layers[0])
        process = start(state, fake.reference)
        assert process.stdout is not None
        while not (line := process.stdout.readline()).startswith("step fetching") or not float(line.split()[-1]):
            assert process.poll() is None
        assert kill_with_children(process) >= 1
        fake.hang.clear()
        ensure(state, fake.reference)


def test_a_live_makers_work_is_not_swept(state: StateDir, rich: Layout, tmp_path: Path) -> None:
    process = start(state, rich.reference, "writing the disk")
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step writing"):
        assert process.poll() is None
    ensure(state, make(tmp_path / "other", layer(file("x"))).reference)
    assert len(list(state.images.glob(".work-*"))) == 1
    assert process.communicate("", timeout=60)[0].splitlines()[-1] == rich.manifest


@pytest.mark.parametrize("step", ["fetching the image", "unpacking the image", "writing the disk"])
async def test_cancelled_at_any_step(state: StateDir, rich: Layout, step: str) -> None:
    with serving(rich) as fake:
        if step.startswith("fetching"):
            fake.hang.add(rich.layers[1])

        def progress(now: str, part: float | None) -> None:
            if now == step and (part or not fake.hang):  # when fetching: when something has come
                task.cancel()

        task = asyncio.create_task(images.ensure(state, fake.reference, progress=progress))
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 60)
        assert list(state.images.iterdir()) == []
        fake.hang.clear()
        assert (await images.ensure(state, fake.reference, progress=silent)).digest == rich.manifest


async def test_cancelling_one_of_two_leaves_the_other(state: StateDir, rich: Layout) -> None:
    with serving(rich) as fake:
        waiting = asyncio.Event()
        first = asyncio.create_task(
            images.ensure(state, fake.reference, progress=lambda step, _: waiting.set() if step.startswith("waiting") else None)
        )
        second = asyncio.create_task(
            images.ensure(state, fake.reference, progress=lambda step, _: waiting.set() if step.startswith("waiting") else None)
        )
        await asyncio.wait_for(waiting.wait(), 60)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert (await asyncio.wait_for(second, 60)).digest == rich.manifest


def test_a_damaged_cache_entry_is_made_again(state: StateDir, rich: Layout) -> None:
    image = ensure(state, rich.reference)
    state.image(image.digest).record.write_text("{}")
    assert images.list_images(state) == []
    assert ensure(state, rich.reference).digest == image.digest
    assert len(images.list_images(state)) == 1
    asyncio.run(images.remove_image(state, rich.reference))


def test_too_small_an_estimate_is_corrected(state: StateDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    big = make(tmp_path / "big", layer(file("a", os.urandom(60 << 20))))
    monkeypatch.setattr(tree, "disk_size", lambda _: 80 << 20)
    image = ensure(state, big.reference)
    assert image.disk_size == 2 * (80 << 20)
    assert listing(disk_of(state, image))["a"][3] == 60 << 20
