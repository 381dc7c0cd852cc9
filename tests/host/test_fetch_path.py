"""The whole way of a chunk that is not here: a guest's read, the image file system, the fetcher, a real registry that wants to know who asks."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ramet.errors import ImageError
from ramet.paths import StoreDir
from ramet.registry.client import Registry as Client
from ramet.store import mounting, remote
from ramet.store.fetching import Fetcher
from ramet.store.layer import CHUNK, Layer
from ramet.store.mounting import ImageFs
from ramet.store.remote import Source
from ramet.store.schedule import GAP, Around

from .conftest import Registry, certified
from .fakeblobs import DEADLINE, frames, layer, lend, same, store

PATH = "acme/shop"


@dataclass
class Bed:
    there: StoreDir
    here: StoreDir
    record: Layer
    fs: ImageFs

    @property
    def served(self) -> Path:
        return self.here.served(self.record.id)

    async def page(self, offset: int) -> bytes:
        """As a guest reads it."""

        def read() -> bytes:
            with open(self.served, "rb") as file:
                return os.pread(file.fileno(), 4096, offset)

        return await asyncio.wait_for(asyncio.to_thread(read), DEADLINE)

    def fetcher(self) -> int:
        lines = [line.split() for line in self.here.pids.read_text().splitlines()]
        return next((int(pid) for role, pid, _ in lines if role == "fetcher"), 0)


@contextlib.asynccontextmanager
async def lent(place: Path, source: str) -> AsyncIterator[Bed]:
    """A layer here whose blob is in a registry only, if it is there. source: the registry's address."""
    if reason := mounting.usable():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    one, other = store(place / "there"), store(place / "here")
    record = layer(one, 200)
    lend(one.files, other.files, [record], Source(host=source, path=PATH))
    fs = ImageFs(other.files)
    await fs.ensure()
    try:
        yield Bed(one.files, other.files, record, fs)
    finally:
        await fs.stop()


async def upload(bed: Bed, address: str, path: str = PATH) -> None:
    data = bed.there.blob(bed.record.blobs[0]).read_bytes()
    async with Client.open(address) as client:
        await client.upload(path, bed.record.blobs[0], len(data), lambda at, length: data[at : at + length], lambda done: None)


@pytest.fixture
async def bed(tmp_path: Path, registries: Callable[..., Registry], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bed]:
    registry = registries(credentials="me:secret")
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(registry.login(tmp_path / "login")))
    monkeypatch.setenv("RAMET_FETCH_RATE", "0")
    async with lent(tmp_path, registry.address) as made:
        await upload(made, registry.address)
        yield made


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def test_what_a_guest_reads_comes_and_little_more(bed: Bed) -> None:
    page = await bed.page(50 * CHUNK + 5 * 4096)
    assert page[:2048] != bytes(2048)
    assert page[2048:] == bytes(2048)
    wants = frames(bed.here, bed.record)
    assert same(bed.there, bed.here, wants[50:51])
    async with asyncio.timeout(DEADLINE):
        while await bed.fs.touched(bed.record.id) != [(50 * CHUNK, CHUNK)]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    near = [want for want in wants if abs(want.offset - wants[50].offset) <= Around.LEAST]
    async with Fetcher.connect(bed.here, bed.fs.nudge) as line:
        assert wants[50].length <= (await line.status()).fetched <= sum(want.length for want in near) + GAP


async def test_a_guest_reads_all_while_fetchers_and_workers_are_killed(bed: Bed) -> None:
    reading = asyncio.ensure_future(asyncio.to_thread(_digest, bed.served))
    for _ in range(3):
        await asyncio.sleep(0.3)
        _, workers = mounting.pids(bed.here)
        for pid in (bed.fetcher(), workers[0]):
            with contextlib.suppress(ProcessLookupError):
                if pid:
                    os.kill(pid, signal.SIGKILL)
    there = ImageFs(bed.there)
    await there.ensure()
    try:
        wanted = await asyncio.to_thread(_digest, bed.there.served(bed.record.id))
    finally:
        await there.stop()
    assert await asyncio.wait_for(reading, 4 * DEADLINE) == wanted


async def test_what_was_brought_is_read_without_the_registry(bed: Bed) -> None:
    async with Fetcher.connect(bed.here, bed.fs.nudge) as line:
        await asyncio.wait_for(line.bring([bed.record.id]), DEADLINE)
        fetched = (await line.status()).fetched
        await asyncio.to_thread(_digest, bed.served)
        assert (await line.status()).fetched == fetched
    found = remote.load(bed.here, bed.record.blobs[0])
    assert found
    assert found.whole
    assert fetched == found.size


async def test_the_fetcher_has_certificates_and_mirrors(
    tmp_path: Path, registries: Callable[..., Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the user's directory of certificates and registries.conf say: a registry that wants to know who comes, of which there is a mirror."""
    (me := tmp_path / "me").mkdir()
    key, certificate = certified(me)
    mirror, own = registries(), registries(tls=True, clients=certificate)
    settings = tmp_path / "config" / "containers"
    certs = settings / "certs.d" / own.address
    certs.mkdir(parents=True)
    shutil.copy(own.certificate, certs / "ca.crt")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    with pytest.raises(ImageError, match="it wants a certificate from those who come"):
        async with Client.open(own.address, deadline=0) as client:
            await client.has(PATH, "sha256:" + 64 * "0")
    shutil.copy(certificate, certs / "me.cert")
    shutil.copy(key, certs / "me.key")
    (settings / "registries.conf").write_text(
        f'[[registry]]\nlocation = "{own.address}"\n[[registry.mirror]]\nlocation = "{mirror.address}/copies"\n'
    )
    monkeypatch.delenv("CONTAINERS_REGISTRIES_CONF", raising=False)
    monkeypatch.setenv("RAMET_FETCH_RATE", "0")

    async with lent(tmp_path, own.address) as bed:
        await upload(bed, own.address)
        assert (await bed.page(3 * CHUNK))[:2048] != bytes(2048)  # the mirror has nothing
        wants = frames(bed.here, bed.record)
        assert same(bed.there, bed.here, wants[3:4])
        await upload(bed, mirror.address, f"copies/{PATH}")
        own.blob(bed.record.blobs[0]).unlink()
        await bed.page(150 * CHUNK)
        assert same(bed.there, bed.here, wants[150:151])
