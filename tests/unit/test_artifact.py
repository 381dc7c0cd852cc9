"""Snapshots as artifacts: what is written, and what strangers may make of the documents."""

from __future__ import annotations

import io
import json
import tarfile
from array import array
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet import artifact, tables
from ramet.artifact import Artifact, ImageOrigin, Part
from ramet.errors import ImageError, RametError, SpecError
from ramet.model import Accelerator, Compatibility, Drive, ImageConfig, Snapshot, SnapshotState, Spec
from ramet.reference import sha256
from ramet.store import index, layer
from ramet.store.layer import PAGE, Kind
from ramet.store.runs import Owners
from ramet.tables import SELF, Tables


def test_names_are_ids() -> None:
    assert layer.is_id(tables.local_id("sha256:" + "0" * 64))
    assert layer.is_id(tables.local_id("sha256:" + "f" * 64))
    assert tables.local_id("sha256:" + "f" * 64) == "7fffffffffffffff"


# --- hostile tables ---


def plain(**changes: Any) -> Tables:
    """Tables of a disk of two chunks, with changes that may be wrong."""
    found = index.Index(
        chunk=array("I", [0, 1]),
        data=array("H", [3, 0]),
        zero=array("H", [4, 1]),
        blob=array("H", [0, 0]),
        offset=array("Q", [0, 0]),
        length=array("I", [100, 0]),
        marks=bytes(32),
        moved_first=array("I"),
        moved_count=array("I"),
        moved_to=array("H"),
    )
    columns = {name: changes.pop(name) for name in list(changes) if isinstance(changes[name], array)}
    made = Tables(
        kind=Kind.DISK,
        size=32 * PAGE,
        data=2 * PAGE,
        zero=2 * PAGE,
        blobs=("sha256:" + "b" * 64,),
        chain=(SELF,),
        beneath=(),
        base="",
        owners=Owners.nobody(32),
        index=replace(found, **columns),
    )
    return replace(made, **changes)


OTHER = "sha256:" + "c" * 64
WRONG: list[dict[str, Any]] = [
    {"size": 0},
    {"size": 1 << 60},
    {"size": 33 * PAGE},
    {"chain": ()},
    {"chain": (OTHER,)},
    {"chain": (SELF, OTHER)},
    {"chain": ("../../etc/passwd", SELF)},
    {"chain": (OTHER, OTHER, SELF)},
    {"beneath": (SELF,)},
    {"beneath": ("sha256:" + "C" * 64,)},
    {"base": "images/x/disk.raw"},
    {"base": SELF},
    {"kind": Kind.MEMORY, "base": OTHER},
    {"blobs": ("sha256:../../../etc",)},
    {"blobs": ()},
    {"blobs": ("sha256:" + "b" * 64, "sha256:" + "b" * 64)},
    {"data": 3 * PAGE},
    {"zero": -1},
    {"owners": Owners(starts=array("I", [0, 20, 10, 32]), owner=array("H", [0, 1, 0]))},
    {"owners": Owners(starts=array("I", [0, 32]), owner=array("H", [2]))},
    {"owners": Owners(starts=array("I", [0, 0, 32]), owner=array("H", [0, 1]))},
    {"owners": Owners(starts=array("I"), owner=array("H"))},
    {"chunk": array("I", [1, 0])},
    {"chunk": array("I", [0, 2])},
    {"chunk": array("I", [0, 0])},
    {"length": array("I", [0, 0])},
    {"length": array("I", [100, 100])},
    {"length": array("I", [1 << 20, 0])},
    {"zero": array("H", [3, 1])},
    {"blob": array("H", [1, 0])},
    {"moved_first": array("I", [1]), "moved_count": array("I", [1]), "moved_to": array("H", [0])},
    {"moved_first": array("I", [1]), "moved_count": array("I", [1])},
    {"beneath": (OTHER,), "moved_first": array("I", [31]), "moved_count": array("I", [2]), "moved_to": array("H", [0])},
    {"beneath": (OTHER,), "moved_first": array("I", [5, 4]), "moved_count": array("I", [1, 1]), "moved_to": array("H", [0, 0])},
    {"beneath": (OTHER,), "moved_first": array("I", [5]), "moved_count": array("I", [0]), "moved_to": array("H", [0])},
]


def test_tables_that_are_right() -> None:
    data = plain().pack()
    assert tables.unpack(data, sha256(data)).pack() == data
    assert plain().pack() == data


@pytest.mark.parametrize("changes", WRONG, ids=lambda changes: " ".join(changes))
def test_tables_that_cannot_be(changes: dict[str, Any]) -> None:
    made = plain(**changes)
    try:
        data = made.pack()
    except ValueError:  # our writer refuses it: then as somebody else would write it
        good = plain()
        value = json.loads(members(good.pack())["layer.json"])
        value |= {key: list(each) if isinstance(each, tuple) else each for key, each in changes.items()}
        data = written({"layer.json": json.dumps(value).encode()}, good)
    with pytest.raises(ImageError):
        tables.unpack(data, sha256(data))


