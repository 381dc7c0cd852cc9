"""The tables of a layer as they are sent: one small archive, whose digest is the layer's name in every registry. Pure; what is read came from strangers.

Tables name other layers by their tables' digests, so what stands on something else has another name, and nothing can stand on itself.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import tarfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import zstandard
from pydantic import BaseModel, ConfigDict, Field

from ramet import oci
from ramet.errors import ImageError, RametError
from ramet.oci import Digest
from ramet.reference import DIGEST, sha256
from ramet.store.index import Index
from ramet.store.layer import CHUNK, MAX_PAGES, PAGE, Kind, Layer
from ramet.store.runs import Owners

FORMAT = 1
SELF = "self"  # in a chain: the layer whose tables these are
LIMIT = 256 << 20  # bytes as they are sent: those of a terabyte in chunks that do not compress at all
_CONTENT = 1 << 30  # bytes unpacked: 38 for each chunk of 64 KiB
_FRAME = CHUNK + 1024  # bytes of a frame: zstd adds less to what does not compress
_MEMBERS = ("layer.json", "owners", "index")
_LEVEL = 3
_TABLE_ENTRY, _TABLE_ENDS = 8, 17  # bytes of a seekable blob's own table: for each frame, and around them


class Strict(BaseModel):
    """A document that we write and nobody else: what is not known in it is not understood."""

    model_config = ConfigDict(extra="forbid", strict=True)


class _Record(Strict):
    """layer.json: no id of any host."""

    format: int
    kind: str
    size: int
    data_bytes: int = Field(ge=0)
    zero_bytes: int = Field(ge=0)
    blobs: list[Digest]
    chain: list[str]
    beneath: list[Digest]
    base: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Tables:
    """A layer without its blobs. size, data, zero: bytes. chain, beneath, base: other layers by the digests of their tables; the chain ends with SELF."""

    kind: Kind
    size: int
    data: int
    zero: int
    blobs: tuple[str, ...]
    chain: tuple[str, ...]
    beneath: tuple[str, ...]
    base: str
    owners: Owners
    index: Index

    @property
    def others(self) -> frozenset[str]:
        """The layers that it refers to."""
        return frozenset({*self.chain, *self.beneath, self.base} - {SELF, ""})

    def pack(self) -> bytes:
        """The same bytes for the same layer, on every host with the same zstd."""
        value = _Record(
            format=FORMAT,
            kind=self.kind.value,
            size=self.size,
            data_bytes=self.data,
            zero_bytes=self.zero,
            blobs=list(self.blobs),
            chain=list(self.chain),
            beneath=list(self.beneath),
            base=self.base,
        ).model_dump()
        return compress(_tar((canonical(value), self.owners.dump(), self.index.dump())))

    def record(self, digest: str) -> Layer:
        """The layer on this host, when these are the tables with that digest."""
        index = self.index.dump()
        return Layer(
            id=local_id(digest),
            kind=self.kind,
            size=self.size,
            created_at=time.time(),
            base=f"layer:{local_id(self.base)}" if self.base else "",
            chain=tuple(local_id(digest if each == SELF else each) for each in self.chain),
            beneath=tuple(map(local_id, self.beneath)),
            sealed=True,
            blobs=self.blobs,
            index_digest=sha256(index),
            data_bytes=self.data,
            zero_bytes=self.zero,
            stored_bytes=sum(frames(self.index).values()) + len(index),
            origin=digest,
        )


def compress(data: bytes) -> bytes:
    """As what is small is sent."""
    return zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress(data)


def decompress(data: bytes, limit: int, what: str) -> bytes:
    """One frame that says how long its content is, of at most `limit` bytes. ImageError, which begins with `what`."""
    try:
        length = zstandard.frame_content_size(data)
        if not 0 <= length <= limit:
            raise ImageError(f"{what}: {length} bytes unpacked, where at most {limit} are allowed")
        unpacker = zstandard.ZstdDecompressor().decompressobj()
        content: bytes = unpacker.decompress(data)
    except zstandard.ZstdError as error:
        raise ImageError(f"{what}: not understood: {error}") from error
    if len(content) != length or unpacker.unused_data or not unpacker.eof:
        raise ImageError(f"{what}: not understood: it is not as long as it says")
    return content


def canonical(value: Any) -> bytes:
    """JSON, the same bytes for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def local_id(digest: str) -> str:
    """What the layer with these tables is called on every host: 63 bits of the digest. `Layer.origin` has all of it."""
    number = int(digest.removeprefix("sha256:")[:16], 16) >> 1
    return f"{max(2, number):016x}"


