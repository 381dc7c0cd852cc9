"""Images without root, and the default image, from Debian's mirror."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ramet import images
from ramet.errors import NoSpaceError
from ramet.model import Image
from ramet.paths import StateDir

from .conftest import User, need
from .imaging import (
    DISK_NODE,
    SCRIPT,
    cat,
    check_rich,
    disk_of,
    ensure,
    fails,
    kill_with_children,
    last,
    listing,
    root_only,
    silent,
    start,
)
from .layouts import Layout, layer, make

pytestmark = pytest.mark.usefixtures("image_programs", "only_images_left")


# Without root


def test_without_root(user: User, rich: Layout) -> None:
    state = StateDir(root=user.home / "state")
    shutil.copytree(rich.path, user.home / "rich")
    with_devices = make(user.home / "devices", layer(DISK_NODE))
    assert last(user.python(SCRIPT, str(state.root), f"oci:{user.home}/rich:latest")) == rich.manifest
    place = state.image(rich.manifest)
    assert place.disk.stat().st_uid == user.uid
    check_rich(disk_of(state, images.list_images(state)[0]))
    result = user.python(SCRIPT, str(state.root), with_devices.reference)
    assert "srv/disk became an empty file" in result.stderr
    assert sorted(p.name for p in state.images.iterdir()) == sorted(d.replace(":", "-") for d in (rich.manifest, with_devices.manifest))


def test_without_root_the_leavings_of_a_dead_maker_are_removed(user: User, rich: Layout) -> None:
    state = StateDir(root=user.home / "state")
    shutil.copytree(rich.path, user.home / "rich")
    kill = SCRIPT.replace("sys.stdin.read()", "__import__('os').kill(__import__('os').getpid(), 9)")
    result = user.python(kill, str(state.root), f"oci:{user.home}/rich:latest", "writing the disk")
    assert result.returncode == -signal.SIGKILL
    (work,) = state.images.glob(".work-*")
    owners = {p.lstat().st_uid for p in work.rglob("*")}
    assert len(owners) > 2  # subordinate ids: the user alone could not remove these
    assert last(user.python(SCRIPT, str(state.root), f"oci:{user.home}/rich:latest")) == rich.manifest
    assert [p.name for p in state.images.iterdir()] == [rich.manifest.replace(":", "-")]


def test_without_root_and_subordinate_ids(user: User, rich: Layout) -> None:
    ids = [line.split(":")[1:] for line in Path("/etc/subuid").read_text().splitlines() if line.startswith(f"{user.name}:")]
    first, count = map(int, ids[0])
    span = f"{first}-{first + count - 1}"
    subprocess.run(["usermod", "--del-subuids", span, "--del-subgids", span, user.name], check=True, timeout=60)
    shutil.copytree(rich.path, user.home / "rich")
    said = last(user.python(SCRIPT, str(user.home / "state"), f"oci:{user.home}/rich:latest"))
    assert said.startswith("HostError")
    assert f"usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user.name}" in said
    assert list((user.home / "state/images").iterdir()) == []


# Debian, from the mirror


def check_debian(state: StateDir, image: Image) -> None:
    disk = disk_of(state, image)
    assert "VERSION_CODENAME=bookworm" in cat(disk, "/usr/lib/os-release")
    assert listing(disk, "/usr/bin")["su"][:3] == ("104755", 0, 0)
    assert listing(disk, "/usr/sbin")["unix_chkpwd"][:3] == ("102755", 0, 42)
    assert listing(disk, "/etc")["shadow"][:3] == ("100640", 0, 42)
    assert {"curl", "ps"} <= set(listing(disk, "/usr/bin"))
    assert "ca-certificates.crt" in listing(disk, "/etc/ssl/certs")
    etc = listing(disk, "/etc")
    assert etc["machine-id"][3] == 0
    assert not {"hostname", "resolv.conf"} & set(etc)
    assert not any(name.endswith("_Packages") for name in listing(disk, "/var/lib/apt/lists"))
    assert image.config.env["PATH"]
    assert image.config.service == ()
    assert image.disk_used < 300 << 20
    assert image.disk_size <= 512 << 20


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[StateDir]:
    """A state directory whose images are kept from run to run where RAMET_TEST_CACHE says so: the default image takes half a minute."""
    kept = os.environ.get("RAMET_TEST_CACHE")
    root = Path(kept) / "images" if kept else tmp_path / "shared"
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield StateDir(root=root)


@pytest.mark.timeout(900)
def test_the_default_image(shared: StateDir) -> None:
    need("mmdebstrap")
    image = asyncio.run(asyncio.wait_for(images.ensure(shared, "debian:bookworm", progress=silent), 800))
    check_debian(shared, image)
    assert ensure(shared, "debian:12").digest == image.digest
    assert ensure(shared, "debian").disk_used == image.disk_used


@pytest.mark.timeout(900)
def test_the_default_image_without_root(user: User) -> None:
    need("mmdebstrap")
    state = StateDir(root=user.home / "state")
    digest = last(user.python(SCRIPT, str(state.root), "debian:bookworm", timeout=800))
    (image,) = images.list_images(state)
    assert image.digest == digest
    check_debian(state, image)
    assert [p.name for p in state.images.iterdir()] == [digest.replace(":", "-")]


def test_debian_from_a_mirror_that_is_none(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    need("mmdebstrap")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAMET_DEBIAN_MIRROR", f"http://127.0.0.1:{taken.getsockname()[1]}/debian")
        assert "cannot be reached" in fails(state, "debian:bookworm").message


async def test_debian_cancelled(state: StateDir) -> None:
    need("mmdebstrap")

    def progress(_: str, part: float | None) -> None:
        if part and part > 0.05:
            task.cancel()

    task = asyncio.create_task(images.ensure(state, "debian:bookworm", progress=progress))
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 280)
    assert list(state.images.iterdir()) == []
    assert str(state.root) not in Path("/proc/self/mounts").read_text()


def test_debian_killed(state: StateDir, rich: Layout) -> None:
    need("mmdebstrap")
    process = start(state, "debian:bookworm")
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("step installing") or float(line.split()[-1]) <= 0.05:
        assert process.poll() is None
    assert kill_with_children(process) >= 3  # with all that runs in the namespace
    assert list(state.images.glob(".work-*/jail/tree/bin"))
    ensure(state, rich.reference)
    assert str(state.root) not in Path("/proc/self/mounts").read_text()


@root_only
def test_debian_on_a_full_disk(state: StateDir, tiny: Callable[[int], None]) -> None:
    need("mmdebstrap")
    tiny(60 << 10)
    fails(state, "debian:bookworm", NoSpaceError)
