"""Every part of a layer held against what it should be."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from ramet.errors import AbsentError, RametError
from ramet.paths import LayerDir, StoreDir
from ramet.store import blob, disk, index, layer, remote
from ramet.store.chain import Chain, read_owners, spool_runs
from ramet.store.layer import PAGE, Layer
from ramet.store.remote import Want
from ramet.store.runs import ZERO, Runs
from ramet.store.source import Sealed, Spool

_BLOCK = 256  # pages


def problems(store: StoreDir, layer_ids: Collection[str]) -> list[str]:
    """What is wrong with layers or with what they stand on: one sentence each, which names the layer, and the chunk and the blob where it is about those.

    What is in a registry only is not wrong, and is not fetched.
    """
    while True:
        found, records = _look(store, layer_ids)
        if not found or not any(_replaced(store, record) for record in records.values()):
            return found


def _replaced(store: StoreDir, record: Layer) -> bool:
    """Whether the layer was sealed since: what we missed was there before, or is not needed any more."""
    try:
        return layer.published(store, record.id) != record
    except RametError:
        return False


def _look(store: StoreDir, layer_ids: Collection[str]) -> tuple[list[str], dict[str, Layer]]:
    found: list[str] = []
    records: dict[str, Layer] = {}
    waiting = list(layer_ids)
    wholes = set(layer_ids)
    while waiting:
        name = waiting.pop()
        if name in records:
            continue
        try:
            records[name] = record = layer.published(store, name)
        except RametError as error:
            found.append(error.message)
            continue
        waiting += [*record.chain, *record.beneath] if name in wholes else record.beneath
        if base := record.base_layer:
            waiting.append(base)
            wholes.add(base)
    for name in sorted(records, key=lambda each: records[each].created_at):
        found += _own(store, records[name])
    digests = {digest for record in records.values() for digest in record.blobs}
    for digest in sorted(digests):
        found += _blob(store, digest, [name for name in records if digest in records[name].blobs])
    for layer_id in [] if found else layer_ids:
        found += _reads(store, layer_id)
    return found, records


def _own(store: StoreDir, record: Layer) -> Iterator[str]:
    files = store.layer(record.id)
    try:
        read_owners(files, record)
    except RametError as error:
        yield error.message
    try:
        yield from _sealed(store, record, files) if record.sealed else _spool(record, files)
    except FileNotFoundError as error:
        yield f"layer {record.id}: {error.filename} is missing"
    except RametError as error:
        yield error.message


def _sealed(store: StoreDir, record: Layer, files: LayerDir) -> Iterator[str]:
    rows = index.read(files, record)
    wrong = rows.problems(pages=record.pages, blobs=len(record.blobs), beneath=len(record.beneath))
    yield from (f"the index of layer {record.id}: {problem}" for problem in wrong)
    source = Sealed(store, record, rows, _Nothing())
    try:
        for row in range(len(rows)):
            if rows.data[row]:
                try:
                    source.frame(row)
                except AbsentError:
                    want = rows.want(row, record.blobs)
                    if is_spoilt(store, want):
                        what = f"layer {record.id}, chunk {rows.chunk[row]}: blob {want.blob} is damaged at {want.offset}"
                        yield f"{what}: the frame does not match its digest; it can be fetched again"
                except RametError as error:
                    yield error.message
    finally:
        source.close()


def is_spoilt(store: StoreDir, want: Want) -> bool:
    """Whether a frame of a remote blob that does not match its mark is damaged: it was written, for there is no hole in it. Else it only is not here."""
    path = store.blob(want.blob)
    with disk.guard("read", path):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            end = want.offset + want.length
            # A block has parts of two frames where they meet, and is no hole when one of them is here: the other's part is zeros then.
            if [*remote.held(fd, want.offset, end)] != [(want.offset, end)]:
                return False
            frame = os.pread(fd, want.length, want.offset)  # after that, for it may just be coming
            return any(frame) and index.mark_of(frame) != want.mark
        finally:
            os.close(fd)


def _spool(record: Layer, files: LayerDir) -> list[str]:
    """Raises what is wrong; nothing else can be told of a spool."""
    runs = spool_runs(files, record)
    source = Spool(runs, files.spool, f"the spool of layer {record.id}", length=record.spool_bytes)
    try:
        for _, count, where in runs:
            for start in range(0, 0 if where == ZERO else count, _BLOCK):
                source.pages(where + start, min(_BLOCK, count - start))
        return []
    finally:
        source.release()


def _blob(store: StoreDir, digest: str, users: list[str]) -> Iterator[str]:
    path = store.blob(digest)
    what = f"blob {path.name}, of layer {', '.join(sorted(users))},"
    try:
        kept = remote.load(store, digest)
        if (kept is None or kept.whole) and blob.digest(path) != digest:
            yield f"{what} is damaged: its content does not match its name"
    except RametError as error:
        yield f"{what} is missing" if not path.exists() else error.message


def _reads(store: StoreDir, layer_id: str) -> Iterator[str]:
    """What only a read finds: tables that are whole, but do not fit together."""
    try:
        with Chain.open(store, layer_id) as chain:
            for offset in range(0, chain.size, _BLOCK * PAGE):
                with contextlib.suppress(AbsentError):
                    chain.read(offset, _BLOCK * PAGE)
    except RametError as error:
        yield error.message


class _Nothing(Spool):
    """What lies below a layer, when only its own frames are looked at."""

    def __init__(self) -> None:
        super().__init__(Runs.build(()), Path(os.devnull), "nothing", length=0)
