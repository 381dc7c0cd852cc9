"""OCI and Docker images as documents: manifests, configs, layouts on disk. No program is started here; what is read came from strangers."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from ramet.errors import ImageError
from ramet.model import ImageConfig
from ramet.reference import DIGEST, INDEXES, sha256

PLAIN_LAYER = "application/vnd.oci.image.layer.v1.tar"
GZIP_LAYER = PLAIN_LAYER + "+gzip"
ZSTD_LAYER = PLAIN_LAYER + "+zstd"
_DOCUMENT_LIMIT = 8 << 20  # bytes of a manifest or config; registries refuse manifests beyond 4 MiB

Digest = Annotated[str, Field(pattern=f"^{DIGEST.pattern}$")]
Document = TypeVar("Document", bound=BaseModel)


class Platform(BaseModel):
    architecture: str = ""
    os: str = ""


class Descriptor(BaseModel):
    """Names a blob. size: bytes."""

    digest: Digest
    size: int = Field(ge=0)
    mediaType: str = ""  # noqa: N815
    platform: Platform | None = None


class Manifest(BaseModel):
    config: Descriptor
    layers: list[Descriptor]
    mediaType: str = ""  # noqa: N815


class Index(BaseModel):
    manifests: list[Descriptor]


class Runtime(BaseModel):
    """The `config` of a config: Go writes null for what is empty."""

    Env: list[str] | None = None
    User: str | None = None
    WorkingDir: str | None = None
    Entrypoint: list[str] | None = None
    Cmd: list[str] | None = None


class Config(BaseModel):
    architecture: str = ""
    os: str = ""
    config: Runtime | None = None


def architecture() -> str:
    """This host's, as OCI and Debian name it."""
    machine = platform.machine()
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def read(kind: type[Document], data: str | bytes, what: str) -> Document:
    """A document of somebody else's, checked. The error names the attribute that is wrong."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise ImageError(f"{what}: not valid: {where}: {first['msg']}") from None


def choose(data: str, what: str) -> Descriptor | Manifest:
    """The manifest in a document from a registry, or, of an index, the entry for this host's architecture."""
    try:
        head: Any = json.loads(data)
    except ValueError:
        raise ImageError(f"{what}: its manifest is not JSON") from None
    if not isinstance(head, dict):
        raise ImageError(f"{what}: its manifest is not an object")
    if head.get("schemaVersion") == 1:
        raise ImageError(
            f"{what}: its manifest is of Docker's schema 1, which nobody should use any more",
            hint="Push the image again with a tool of this decade.",
        )
    if head.get("mediaType") not in INDEXES and "manifests" not in head:
        return read(Manifest, data, f"{what}: manifest")
    wanted, offered = architecture(), []
    for entry in read(Index, data, f"{what}: index").manifests:
        if entry.platform is None or (entry.platform.os, entry.platform.architecture) == ("linux", wanted):
            return entry
        offered.append(f"{entry.platform.os}/{entry.platform.architecture}")
    names = ", ".join(sorted(set(offered) - {"unknown/unknown"})) or "nothing"
    raise ImageError(
        f"{what}: not made for this host's architecture, linux/{wanted}; it offers {names}", details={"offered": sorted(set(offered))}
    )


def settings(config: Config) -> ImageConfig:
    """What Ramet honours of an image's config."""
    runtime = config.config or Runtime()
    env = dict(pair.split("=", 1) for pair in runtime.Env or [] if "=" in pair and not pair.startswith("="))
    return ImageConfig(
        env=env,
        user=runtime.User or "",
        workdir=runtime.WorkingDir or "",
        entrypoint=tuple(runtime.Entrypoint or ()),
        cmd=tuple(runtime.Cmd or ()),
    )


def digest_of(path: Path) -> str:
    """A file's digest."""
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def blob(layout: Path, descriptor: Descriptor) -> Path:
    return layout / "blobs" / "sha256" / descriptor.digest.removeprefix("sha256:")


def layer_type(path: Path) -> str:
    """What a layer is, by its first bytes: what manifests say is sometimes wrong."""
    with open(path, "rb") as file:
        head = file.read(4)
    # a zstd frame, or the skippable one that writers of seekable formats put first
    if head == b"\x28\xb5\x2f\xfd" or (head[1:] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
        return ZSTD_LAYER
    return GZIP_LAYER if head[:2] == b"\x1f\x8b" else PLAIN_LAYER


def verify(layout: Path, descriptor: Descriptor, what: str) -> Path:
    """The path of a blob that has the size and digest it should have."""
    path = blob(layout, descriptor)
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ImageError(f"{what}: the blob {descriptor.digest} is missing") from None
    if size != descriptor.size:
        raise ImageError(
            f"{what}: the blob {descriptor.digest} has {size} bytes instead of {descriptor.size}: it is truncated or damaged",
            hint="Fetch or push the image again.",
        )
    if (found := digest_of(path)) != descriptor.digest:
        raise ImageError(
            f"{what}: digest mismatch: the blob {descriptor.digest} has content of digest {found}", hint="Fetch or push the image again."
        )
    return path


def small(layout: Path, descriptor: Descriptor, what: str) -> bytes:
    """A verified blob's content, where that is a document."""
    if descriptor.size > _DOCUMENT_LIMIT:
        raise ImageError(f"{what}: a manifest or config of {descriptor.size} bytes: more than {_DOCUMENT_LIMIT}")
    return verify(layout, descriptor, what).read_bytes()


def manifest(layout: Path, what: str) -> tuple[Descriptor, Manifest]:
    """The one image of a layout that skopeo wrote."""
    entries = read(Index, (layout / "index.json").read_bytes(), f"{what}: index.json").manifests
    if len(entries) != 1:
        raise ImageError(f"{what}: the layout holds {len(entries)} images instead of one")
    return entries[0], read(Manifest, small(layout, entries[0], what), f"{what}: manifest")


def replace_layers(layout: Path, replaced: dict[str, Descriptor]) -> None:
    """Let the image of a layout have other blobs for some of its layers (by digest)."""
    index = json.loads((layout / "index.json").read_bytes())
    old = Descriptor.model_validate(index["manifests"][0])
    body = json.loads(blob(layout, old).read_bytes())
    body["layers"] = [replaced[at["digest"]].model_dump(exclude_none=True) if at["digest"] in replaced else at for at in body["layers"]]
    data = json.dumps(body).encode()
    index["manifests"][0] |= {"digest": sha256(data), "size": len(data)}
    blob(layout, Descriptor(digest=sha256(data), size=len(data))).write_bytes(data)
    (layout / "index.json").write_text(json.dumps(index))


def config(layout: Path, found: Manifest, what: str) -> Config:
    """An image's config, which must be for this host."""
    result = read(Config, small(layout, found.config, what), f"{what}: config")
    made_for, here = f"{result.os or 'linux'}/{result.architecture or architecture()}", f"linux/{architecture()}"
    if made_for != here:
        raise ImageError(f"{what}: made for {made_for}, and this host is {here}", details={"offered": [made_for]})
    return result
