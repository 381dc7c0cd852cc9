"""Images from a real registry, from files and from Debian's mirror, with everything that can go wrong on the way."""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import io
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ramet import images, oci, reference, skopeo, tree, watch
from ramet.errors import HostError, ImageError, NoSpaceError, NotFoundError, RametError
from ramet.model import Image, ImageConfig
from ramet.paths import StateDir

from .conftest import Registry, User, need
from .fakes import serving
from .layouts import Entry, Layout, directory, file, hardlink, layer, make, symlink, whiteout

PING = bytes.fromhex("0100000200200000000000000000000000000000")  # cap_net_raw=ep, version 2
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="mounting and device nodes need root")
OTHER = "arm64" if oci.architecture() == "amd64" else "amd64"


@pytest.fixture(autouse=True)
def _needs() -> None:
    need("skopeo", "umoci", "mke2fs", "debugfs", "setpriv")


@pytest.fixture(autouse=True)
def nothing_left(state: StateDir) -> Iterator[None]:
    """After every test, whatever it did: only published images, no lock, no process that works in the state directory."""
    yield
    left = [p.name for p in state.images.iterdir() if not re.fullmatch(r"sha256-[0-9a-f]{64}", p.name)]
    assert left == []
    for place in state.images.iterdir():
        assert sorted(p.name for p in place.iterdir()) == ["disk.raw", "image.json"]
    assert working_in(state.root) == []


def working_in(place: Path) -> list[int]:
    """Processes, other than us, whose directory or arguments lead into a place."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            names = [os.readlink(entry / "cwd"), (entry / "cmdline").read_text(errors="replace")]
        except OSError:
            continue
        if int(entry.name) != os.getpid() and any(str(place) in name for name in names):
            found.append(int(entry.name))
    return found


def silent(_: str, __: float | None) -> None: ...


def ensure(state: StateDir, name: str) -> Image:
    return asyncio.run(asyncio.wait_for(images.ensure(state, name, progress=silent), 120))


def debugfs(disk: Path, request: str) -> str:
    return subprocess.run(
        ["debugfs", "-R", request, str(disk)], capture_output=True, text=True, timeout=60, env={"PATH": os.environ["PATH"] + ":/sbin"}
    ).stdout


def listing(disk: Path, place: str = "/") -> dict[str, tuple[str, int, int, int]]:
    """name -> octal mode with type, uid, gid, size of a directory on a disk."""
    rows = [line.split("/") for line in debugfs(disk, f"ls -p {place}").splitlines() if line.startswith("/")]
    return {row[5]: (row[2], int(row[3]), int(row[4]), int(row[6] or 0)) for row in rows}


def cat(disk: Path, place: str) -> str:
    return debugfs(disk, f"cat {place}")


def disk_of(state: StateDir, image: Image) -> Path:
    disk = state.image(image.digest).disk
    assert subprocess.run(["e2fsck", "-fn", str(disk)], capture_output=True, timeout=60).returncode == 0
    return disk


RICH = (
    layer(
        directory("bin"),
        file("bin/ping", b"x" * 5000, mode=0o755, xattrs={"security.capability": PING, "user.note": b"a\xff\x00z"}),
        file("bin/su", b"su", mode=0o4755),
        hardlink("bin/su2", "bin/su"),
        file("bin/wall", mode=0o2755, gid=5),
        directory("home/app", 0o700, 1000, 1001),
        file("home/app/secret", b"s", mode=0o600, uid=1000, gid=1001),
        file("home/app/nobody", uid=65534, gid=65534),
        directory("tmp", 0o1777),
        symlink("sh", "/bin/busybox"),
        Entry(name="pipe", kind=tarfile.FIFOTYPE, mode=0o640),
        directory("opaque"),
        file("opaque/old"),
        file("gone"),
        file("kept", b"1"),
    ),
    layer(whiteout("gone"), file("opaque/.wh..wh..opq", b""), file("opaque/new"), file("kept", b"2")),
)
SETTINGS = {"Env": ["A=1"], "User": "app", "WorkingDir": "/srv", "Entrypoint": ["/bin/app"], "Cmd": ["-x"]}


@pytest.fixture
def rich(tmp_path: Path) -> Layout:
    return make(tmp_path / "rich", *RICH, config=SETTINGS)


def check_rich(disk: Path) -> None:
    top, programs, home = listing(disk), listing(disk, "/bin"), listing(disk, "/home/app")
    assert "gone" not in top
    assert set(listing(disk, "/opaque")) - {".", ".."} == {"new"}
    assert cat(disk, "/kept") == "2"
    assert (top["tmp"][0], top["pipe"][0], top["sh"][0]) == ("041777", "010640", "120777")
    assert (programs["su"][0], programs["wall"][:3]) == ("104755", ("102755", 0, 5))
    assert home["."][:3] == ("040700", 1000, 1001)
    assert home["secret"][:3] == ("100600", 1000, 1001)
    assert home["nobody"][1:3] == (65534, 65534)
    links = re.findall(r"Inode: (\d+).*?Links: (\d+)", debugfs(disk, "stat /bin/su") + debugfs(disk, "stat /bin/su2"), re.DOTALL)
    assert links[0] == links[1]
    assert links[0][1] == "2"
    xattrs = debugfs(disk, "ea_list /bin/ping")
    assert f"security.capability (20) = {PING.hex(' ')}" in xattrs
    assert "user.note (4) = 61 ff 00 7a" in xattrs


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
    assert [step for step, _ in dict.fromkeys((s, None) for s, _ in steps)] == [
        "looking up the image",
        "unpacking the image",
        "writing the disk",
    ]
    assert all(part is None or 0 <= part <= 1 for _, part in steps)


@root_only
def test_device_nodes(state: StateDir, tmp_path: Path) -> None:
    nodes = [
        Entry(name="dev/null", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666),
        Entry(name="srv/disk", kind=tarfile.BLKTYPE, device=(8, 17), mode=0o660, gid=6),
    ]
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
    monkeypatch.setattr(
        "tests.host.layouts.gzip.compress",
        lambda data, *_, **__: subprocess.run(["zstd", "-c"], input=data, capture_output=True, check=True).stdout,
    )
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


SCRIPT = """
import asyncio, sys
from pathlib import Path
from ramet import images
from ramet.errors import RametError
from ramet.paths import StateDir
def progress(step, part):
    print("step", step, part, flush=True)
    if len(sys.argv) > 3 and step == sys.argv[3]:
        sys.stdin.read()
