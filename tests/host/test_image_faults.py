"""Registries that refuse, lie and fall silent, images that are damaged or hostile, disks that are full: an error that says so, and nothing left."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ramet import images, oci, reference, skopeo, watch
from ramet.errors import HostError, ImageError, NoSpaceError
from ramet.paths import StateDir

from .conftest import Registry
from .fakes import serving
from .imaging import (
    OTHER,
    debugfs,
    disk_of,
    ensure,
    fails,
    root_only,
)
from .layouts import Entry, Layout, directory, file, hardlink, layer, make, symlink, whiteout

pytestmark = pytest.mark.usefixtures("image_programs", "only_images_left")


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
    blob.write_bytes(data.replace(b'"A=1"', b'"A=2"') if which == "config" else data[:-1] + bytes([data[-1] ^ 1]))
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
