"""A snapshot as an OCI artifact: its manifest and its config. Pure. What is read came from strangers.

manifest    artifactType application/vnd.ramet.snapshot.v1
config      an image's config, so that tools for images copy it too; ours is below `dev.ramet`
layers      for each layer of the store its tables; its blobs as they are; QEMU's device state; which chunks a start touches
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field

from ramet import oci, tables
from ramet import spec as specs
from ramet.errors import ImageError
from ramet.model import Compatibility, ImageConfig, Snapshot, SnapshotState, Spec
from ramet.oci import Digest
from ramet.records import dump
from ramet.reference import OCI_MANIFEST, sha256
from ramet.store.layer import CHUNK, Kind
from ramet.tables import SELF, Strict, Tables, canonical

FORMAT = 1
MANIFEST = OCI_MANIFEST
ARTIFACT = "application/vnd.ramet.snapshot.v1"
CONFIG = "application/vnd.oci.image.config.v1+json"
TABLES = "application/vnd.ramet.layer.v1.tar+zstd"
BLOB = "application/vnd.ramet.blob.v1+zstd"
STATE = "application/vnd.ramet.state.v1+zstd"
TRACE = "application/vnd.ramet.trace.v1+zstd"
OURS = "dev.ramet"  # the key of the config

DOCUMENT_LIMIT = 8 << 20  # bytes of a config
STATE_LIMIT = 256 << 20  # bytes of a device state, packed or not: 250 KB for one cpu
TRACE_LIMIT = 64 << 20
_MOST = 1 << 62  # of numbers that a database keeps
_LIMITS = {TABLES: tables.LIMIT, STATE: STATE_LIMIT, TRACE: TRACE_LIMIT, BLOB: 1 << 60}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A blob of an artifact. kind: its media type; digest: `sha256:…`; size: bytes."""

    kind: str
    digest: str
    size: int

    @classmethod
    def of(cls, kind: str, data: bytes) -> Part:
        return cls(kind=kind, digest=sha256(data), size=len(data))

    def descriptor(self) -> dict[str, Any]:
        return {"mediaType": self.kind, "digest": self.digest, "size": self.size}


class _Image(Strict):
    """What the guest's image asks for, and what it was made from; where that is on this host with the same content, it is the same image."""

    digest: Digest
    reference: str
    config: ImageConfig
    disk_size: int = Field(ge=0, lt=_MOST)


class _Point(Strict):
    """What of a snapshot's record is true on any host. Layers by the digests of their tables."""

    machine: str
    created_at: float = Field(ge=0, lt=1e11)
    memory: bool
    spec: Spec
    saved: int = Field(ge=0, lt=_MOST)
    slimmed: int = Field(ge=0, lt=_MOST)
    pause: float | None = Field(ge=0, lt=1e9)
    compatibility: Compatibility | None
    memory_limit: int = Field(ge=0, lt=_MOST)
    disk_layers: list[Digest] = Field(min_length=1)
    memory_layer: str


class _Ours(Strict):
    format: int
    snapshot: _Point
    image: _Image


class _Config(BaseModel):
    ours: _Ours = Field(alias=OURS)


class _Descriptor(BaseModel):
    mediaType: str  # noqa: N815
    digest: Digest
    size: int = Field(ge=0)

    def part(self) -> Part:
        return Part(kind=self.mediaType, digest=self.digest, size=self.size)


class _Manifest(BaseModel):
    artifactType: str = ""  # noqa: N815
    config: _Descriptor
    layers: list[_Descriptor]


@dataclass(frozen=True, kw_only=True)
class ImageOrigin:
    """The image below a snapshot. digest, reference: of what it was made from; disk_size: bytes."""

    digest: str
    reference: str
    config: ImageConfig
    disk_size: int


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """What a manifest and its config say. parts: in the manifest's order, without the config."""

    config: Part
    parts: tuple[Part, ...]

    def of(self, kind: str) -> list[Part]:
        """The parts of a media type."""
        return [part for part in self.parts if part.kind == kind]

    @property
    def size(self) -> int:
        """Bytes of all parts and the config."""
        return self.config.size + sum({part.digest: part.size for part in self.parts}.values())

    def manifest(self) -> bytes:
        value = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": ARTIFACT,
            "config": self.config.descriptor(),
            "layers": [part.descriptor() for part in self.parts],
        }
        return canonical(value)


def config(found: Snapshot, image: ImageOrigin, disk_layers: Iterable[str], memory_layer: str, parts: Iterable[Part]) -> bytes:
    """The config of a snapshot's artifact. Layers by the digests of their tables."""
    wanted = image.config
    value = {
        "architecture": oci.architecture(),
        "os": "linux",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(found.created_at)),
        "config": {
            "Env": [f"{key}={text}" for key, text in sorted(wanted.env.items())],
            "User": wanted.user,
            "WorkingDir": wanted.workdir,
            "Entrypoint": list(wanted.entrypoint),
            "Cmd": list(wanted.cmd),
            "Labels": {"dev.ramet.machine": found.machine, "dev.ramet.memory": str(found.memory).lower()},
        },
        # Not what the specification means by it, which is about archives of files: tools want as many as there are layers.
        "rootfs": {"type": "layers", "diff_ids": [part.digest for part in parts]},
        OURS: {
            "format": FORMAT,
            "image": dump(image),
            "snapshot": {name: dump(getattr(found, name)) for name in _Point.model_fields}
            | {"disk_layers": list(disk_layers), "memory_layer": memory_layer},
        },
    }
    return canonical(value)