def frames(index: Index) -> dict[tuple[int, int], int]:
    """The frames that an index names, each once: which blob and at what offset -> length."""
    found = zip(index.blob, index.offset, index.length, strict=True)
    return {(which, offset): length for which, offset, length in found if length}


def is_all_used(size: int, lengths: Iterable[int]) -> bool:
    """Whether these are all frames of a blob of `size` bytes: what lies between and behind them is then its table, and nothing else."""
    found = list(lengths)
    return sum(found) + len(found) * _TABLE_ENTRY + _TABLE_ENDS == size


def _tar(contents: Iterable[bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in zip(_MEMBERS, contents, strict=True):
            member = tarfile.TarInfo(name)  # time, owner and mode as they come: 0, root, rw-r--r--
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def _untar(data: bytes, what: str) -> list[bytes]:
    """Only what `_tar` makes: nothing that readers may differ about gets in."""
    found: list[bytes] = []
    with contextlib.suppress(tarfile.TarError, ValueError, OverflowError), tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for member in itertools.islice(archive, len(_MEMBERS)):
            file = archive.extractfile(member) if member.isreg() else None
            found.append(file.read() if file else b"")
    if len(found) != len(_MEMBERS) or _tar(found) != data:
        raise ImageError(f"{what}: not an archive of {', '.join(_MEMBERS)} alone")
    return found


def unpack(data: bytes, digest: str) -> Tables:
    """The tables with this digest, which the caller has compared. ImageError when they could not be a layer's."""
    what = f"tables {digest[:19]}"
    document, owners, index = _untar(decompress(data, _CONTENT, what), what)
    record = oci.read(_Record, document, what)
    if record.format > FORMAT:
        raise ImageError(f"{what}: made by a newer Ramet", hint="Upgrade Ramet on this host.")
    if record.kind not in list(Kind) or not 0 < record.size <= MAX_PAGES * PAGE:
        raise ImageError(f"{what}: a {record.kind[:20]} of {record.size} bytes is no layer")
    names = record.chain[:-1] + record.beneath + [record.base] * bool(record.base)
    if record.chain[-1:] != [SELF] or not all(map(DIGEST.fullmatch, names)):
        raise ImageError(f"{what}: what it refers to are no layers")
    for each in (record.chain, record.beneath, record.blobs):
        if len(set(each)) < len(each) or len(each) >= 1 << 16:
            raise ImageError(f"{what}: it names a layer or a blob twice, or too many")
    if record.base and record.kind != Kind.DISK:
        raise ImageError(f"{what}: only a disk has a base")
    pages = (record.size + PAGE - 1) // PAGE
    try:
        found = Tables(
            kind=Kind(record.kind),
            size=record.size,
            data=record.data_bytes,
            zero=record.zero_bytes,
            blobs=tuple(record.blobs),
            chain=tuple(record.chain),
            beneath=tuple(record.beneath),
            base=record.base,
            owners=Owners.load(owners, what, pages=pages, layers=len(record.chain)),
            index=Index.load(index, what),
        )
    except (RametError, ValueError, IndexError) as error:
        raise ImageError(f"{what}: {error}") from error
    if problem := _problem(found, pages):
        raise ImageError(f"{what}: {problem}")
    return found


def _problem(found: Tables, pages: int) -> str:
    """Why reading through these tables could go wrong."""
    if any(a >= b for a, b in itertools.pairwise(found.owners.starts)):
        return "its table of owners is not in order"
    index = found.index
    if problems := index.problems(pages=pages, blobs=len(found.blobs), beneath=len(found.beneath)):
        return problems[0]
    if not len(index.moved_first) == len(index.moved_count) == len(index.moved_to):
        return "its columns are not of one length"
    end = 0
    for first, stop, _ in index.moved():
        if first < end or stop <= first or stop > pages:
            return "the pages that it moves are not in order, or beyond its end"
        end = stop
    for data, length in zip(index.data, index.length, strict=True):
        if bool(data) != bool(length) or length > _FRAME:
            return f"a frame of {length} bytes cannot be"
    data_pages, zero_pages = index.pages()
    if (found.data, found.zero) != (data_pages * PAGE, zero_pages * PAGE):
        return "it does not hold as much as it says"
    return ""


def fits(found: Tables, sizes: Mapping[str, int]) -> str:
    """Why the tables do not fit the blobs that are sent with them, with these sizes; or nothing."""
    for (which, offset), length in frames(found.index).items():
        digest = found.blobs[which]
        if digest not in sizes:
            return f"blob {digest} is not among what is sent"
        if offset + length > sizes[digest]:
            return f"a frame lies beyond the end of blob {digest}"
    missing = [digest for digest in found.blobs if digest not in sizes]
    return f"blob {missing[0]} is not among what is sent" if missing else ""