def members(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(zstandard.ZstdDecompressor().decompress(data))) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def written(changes: dict[str, bytes], good: Tables, *, order: Iterable[str] = ("layer.json", "owners", "index"), **odd: Any) -> bytes:
    out = io.BytesIO()
    found = members(good.pack()) | changes
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in order:
            member = tarfile.TarInfo(name)
            member.size = len(found[name])
            for key, value in odd.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(found[name]))
    return tables.compress(out.getvalue())


def test_archives_that_are_not_ours() -> None:
    good = plain()
    assert tables.unpack(written({}, good), "sha256:" + "0" * 64).pack() == good.pack()
    value = json.loads(members(good.pack())["layer.json"])
    huge = zstandard.ZstdCompressor().compress(bytes(1 << 22))
    bombs = [
        written({}, good, order=("owners", "layer.json", "index")),
        written({}, good, order=("layer.json", "owners", "index", "index")),
        written({}, good, order=("layer.json", "owners")),
        written({}, good, mode=0o4755),
        written({}, good, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        written({"layer.json": b"[" * 100_000}, good),
        written({"owners": b""}, good),
        written({"index": b"RAMETIDX"}, good),
        written({"layer.json": json.dumps(value | {"more": 1}).encode()}, good),
        written({"layer.json": json.dumps(value | {"format": 2}).encode()}, good),
        written({"layer.json": json.dumps(value | {"size": "8"}).encode()}, good),
        written({}, good) + b"more",
        written({}, good)[:-3],
        b"",
        b"nonsense",
        huge,
        zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * 1000),
    ]
    for data in bombs:
        with pytest.raises(ImageError):
            tables.unpack(data, sha256(data))
    with pytest.raises(ImageError, match="at most"):
        tables.decompress(huge, 1 << 20, "it")


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 1 << 20), flip=st.integers(1, 255), member=st.sampled_from(["layer.json", "owners", "index"]))
def test_a_flipped_byte_is_refused_or_harmless(at: int, flip: int, member: str) -> None:
    good = plain()
    content = bytearray(members(good.pack())[member])
    content[at % len(content)] ^= flip
    data = written({member: bytes(content)}, good)
    try:
        found = tables.unpack(data, sha256(data))
    except ImageError:
        return
    assert member == "layer.json"  # the others have digests of their own
    assert found.others <= {*found.chain, *found.beneath, found.base}


# --- documents ---


FIT = Compatibility(machine="q35", qemu="7.2.0", cpu="any", accelerator=Accelerator.TCG, kernel="6.9", agent=1, format=1)
IMAGE = ImageOrigin(
    digest="sha256:" + "1" * 64, reference="debian:12", config=ImageConfig(env={"PATH": "/bin", "A": "b=c"}, cmd=("sh",)), disk_size=1 << 30
)
SPEC = Spec(name="shop", memory=64 << 20, disk=32 * PAGE << 10, drives=(Drive(name="data", size=64 << 20),))


def snapshot(**changes: Any) -> Snapshot:
    made = Snapshot(
        id="x", name="shop@1", machine="shop", state=SnapshotState.READY, created_at=1.5, memory=True, spec=SPEC, compatibility=FIT, pause=0.1,
        disk_layer="d", memory_layer="m", image_digest=IMAGE.digest, drive_layers=("e",),
    )  # fmt: skip
    return replace(made, **changes)


def config(**changes: Any) -> bytes:
    parts = [Part.of(artifact.BLOB, b"x")]
    return artifact.config(snapshot(**changes), IMAGE, [OTHER, OTHER], OTHER if changes.get("memory", True) else "", parts)


def test_the_config_is_an_images_and_ours() -> None:
    data = config()
    assert data == config()
    value = json.loads(data)
    assert value["os"] == "linux"
    assert value["created"] == "1970-01-01T00:00:01Z"
    assert value["config"]["Env"] == ["A=b=c", "PATH=/bin"]
    assert len(value["rootfs"]["diff_ids"]) == 1
    found, image = artifact.read_config(data, "it")
    assert image == IMAGE
    assert found == snapshot(id="", name="", disk_layer=OTHER, memory_layer=OTHER, drive_layers=(OTHER,), image_digest="")
    assert "shop@1" not in data.decode()  # what it is called here