def read_manifest(data: bytes, what: str) -> Artifact:
    """ImageError, which begins with `what`, when it is no snapshot's."""
    with contextlib.suppress(ValueError, RecursionError):  # what is no JSON is said to be so below
        head = json.loads(data)
        if not isinstance(head, dict) or head.get("artifactType") != ARTIFACT:
            raise ImageError(
                f"{what}: not a snapshot but an image, or something else",
                hint="`ramet convert` makes an image one; `ramet create --image` boots an image.",
            )
    found = oci.read(_Manifest, data, f"{what}: manifest")
    made = Artifact(config=found.config.part(), parts=tuple(each.part() for each in found.layers))
    sizes: dict[str, int] = {}
    for part in made.parts:
        if sizes.setdefault(part.digest, part.size) != part.size:
            raise ImageError(f"{what}: manifest: {part.digest} has two sizes")
        if part.size > (limit := _LIMITS.get(part.kind, 0)):
            raise ImageError(f"{what}: manifest: {part.digest}, {part.kind[:80]!r} of {part.size} bytes: at most {limit} are understood")
    return made


def read_config(data: bytes, what: str) -> tuple[Snapshot, ImageOrigin]:
    """The snapshot as it will be called (its layers by the digests of their tables), and its image. ImageError, SpecError."""
    with contextlib.suppress(ValueError, AttributeError, TypeError, KeyError, RecursionError):
        if (number := json.loads(data)[OURS]["format"]) > FORMAT:
            raise ImageError(f"{what}: format {number} was made by a newer Ramet", hint="Upgrade Ramet on this host.")
    ours = oci.read(_Config, data, f"{what}: config").ours
    point, image = ours.snapshot, ours.image
    specs.check(point.spec)
    found = Snapshot(
        id="",
        name="",
        state=SnapshotState.READY,
        **{name: getattr(point, name) for name in _Point.model_fields if name != "disk_layers"},
        disk_layer=point.disk_layers[0],
        drive_layers=tuple(point.disk_layers[1:]),
    )
    if len(point.disk_layers) != 1 + len(point.spec.drives):
        raise ImageError(f"{what}: config: {len(point.disk_layers)} disks, where the spec has {1 + len(point.spec.drives)}")
    if point.memory_limit > point.spec.memory:
        raise ImageError(f"{what}: config: a memory of {point.spec.memory} bytes is limited to more")
    if not point.memory == bool(point.memory_layer) == bool(point.compatibility):
        raise ImageError(f"{what}: config: it is not said whether it has memory")
    origin = ImageOrigin(digest=image.digest, reference=image.reference, config=image.config, disk_size=image.disk_size)
    return found, origin


def agree(found: Snapshot, layers: Mapping[str, Tables], sizes: Mapping[str, int]) -> None:
    """ImageError unless the layers, by their names and in the manifest's order, can be what the snapshot stands on. sizes: of the blobs that are sent."""
    known: dict[str, Tables] = {}
    for name, each in layers.items():
        what = f"layer {name[:19]}"
        if problem := tables.fits(each, sizes):
            raise ImageError(f"{what}: {problem}")
        if missing := each.others - set(known):
            raise ImageError(f"{what}: it refers to layer {min(missing)[:19]}, which is not sent before it")
        for other in {*each.chain, *each.beneath} - {SELF}:
            if (known[other].kind, known[other].size, known[other].base) != (each.kind, each.size, each.base):
                raise ImageError(f"{what}: it cannot stand on layer {other[:19]}: they are not of one kind, size and base")
        if each.base and (known[each.base].kind is not Kind.DISK or known[each.base].others):
            raise ImageError(f"{what}: its base is no disk of one layer")
        known[name] = each
    wanted = [(name, Kind.DISK, size) for name, size in zip(found.disk_layers, disk_sizes(found), strict=True)]
    wanted += [(found.memory_layer, Kind.MEMORY, found.spec.memory)] if found.memory else []
    for name, kind, size in wanted:
        if name not in known or (known[name].kind, known[name].size) != (kind, size):
            raise ImageError(f"layer {name[:19]} is not the {kind} of {size} bytes that the snapshot needs")


def disk_sizes(found: Snapshot) -> list[int]:
    """Bytes of the root disk and of the drives, in the spec's order."""
    return [found.spec.disk, *(drive.size for drive in found.spec.drives)]


def dump_trace(touched: Mapping[str, Iterable[int]]) -> bytes:
    """The chunks that a start touches, in that order, of layers by their names."""
    return tables.compress(canonical({name: list(chunks) for name, chunks in touched.items()}))


def read_trace(data: bytes, layers: Mapping[str, Tables], what: str) -> dict[str, list[int]]:
    """The same; chunks that are none are left out, for it is a hint. ImageError when it is none."""
    try:
        value = json.loads(tables.decompress(data, TRACE_LIMIT, f"{what}: trace"))
        found = {name: [number for number in chunks if isinstance(number, int)] for name, chunks in value.items() if name in layers}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ImageError(f"{what}: trace: not understood") from error
    return {
        name: [number for number in dict.fromkeys(chunks) if 0 <= number < (layers[name].size + CHUNK - 1) // CHUNK]
        for name, chunks in found.items()
    }
