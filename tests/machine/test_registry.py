"""Machines that go on on another host, from what a registry has: with their programs, or from their disk, or from an image that was made one."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from ramet import pulling, restoring
from ramet.engine import Engine
from ramet.model import NodeKind
from ramet.paths import StateDir
from ramet.store import tracing
from tests.fixtures import Artifacts, Box, States, opened
from tests.host.conftest import Registry, registries
from tests.machine.witness import saved

__all__ = ["registries"]
DEADLINE = 300.0
COUNTER = "mkdir -p /srv; echo first > /srv/word; (while :; do echo tick >> /run/ticks; sleep 0.1; done) > /dev/null 2>&1 & sync"


@pytest.fixture
def registry(registries: Callable[..., Registry]) -> Registry:
    return registries()


@pytest_asyncio.fixture(loop_scope="session")
async def elsewhere(states: States, tmp_path: Path) -> AsyncIterator[Engine]:
    """Another host: one that has no images, and has never seen a machine."""
    state = StateDir(root=tmp_path / "elsewhere")
    state.root.mkdir()
    shutil.copy(states.artifacts.store.kvm, state.kvm)
    state.create()
    states.scratch.add(state)
    async with opened(state) as engine:
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shop(engine: Engine, artifacts: Artifacts) -> AsyncIterator[Box]:
    """A machine with something in its memory and something on its disk, of which there are snapshots with and without memory."""
    await engine.create(artifacts.spec("shop"))
    box = Box(engine, "shop")
    await box.sh(COUNTER)
    await box.sh("echo in memory only > /run/word; dd if=/dev/urandom of=/srv/noise bs=1M count=24; sync; sha256sum /srv/noise > /run/sum")
    await engine.snapshot("shop", "warm")
    await engine.snapshot("shop", "cold", memory=False)
    await saved(engine, "shop@warm")
    await saved(engine, "shop@cold")
    yield box
    await engine.delete_snapshot("shop@warm", cascade=True)
    await engine.delete_snapshot("shop@cold", cascade=True)
    await engine.delete("shop")


async def test_programs_go_on_elsewhere(engine: Engine, shop: Box, elsewhere: Engine, registry: Registry) -> None:
    name = f"{registry.address}/acme/shop:1"
    found = await engine.get_snapshot("shop@warm")
    assert tracing.load(engine._ops.state.store, found.memory_layer)
    sent = await engine.push("shop@warm", name)
    came = await elsewhere.pull(name, lazy=True)
    assert came.digest == sent.digest
    assert came.moved < sent.size / 5
    absent = pulling.absent(elsewhere._ops, elsewhere._ops.snapshots[(await elsewhere.get_snapshot(name)).id].layers)
    assert absent > 0
    made = await elsewhere.create_from(name, "twin")
    twin = Box(elsewhere, "twin")
    assert await twin.text("cat /run/word") == "in memory only"
    assert await twin.text("hostname") == "twin"
    before = int(await twin.text("wc -l < /run/ticks"))
    async with asyncio.timeout(DEADLINE):
        while int(await twin.text("wc -l < /run/ticks")) <= before:  # noqa: ASYNC110  (it comes by itself)
            await asyncio.sleep(0.1)
    await twin.sh("cd / && sha256sum -c /run/sum")
    # It is a machine like any other: saved, forked, stopped, and booted anew.
    (child,) = await elsewhere.fork("twin", names=("child",))
    assert child.error is None
    assert await Box(elsewhere, "child").text("cat /run/word") == "in memory only"
    await elsewhere.stop("twin")
    await elsewhere.start("twin")
    assert await twin.text("cat /srv/word") == "first"
    nodes = {each.id: each for each in await elsewhere.tree()}
    above = nodes[nodes[made.id].parent]
    assert (above.kind, above.name) == (NodeKind.SNAPSHOT, name)
    assert nodes[above.parent].kind is NodeKind.IMAGE


async def test_only_the_disk(engine: Engine, shop: Box, elsewhere: Engine, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restoring, "_TRACED", 1.0)
    name = f"{registry.address}/acme/shop:disk"
    await engine.push("shop@cold", name)
    await elsewhere.create_from(name, "twin")
    twin = Box(elsewhere, "twin")
    assert await twin.text("cat /srv/word; echo $IMAGE") == "first\ntiny"
    bases = {each.id for each in elsewhere._ops.store.layers() if not each.base} & {
        each.id for each in await elsewhere.layers() if each.used_by
    }
    assert bases, "what the image's disk was is used by the machine whose disk stands on it"
    found = await elsewhere.get_snapshot(name)
    layer = found.disk_layer
    async with asyncio.timeout(DEADLINE):
        while not tracing.load(elsewhere._ops.state.store, layer):  # noqa: ASYNC110
            await asyncio.sleep(0.2)


async def test_an_image_starts_elsewhere(engine: Engine, shop: Box, artifacts: Artifacts, elsewhere: Engine, registry: Registry) -> None:
    name = f"{registry.address}/acme/tiny:1"
    made = await engine.convert(artifacts.tiny, "tiny-image")
    assert made.name == "tiny-image:latest"
    sent = await engine.push("tiny-image", name)
    again = await engine.push("tiny-image", name)
    assert again.digest == sent.digest
    assert again.moved < 10_000 < sent.moved
    await engine.delete_snapshot("tiny-image:latest")
    await elsewhere.pull(name, lazy=True)
    await elsewhere.create_from(name, "box")
    assert await Box(elsewhere, "box").text("echo $IMAGE; ls /bin/busybox") == "tiny\n/bin/busybox"
