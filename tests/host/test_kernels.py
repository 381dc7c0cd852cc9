"""Kernels against real programs: Kconfig, apt, cpio, make. The whole build takes 20 CPU-minutes and is not run here."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from ramet import kernels
from ramet.kernels import KernelKind, debian, own, record

pytestmark = pytest.mark.host

ARCHIVE = Path("/") / own.SOURCE_ARCHIVE
needs_source = pytest.mark.skipif(bool(own.missing_tools()) or not ARCHIVE.exists(), reason=f"needs {own.SOURCE_PACKAGE} and build tools")
needs_apt = pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt-get")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAMET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RAMET_KERNEL", raising=False)
    return tmp_path / "cache"


def listing(archive: Path) -> list[str]:
    return (
        subprocess.run(["cpio", "-tv", "--quiet"], input=archive.read_bytes(), capture_output=True, check=True).stdout.decode().splitlines()
    )


@needs_source
@pytest.mark.timeout(900)
async def test_patches_apply_and_every_line_of_the_fragment_takes_effect(cache: Path, tmp_path: Path) -> None:
    tree = await own.unpack(await own.source(), tmp_path)
    text = await own.configure(tree, own.shipped())
    assert "CONFIG_DAMON_RECLAIM=y" in text
    assert "lapic_timer_hz" in (tree / "arch/x86/kernel/apic/apic.c").read_text()


@needs_source
async def test_a_killed_build_leaves_nothing_that_stays(cache: Path) -> None:
    status = await kernels.start_background_build()
    assert status.state == "running"
    assert (await kernels.start_background_build()).state == "running"
    work = record.work_dir(KernelKind.OWN)
    async with asyncio.timeout(60):
        while not (work / "source").is_dir():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    lock = cache / "kernels" / ".own-lock"
    assert _holding(lock)
    async with asyncio.timeout(60):
        while (await kernels.build_status()).state == "running":  # one that begins just now may not have been seen
            for pid in _holding(lock):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.05)
    assert (await kernels.build_status()).state == "failed"
    assert kernels.clean() == [work]
    assert (await kernels.build_status()).state == "none"
    assert not work.exists()


def _holding(lock: Path) -> list[int]:
    """The processes, except us, that have a file open."""
    found = []
    for fds in Path("/proc").glob("[0-9]*/fd"):
        if int(fds.parent.name) == os.getpid():
            continue
        try:
            if any(fd.readlink() == lock for fd in fds.iterdir()):
                found.append(int(fds.parent.name))
        except OSError:
            continue
    return found


@needs_apt
async def test_debian_kernel_is_fetched_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = await debian.ensure()
    assert kernel.kind == "debian"
    assert kernel.image.read_bytes()[0x202:0x206] == b"HdrS"
    assert kernel.modules is not None
    assert record.module_names(kernel.modules).index("virtio_ring.ko") < record.module_names(kernel.modules).index("virtio.ko")
    monkeypatch.setenv("PATH", "/nonexistent")  # the second time starts no program
    assert await kernels.current() == kernel
    monkeypatch.undo()
    monkeypatch.setenv("RAMET_CACHE", str(cache))
    init = tmp_path / "agent"
    init.write_bytes(b"#!agent")
    lines = listing(kernels.initramfs(kernel, init))
    names = [line.split()[-1] for line in lines]
    assert {"init", "modules/order", "modules/virtio_blk.ko"} <= set(names)
    console = next(line for line in lines if line.endswith("dev/console"))
    assert console.startswith("crw-------")
    assert "5,   1" in console


async def test_floor_initramfs(cache: Path) -> None:
    kernel = kernels.Kernel(kind=KernelKind.OWN, version="", image=Path(), modules=None, digest="x")
    path = await kernels.floor_initramfs(kernel)
    assert await kernels.floor_initramfs(kernel) == path
    assert path.stat().st_size < 16384
    assert "init" in [line.split()[-1] for line in listing(path)]
