"""What a layer is: its record on disk, its id, the sizes that everything in the store counts in."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import secrets
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ramet import records
from ramet.errors import DaemonError, HostError, LayerError, NotFoundError
from ramet.paths import LayerDir, StoreDir
from ramet.reference import DIGEST
from ramet.store import disk

FORMAT = 1
PAGE = 4096
# Measured with zstd level 1 on a guest's memory: chunks of 64 KiB are read at 1.35 to 1.45 GB/s a core and compress 4.2x; of 16 KiB 0.8 GB/s; of 128 KiB
# 1.5 GB/s, but they double what a scattered page costs.
CHUNK_PAGES = 16
CHUNK = CHUNK_PAGES * PAGE
MAX_PAGES = (1 << 32) - 1  # what the tables count in: 16 TiB

BASE_LAYER = "layer:"  # how a base begins that is a layer itself

_ID = re.compile(r"[0-9a-f]{16}")


class Kind(StrEnum):
    """What a layer is a difference of."""

    MEMORY = "memory"
    DISK = "disk"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer. Ids are 16 hex digits, sizes in bytes.

    parent: the layer it was made against, empty at the bottom. base: what is below the bottom of a disk: a raw image, relative to the state directory, or
    `layer:ID`, a sealed disk layer without a base; beyond its end are zeros. origin: the digest of the tables that a registry has it by; it never changes then.
    chain: the layers that its pages come from, itself last: owner i of `owners` is chain[i-1], owner 0 is the base, or zeros.
    beneath: where the pages are that sealing found to be as they were before; the index says which.
    tables: how often the layer was sealed anew with other owners; the names of its tables say it, so that this record switches all of them at once.
    blobs: what the index's entries count. spool_bytes: how long the spool is. stored_bytes: what the layer takes on the disk, blobs that it shares not counted.
    boot: the boot of this host that has not yet written it to the disk; empty when it is there.
    """

    id: str
    kind: Kind
    size: int
    created_at: float
    format: int = FORMAT
    parent: str = ""
    base: str = ""
    chain: tuple[str, ...] = ()
    beneath: tuple[str, ...] = ()
    sealed: bool = False
    tables: int = 0
    blobs: tuple[str, ...] = ()
    index_digest: str = ""
    spool_bytes: int = 0
    data_bytes: int = 0
    zero_bytes: int = 0
    stored_bytes: int = 0
    boot: str = ""
    origin: str = ""

    @property
    def base_layer(self) -> str:
        """The layer below the bottom; empty where that is a raw image, or nothing."""
        return self.base.removeprefix(BASE_LAYER) if self.base.startswith(BASE_LAYER) else ""

    @property
    def pages(self) -> int:
        """The last one may be a part of a page."""
        return (self.size + PAGE - 1) // PAGE


def owners_file(files: LayerDir, record: Layer) -> Path:
    """Where the table of owners is that belongs to this record."""
    return _numbered(files.owners, record.tables)


def index_file(files: LayerDir, record: Layer) -> Path:
    """Where the index is that belongs to this record, when it is a sealed layer's."""
    return _numbered(files.index, record.tables)


def older_tables(files: LayerDir, record: Layer) -> list[Path]:
    """The tables of the records before this one."""
    return [_numbered(path, number) for number in range(record.tables) for path in (files.index, files.owners)]


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}") if number else path


def new_id() -> str:
    """16 hex digits of a number in 2 … 2**63-1: it is also the layer's node in the image file system, where 1 is the root."""
    return f"{secrets.randbelow((1 << 63) - 2) + 2:016x}"


def is_id(text: str) -> bool:
    """Whether it may name a layer, and so a file: nothing with dots or slashes does."""
    return bool(_ID.fullmatch(text)) and 2 <= int(text, 16) < 1 << 63


@functools.cache
def this_boot() -> str:
    """What this boot of the host is called."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def save(files: LayerDir, layer: Layer, *, durable: bool) -> None:
    """Replace the layer's record, atomically."""
    value = records.dump(layer)
    text = json.dumps(value | {"check": _check(value)}, indent=1)
    disk.replace(files.record, text.encode() + b"\n", durable=durable)


def load(files: LayerDir, layer_id: str) -> Layer:
    """The record of a layer or of a draft. NotFoundError when there is none, LayerError when it is damaged or of a later format."""
    if not is_id(layer_id):
        raise LayerError(f"{layer_id[:40]!r} is not a layer's id: that is 16 hex digits")
    try:
        data = files.record.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no layer {layer_id}") from error
    except OSError as error:
        raise HostError(f"cannot read {files.record}: {error.strerror}") from error
    return _parse(data, layer_id)


def published(store: StoreDir, layer_id: str) -> Layer:
    """The record of a layer that another one needs, or that is to be served: LayerError when it is missing, damaged, or was lost in a crash of the host."""
    try:
        layer = load(store.layer(layer_id), layer_id)
    except NotFoundError as error:
        raise LayerError(f"layer {layer_id} is missing") from error
    if layer.boot and layer.boot != this_boot():
        raise LayerError(
            f"layer {layer_id} was not on the disk yet when the host went down",
            hint="Start from an older snapshot; this one can be deleted.",
        )
    return layer


def _check(value: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _parse(data: bytes, layer_id: str) -> Layer:
    what = f"the record of layer {layer_id}"
    try:
        value = json.loads(data)
        check = value.pop("check")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise LayerError(f"{what} is damaged: it is no record") from error
    if isinstance(value.get("format"), int) and value["format"] > FORMAT:
        raise LayerError(f"layer {layer_id} was made by a newer Ramet", hint="Upgrade Ramet on this host.")
    if check != _check(value):
        raise LayerError(f"{what} is damaged: its content does not match its digest")
    try:
        layer = records.load(Layer, value, what)
    except DaemonError as error:
        raise LayerError(f"{what} is not understood: {error.message}") from error
    if problem := _problem(layer, layer_id):
        raise LayerError(f"{what} is damaged: {problem}")
    return layer


def _problem(layer: Layer, layer_id: str) -> str:
    """What may not be in a record; a record may come from elsewhere, and its names become paths."""
    if layer.id != layer_id:
        return "it is another layer's"
    if not all(map(is_id, (*layer.chain, *layer.beneath, *filter(None, [layer.parent])))):
        return "it names what is no layer"
    if not all(map(DIGEST.fullmatch, (*layer.blobs, *filter(None, [layer.origin])))):
        return "it names what is no blob"
    if not 0 < layer.size <= MAX_PAGES * PAGE:
        return f"its size is {layer.size}"
    if layer.tables < 0:
        return f"its tables are number {layer.tables}"
    return base_problem(layer.base)


def base_problem(base: str) -> str:
    """Why a base may not be used: a path must stay below the state directory."""
    if base.startswith(BASE_LAYER):
        return "" if is_id(base.removeprefix(BASE_LAYER)) else "its base is no layer"
    return "its base is no path below the state directory" if Path(base).is_absolute() or ".." in Path(base).parts else ""