@pytest.mark.parametrize(
    "path,value",
    [
        (("snapshot", "spec", "name"), "../x"),
        (("snapshot", "spec", "memory"), 1),
        (("snapshot", "spec", "more"), 1),
        (("snapshot", "spec", "drives"), [{"name": "../..", "size": 64 << 20, "mount": ""}]),
        (("snapshot", "spec", "drives"), []),
        (("snapshot", "disk_layers"), []),
        (("snapshot", "disk_layers"), ["../x"]),
        (("snapshot", "memory"), False),
        (("snapshot", "memory_layer"), ""),
        (("snapshot", "compatibility"), None),
        (("snapshot", "created_at"), 1e300),
        (("snapshot", "created_at"), -1),
        (("snapshot", "saved"), 1 << 70),
        (("snapshot", "memory_limit"), 1 << 40),
        (("snapshot", "id"), "mine"),
        (("image", "digest"), "sha256:x"),
        (("image", "disk_size"), -1),
        (("format",), 2),
        (("more",), 2),
    ],
)
def test_configs_that_cannot_be(path: tuple[str, ...], value: Any) -> None:
    document = json.loads(config())
    place = document[artifact.OURS]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises((ImageError, SpecError)):
        artifact.read_config(json.dumps(document).encode(), "it")


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"[" * 100_000, b'{"dev.ramet": 7}', b"\xff", b"null"])
def test_documents_that_are_none(data: bytes) -> None:
    with pytest.raises(ImageError):
        artifact.read_config(data, "it")
    with pytest.raises(ImageError):
        artifact.read_manifest(data, "it")


def test_manifests() -> None:
    made = Artifact(config=Part.of(artifact.CONFIG, b"{}"), parts=(Part.of(artifact.BLOB, b"1"), Part.of(artifact.TABLES, b"2")))
    assert artifact.read_manifest(made.manifest(), "it") == made
    assert made.size == 4
    value = json.loads(made.manifest())
    for layers in (
        [{"mediaType": "application/x", "digest": OTHER, "size": 1}],
        [{"mediaType": artifact.TABLES, "digest": OTHER, "size": 1 << 40}],
        [{"mediaType": artifact.BLOB, "digest": OTHER, "size": -1}],
        [{"mediaType": artifact.BLOB, "digest": "sha512:0", "size": 1}],
        [{"mediaType": artifact.BLOB, "digest": OTHER, "size": size} for size in (1, 2)],
    ):
        with pytest.raises(ImageError):
            artifact.read_manifest(json.dumps(value | {"layers": layers}).encode(), "it")
    with pytest.raises(ImageError, match="not a snapshot"):
        artifact.read_manifest(json.dumps(value | {"artifactType": ""}).encode(), "it")


def test_layers_must_be_the_snapshots() -> None:
    sizes = {"sha256:" + "b" * 64: 200}
    disk, data, memory = plain(size=SPEC.disk), plain(size=64 << 20), plain(kind=Kind.MEMORY, size=SPEC.memory)
    names = {letter: "sha256:" + letter * 64 for letter in "def"}
    found = snapshot(disk_layer=names["d"], drive_layers=(names["e"],), memory_layer=names["f"])
    right = {names["d"]: disk, names["e"]: data, names["f"]: memory}
    artifact.agree(found, right, sizes)
    for wrong in (
        {names["d"]: data, names["e"]: data, names["f"]: memory},
        {names["e"]: data, names["f"]: memory},
        right | {names["f"]: replace(memory, kind=Kind.DISK)},
        right | {names["f"]: replace(memory, size=SPEC.memory * 2)},
        right | {names["d"]: replace(disk, chain=(OTHER, SELF))},
        right | {names["d"]: replace(disk, base=names["e"]), names["e"]: replace(data, base=names["d"])},
        right | {names["f"]: replace(memory, chain=(names["d"], SELF))},
        right | {names["e"]: replace(data, beneath=(names["d"],))},
    ):
        with pytest.raises(ImageError):
            artifact.agree(found, wrong, sizes)
    with pytest.raises(ImageError, match="beyond the end"):
        artifact.agree(found, right, {"sha256:" + "b" * 64: 99})
    with pytest.raises(ImageError, match="not among"):
        artifact.agree(found, right, {})


def test_traces() -> None:
    known = {OTHER: plain()}
    data = artifact.dump_trace({OTHER: [1, 0], IMAGE.digest: [4]})
    assert artifact.read_trace(data, known, "it") == {OTHER: [1, 0]}
    odd = tables.compress(json.dumps({OTHER: [1, -1, 2, "x", 1, 1 << 70, 0]}).encode())
    assert artifact.read_trace(odd, known, "it") == {OTHER: [1, 0]}
    for wrong in (b"", b"[]", b"{}}", b"[" * 100_000, json.dumps({OTHER: 5}).encode()):
        with pytest.raises(RametError):
            artifact.read_trace(tables.compress(wrong), known, "it")
