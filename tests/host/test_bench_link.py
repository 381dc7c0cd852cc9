"""The line of the benches, before a real registry: what goes over it is counted, and nothing of it stays."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sys
from pathlib import Path

import pytest

from ramet import process
from ramet.bench import link
from ramet.bench.link import Link
from ramet.registry.client import Registry
from tests.host.conftest import need

DATA = os.urandom(3 << 20)
DIGEST = "sha256:" + hashlib.sha256(DATA).hexdigest()


async def _there_and_back(line: Link) -> int:
    """Push a blob and read it; the bytes that came over the line for it."""
    async with Registry.open(line.address) as registry:
        await registry.upload("bench/test", DIGEST, len(DATA), lambda offset, length: DATA[offset : offset + length], lambda done: None)
        before = await line.received()
        assert await registry.blob("bench/test", DIGEST, len(DATA)) == DATA
        return await line.received() - before


@pytest.fixture(params=["tc", "bucket"])
def kind(request: pytest.FixtureRequest) -> str:
    need("docker-registry")
    if request.param == "tc":
        need("ip", "tc", "nsenter")
        if os.geteuid() != 0:
            pytest.skip("tc needs root")
    return str(request.param)


async def test_what_comes_is_counted(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = str(tmp_path / "none")
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", settings)
    async with link.opened(kind) as line:
        for rate in (0, 200_000_000):
            await line.shape(rate)
            assert len(DATA) <= await _there_and_back(line) <= len(DATA) * 1.2
    assert os.environ["CONTAINERS_REGISTRIES_CONF"] == settings


async def test_where_there_is_no_tc_a_bucket_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    need("docker-registry")
    found = process.find
    monkeypatch.setattr(process, "find", lambda program: None if program == "tc" else found(program))
    async with link.opened() as line:
        assert "bucket" in line.words
        assert await _there_and_back(line) >= len(DATA)


SCRIPT = """
import asyncio, sys
from ramet.bench import link
async def main():
    async with link.opened(sys.argv[1]):
        print("open", flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


async def test_nothing_outlives_a_killed_bench(kind: str, tmp_path: Path) -> None:
    async with process.running([sys.executable, "-c", SCRIPT, kind], env={"TMPDIR": str(tmp_path)}) as bench:
        assert bench.stdout
        assert await asyncio.wait_for(bench.stdout.readline(), 60) == b"open\n"
        device = Path(f"/sys/class/net/rametb{bench.pid}")
        assert device.exists() == (kind == "tc")
        below = {int(word) for word in Path(f"/proc/{bench.pid}/task/{bench.pid}/children").read_text().split()}
        pidfds = [os.pidfd_open(pid) for pid in below]
        assert len(pidfds) == (1 if kind == "tc" else 2)
        os.kill(bench.pid, signal.SIGKILL)
        for pidfd in pidfds:
            assert await process.gone(pidfd, 30)
            os.close(pidfd)
    async with asyncio.timeout(30):
        while device.exists():  # noqa: ASYNC110  (the kernel takes namespaces apart when it has time)
            await asyncio.sleep(0.05)