try:
    print(asyncio.run(images.ensure(StateDir(root=Path(sys.argv[1])), sys.argv[2], progress=progress)).digest, flush=True)
except RametError as error:
    print(type(error).__name__, error.message, error.hint, flush=True)
"""


def start(state: StateDir, name: str, *stop: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(state.root), name, *stop], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_two_processes_do_the_work_once(state: StateDir, rich: Layout) -> None:
    with serving(rich) as fake:
        outputs = [process.communicate(timeout=60)[0] for process in [start(state, fake.reference) for _ in range(3)]]
        assert {output.splitlines()[-1] for output in outputs} == {rich.manifest}
        assert [fake.asked[digest] for digest in rich.layers] == [1, 1]


def children(pid: int) -> list[int]:
    found = [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    return found + [grandchild for child in found for grandchild in children(child)]


def kill_with_children(process: subprocess.Popen[str]) -> int:
    """kill -9, then wait for its children to be gone as well; returns how many there were."""
    fds = [os.pidfd_open(pid) for pid in children(process.pid)]
    process.kill()
    process.communicate(timeout=60)
    for fd in fds:
        assert select.select([fd], [], [], 60)[0], "a child outlives its parent"
        os.close(fd)
    return len(fds)


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
        while not process.stdout.readline().startswith("step fetching"):
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

        def progress(now: str, _: float | None) -> None:
            if now == step:
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


def fails(state: StateDir, name: str, kind: type[RametError] = ImageError) -> RametError:
    """The error that making an image must end with; nothing is left of it."""
    with pytest.raises(kind) as caught:
        ensure(state, name)
    assert type(caught.value) is kind
    assert name in caught.value.message
    assert list(state.images.iterdir()) == []
    return caught.value


def test_unknown_names(state: StateDir, registry: Registry, rich: Layout) -> None:
    registry.push(rich, "acme/rich:1")
    assert "no such tag" in fails(state, f"{registry.address}/acme/rich:2").message
    assert "no such tag" in fails(state, f"{registry.address}/acme/rich@sha256:{'0' * 64}").message
    error = fails(state, f"{registry.address}/acme/poor:1")
    assert "no such" in error.message
    assert error.hint


def test_login(state: StateDir, registries: Callable[..., Registry], rich: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    registry = registries(credentials="ann:secret")
    name = registry.push(rich, "acme/rich:1")
    error = fails(state, name)
    assert "login" in error.message
    assert f"skopeo login {registry.address}" in error.hint
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "wrong"))
    dataclasses.replace(registry, credentials="ann:guess").login(tmp_path / "wrong")
    error = fails(state, name)
    assert "login" in error.message
    assert "guess" not in repr(error.wire())
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "right"))
    auth = registry.login(tmp_path / "right")
    assert ensure(state, name).digest == rich.manifest
    asyncio.run(images.remove_image(state, rich.manifest))
    monkeypatch.delenv("DOCKER_CONFIG")
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(auth))
    assert ensure(state, name).digest == rich.manifest


def test_a_registry_that_is_down(state: StateDir) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        error = fails(state, f"127.0.0.1:{taken.getsockname()[1]}/x:1")
        assert "cannot be reached" in error.message


def test_a_registry_that_never_answers(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skopeo, "INSPECT_DEADLINE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        assert "did not answer" in fails(state, f"127.0.0.1:{deaf.getsockname()[1]}/x:1").message


def test_a_registry_that_falls_silent(state: StateDir, rich: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skopeo, "STALL", 1.0)
    monkeypatch.setattr(watch, "PERIOD", 0.1)
    with serving(rich) as fake:
        fake.hang.add(rich.layers[0])
        assert "sent nothing" in fails(state, fake.reference).message


def test_tls(state: StateDir, registries: Callable[..., Registry], rich: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, secure = registries(), registries(tls=True)
    names = plain.push(rich, "x:1"), secure.push(rich, "x:1")
    monkeypatch.setattr(reference.Registry, "loopback", False)
    assert "no TLS" in fails(state, names[0]).message
    assert "certificate" in fails(state, names[1]).message
    monkeypatch.undo()
    assert ensure(state, names[1]).digest == rich.manifest


def test_a_blob_that_ends_early(state: StateDir, rich: Layout) -> None:
    with serving(rich) as fake:
        fake.cut.add(rich.layers[0])
        assert "truncated" in fails(state, fake.reference).message
        fake.cut.clear()
        ensure(state, fake.reference)


def test_damaged_blobs_in_a_registry(state: StateDir, registry: Registry, tmp_path: Path) -> None:
    for number, damage in enumerate((lambda data: data[:-20], lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:])):
        layout = make(tmp_path / f"l{number}", layer(file("a", os.urandom(100_000))))
        name = registry.push(layout, f"damaged:{number}")
        blob = registry.blob(layout.layers[0])
        blob.write_bytes(damage(blob.read_bytes()))
        error = fails(state, name)
        assert "digest mismatch" in error.message or "truncated" in error.message
    layout = make(tmp_path / "lost", layer(file("a", os.urandom(100_000))))
    name = registry.push(layout, "damaged:lost")
    registry.blob(layout.layers[0]).unlink()
    assert "lost one of its blobs" in fails(state, name).message


def test_a_registry_that_lies_about_a_manifest(state: StateDir, rich: Layout, tmp_path: Path) -> None:
    other = make(tmp_path / "rich", layer(file("evil")))  # its blobs beside the others
    with serving(rich) as fake:
        fake.false[rich.manifest] = other.blob(other.manifest).read_bytes()
        assert "digest mismatch" in fails(state, f"{fake.address}/x@{rich.manifest}").message


@pytest.mark.parametrize("which", ["layers", "config", "manifest"])
def test_damaged_local_layouts(state: StateDir, rich: Layout, which: str) -> None:
    digest = rich.layers[0] if which == "layers" else getattr(rich, which)
    blob = rich.blob(digest)
    data = blob.read_bytes()
    blob.write_bytes(data.replace(b'"A=1"', b'"A=2"') if which == "config" else data[:-1] + b"\x00")
    error = fails(state, rich.reference)
    assert "digest mismatch" in error.message or "not valid" in error.message or "not JSON" in error.message
    blob.unlink()
    fails(state, rich.reference)


def test_local_layouts_that_are_not_there(state: StateDir, rich: Layout, tmp_path: Path) -> None:
    assert "does not exist" in fails(state, f"oci:{tmp_path}/none").message
    assert "no image of that tag" in fails(state, f"oci:{rich.path}:other").message
    (tmp_path / "text").write_text("no archive")
    assert "cannot be read" in fails(state, f"docker-archive:{tmp_path}/text").message
    assert "cannot be read" in fails(state, f"oci:{tmp_path}/text").message


@pytest.mark.parametrize("index", [True, False])
def test_another_architecture(state: StateDir, registry: Registry, tmp_path: Path, index: bool) -> None:
    layout = make(tmp_path / "other", layer(file("a")), architecture=OTHER, index=index)
    for name in (registry.push(layout, "other:1"), layout.reference):
        assert f"linux/{OTHER}" in fails(state, name).message


def test_our_own_check_catches_what_skopeo_might_not(state: StateDir, rich: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    pull = skopeo.oci.manifest

    def damage(layout: Path, what: str) -> Any:
        found = pull(layout, what)
        oci.blob(layout, found[1].layers[1]).write_bytes(b"\0" * found[1].layers[1].size)
        return found

    monkeypatch.setattr(skopeo.oci, "manifest", damage)
    assert "digest mismatch: the blob" in fails(state, rich.reference).message


EVIL: dict[str, tuple[bytes, ...]] = {
    "absolute link": (layer(symlink("etc", "OUTSIDE")), layer(file("etc/pwned"))),
    "relative link": (layer(symlink("etc", "../../../../../../../../../../OUTSIDE")), layer(file("etc/pwned"))),
    "link in one layer": (layer(symlink("etc", "OUTSIDE"), file("etc/pwned")),),
    "dotdot name": (layer(file("../../../../../../../../../../OUTSIDE/pwned"), file("../../pwned"), file("../pwned")),),
    "absolute name": (layer(file("OUTSIDE/pwned")),),
    "hard link to absolute": (layer(hardlink("h", "OUTSIDE/victim"), file("h", b"pwned")),),
    "hard link through link": (layer(symlink("l", "OUTSIDE")), layer(hardlink("h", "l/victim"))),
    "hard link to link": (layer(symlink("l", "OUTSIDE/victim")), layer(hardlink("h", "l"), file("h", b"pwned"))),
    "whiteout through link": (layer(symlink("l", "OUTSIDE")), layer(whiteout("l/victim"))),
    "opaque through link": (layer(symlink("l", "OUTSIDE")), layer(file("l/.wh..wh..opq", b""))),
    "whiteout of dotdot": (layer(file(".wh...", b"")),),
    "whiteout of dotdot below": (layer(directory("a"), file("a/.wh...", b""), file("x")),),
    "whiteout of dotdot twice": (layer(file(".wh...", b""), file("x"), file(".wh...", b""), file("x")),),
    "whiteout of dot": (layer(directory("a"), file(".wh..", b""), file("x")),),
    "root is a link": (layer(symlink(".", "OUTSIDE"), file("pwned")),),
    "root is a link by slash": (layer(symlink("/", "OUTSIDE"), file("pwned")),),
    "directory over link": (layer(symlink("d", "OUTSIDE")), layer(directory("d", 0o777), file("d/pwned"))),
    "mode through link": (
        layer(symlink("d", "OUTSIDE/victim")),
        layer(Entry(name="d", kind=tarfile.SYMTYPE, link="OUTSIDE/victim", mode=0o4777, uid=7)),
    ),
    "device through link": (layer(symlink("d", "OUTSIDE")), layer(Entry(name="d/pwned", kind=tarfile.FIFOTYPE))),
}


@pytest.mark.parametrize("which", EVIL)
def test_layers_cannot_leave_the_tree(state: StateDir, tmp_path: Path, which: str) -> None:
    outside = Path(tempfile.mkdtemp(prefix="out"))  # /tmp/outXXXXXXXX: as long as OUTSIDE is made below
    try:
        (outside / "victim").write_text("alive")
        before = sorted((p.name, p.lstat().st_mode, p.lstat().st_uid, p.lstat().st_nlink) for p in [*outside.iterdir(), outside])
        layers = [_aimed(data, outside) for data in EVIL[which]]
        others = set(tmp_path.iterdir()), set(state.root.iterdir())
        try:
            image = ensure(state, make(tmp_path / "evil", *layers).reference)
        except ImageError as error:
            assert "layer" in error.message
        else:
            assert "alive" not in debugfs(disk_of(state, image), "cat h")
        assert (outside / "victim").read_text() == "alive"
        assert sorted((p.name, p.lstat().st_mode, p.lstat().st_uid, p.lstat().st_nlink) for p in [*outside.iterdir(), outside]) == before
        assert (set(tmp_path.iterdir()) - {tmp_path / "evil"}, set(state.root.iterdir())) == others
        assert not list(state.images.glob("**/pwned"))
    finally:
        shutil.rmtree(outside)


def _aimed(data: bytes, outside: Path) -> bytes:
    """A layer whose OUTSIDE is a real directory of this host."""
    entries = []
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for info in archive:
            content = archive.extractfile(info).read() if info.isreg() else b""  # type: ignore[union-attr]
            name, link = (text.replace("/OUTSIDE", "OUTSIDE").replace("OUTSIDE", str(outside)) for text in (info.name, info.linkname))
            entries.append(Entry(name=name, kind=info.type, data=content, mode=info.mode, uid=info.uid, link=link))
    return layer(*entries)


@pytest.fixture
def tiny(state: StateDir) -> Iterator[Callable[[int], None]]:
    """Puts the images on a file system of so many KiB."""
    mounted = []

    def mount(kib: int) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", state.images], check=True)
        mounted.append(state.images)

    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)


@root_only
@pytest.mark.parametrize("where", ["before fetching", "fetching", "unpacking", "writing"])
def test_a_full_disk(state: StateDir, tiny: Callable[[int], None], tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, airy = os.urandom(6 << 20), b"0123456789abcdef" * (6 << 16)
    layout = make(tmp_path / "big", layer(file("a", dense if "fetching" in where else airy)))
    if where == "fetching":
        monkeypatch.setattr(skopeo, "_space", lambda *_: None)
    tiny({"before fetching": 8 << 10, "fetching": 4 << 10, "unpacking": 4 << 10, "writing": 9 << 10}[where])
    error = fails(state, layout.reference, NoSpaceError)
    assert error.hint
    assert ("needs at least" in error.message) == (where == "before fetching")
    subprocess.run(["mount", "-o", "remount,size=64m", state.images], check=True)
    ensure(state, layout.reference)
    shutil.rmtree(state.images / next(state.images.iterdir()).name)


def test_a_damaged_cache_entry_is_made_again(state: StateDir, rich: Layout) -> None:
    image = ensure(state, rich.reference)
    state.image(image.digest).record.write_text("{}")
    assert images.list_images(state) == []
    assert ensure(state, rich.reference).digest == image.digest
    assert len(images.list_images(state)) == 1
    asyncio.run(images.remove_image(state, rich.reference))


def test_too_small_an_estimate_is_corrected(state: StateDir, rich: Layout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    big = make(tmp_path / "big", layer(file("a", os.urandom(200 << 20))))
    monkeypatch.setattr(tree, "sum_up", lambda _: tree.Usage(data=1, inodes=1))
    image = ensure(state, big.reference)
    assert image.disk_size == 256 << 20
    assert listing(disk_of(state, image))["a"][3] == 200 << 20


def test_missing_programs(state: StateDir, rich: Layout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = images.userns.process.find
    for program, package in (("umoci", "umoci"), ("mke2fs", "e2fsprogs"), ("skopeo", "skopeo")):
        monkeypatch.setattr(images.userns.process, "find", lambda name, lost=program: None if name == lost else found(name))
        with pytest.raises(HostError) as caught:
            ensure(state, rich.reference)
        assert program in caught.value.message
        assert f"apt-get install {package}" in caught.value.hint
    monkeypatch.setattr(images.userns.process, "find", lambda name: None if name == "mmdebstrap" else found(name))
    with pytest.raises(HostError, match="mmdebstrap"):
        ensure(state, "debian:sid")
    assert list(state.images.iterdir()) == []


# Without root


def last(result: subprocess.CompletedProcess[str]) -> str:
    assert result.stdout, result.stderr
    return result.stdout.splitlines()[-1]


def test_without_root(user: User, rich: Layout) -> None:
    state = StateDir(root=user.home / "state")
    shutil.copytree(rich.path, user.home / "rich")
    with_devices = make(user.home / "devices", layer(Entry(name="srv/disk", kind=tarfile.BLKTYPE, device=(8, 17), mode=0o660, gid=6)))
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
        await asyncio.wait_for(task, 120)
    assert list(state.images.iterdir()) == []
    assert str(state.root) not in Path("/proc/self/mounts").read_text()


@root_only
def test_debian_on_a_full_disk(state: StateDir, tiny: Callable[[int], None]) -> None:
    need("mmdebstrap")
    tiny(60 << 10)
    fails(state, "debian:bookworm", NoSpaceError)
