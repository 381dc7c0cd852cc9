"""Small OCI images made by hand: every field of every tar member is the test's to choose, also the ones that no honest tool would write."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tar member. kind: one of tarfile's type letters."""

    name: str
    kind: bytes = tarfile.REGTYPE
    data: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    link: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] = field(default_factory=dict)


def directory(name: str, mode: int = 0o755, uid: int = 0, gid: int = 0) -> Entry:
    return Entry(name=name, kind=tarfile.DIRTYPE, mode=mode, uid=uid, gid=gid)


def file(name: str, data: bytes = b"x\n", **options: Any) -> Entry:
    return Entry(name=name, data=data, **options)


def symlink(name: str, target: str) -> Entry:
    return Entry(name=name, kind=tarfile.SYMTYPE, link=target, mode=0o777)


def hardlink(name: str, target: str) -> Entry:
    return Entry(name=name, kind=tarfile.LNKTYPE, link=target)


def whiteout(name: str) -> Entry:
    parent, _, last = name.rpartition("/")
    return file(f"{parent}/.wh.{last}" if parent else f".wh.{last}", b"")


def layer(*entries: Entry) -> bytes:
    """An uncompressed layer."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.type, info.mode, info.uid, info.gid, info.linkname = entry.kind, entry.mode, entry.uid, entry.gid, entry.link
            info.devmajor, info.devminor = entry.device
            info.size, info.mtime = len(entry.data), 1_700_000_000
            # pax headers are text; the kernel's xattrs are bytes: tarfile encodes with surrogateescape, which brings them through
            info.pax_headers = {f"SCHILY.xattr.{k}": v.decode("utf-8", "surrogateescape") for k, v in entry.xattrs.items()}
            archive.addfile(info, io.BytesIO(entry.data))
    return out.getvalue()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """An OCI layout on disk, with what a test may want to break in it."""

    path: Path
    manifest: str
    config: str
    layers: tuple[str, ...]

    @property
    def reference(self) -> str:
        return f"oci:{self.path}:latest"

    def blob(self, digest: str) -> Path:
        return self.path / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def at(self, path: Path) -> Layout:
        return dataclasses.replace(self, path=path)


def _put(root: Path, data: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    blobs = root / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    (blobs / digest).write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


def make(root: Path, *layers: bytes, config: dict[str, Any] | None = None, architecture: str = "amd64", index: bool = False) -> Layout:
    """Write a layout with one image. index: put an image index (as multi-architecture images have) between index.json and the manifest."""
    blobs = [_put(root, gzip.compress(data, 1, mtime=0)) | {"mediaType": LAYER} for data in layers]
    diff_ids = [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in layers]
    body = {"architecture": architecture, "os": "linux", "config": config or {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    conf = _put(root, json.dumps(body).encode()) | {"mediaType": CONFIG}
    manifest = _put(root, json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": conf, "layers": blobs}).encode()) | {
        "mediaType": MANIFEST
    }
    top = manifest
    if index:
        platform = {"platform": {"architecture": architecture, "os": "linux"}}
        top = _put(root, json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [manifest | platform]}).encode()) | {
            "mediaType": INDEX
        }
    top = top | {"annotations": {"org.opencontainers.image.ref.name": "latest"}}
    (root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    (root / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return Layout(path=root, manifest=manifest["digest"], config=conf["digest"], layers=tuple(b["digest"] for b in blobs))
