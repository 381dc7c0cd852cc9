"""How a layer that was made elsewhere becomes one of this host's: its tables are published, its blobs are places to be filled."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping

from ramet import locks
from ramet.errors import BusyError, LayerError, NotFoundError
from ramet.paths import StoreDir
from ramet.store import disk, layer, remote
from ramet.store.index import Index
from ramet.store.layer import Layer
from ramet.store.remote import Source
from ramet.store.runs import Owners
from ramet.store.store import Store


def here(files: StoreDir, layer_id: str, origin: str) -> Layer | None:
    """The layer, where this host has it already. LayerError when it is damaged, or another one has its id."""
    try:
        found = layer.load(files.layer(layer_id), layer_id)
    except NotFoundError:
        return None
    if found.origin != origin:
        raise LayerError(
            f"layer {layer_id} is another than the one of that id in the registry, {origin}", hint="`ramet fsck` checks the store."
        )
    return found


def admit(store: Store, record: Layer, owners: Owners, index: Index, sizes: Mapping[str, int], source: Source) -> Layer:
    """Publish a layer whose tables were verified, or leave the one that is here; in both cases its blobs have places, and are to be had from `source` too.

    On the disk when this returns. sizes: bytes of its blobs, by digest. The caller keeps it from being collected until somebody names it.
    LayerError, NoSpaceError, HostError: nothing is published.
    """
    files = store.files
    with store.referring():  # else a collection could take the place of a blob before a record names it
        for digest in record.blobs:
            _same_size(files, digest, sizes[digest])
            remote.expect(files, digest, sizes[digest], source)
        found = here(files, record.id, record.origin)
        if not found:
            _publish(files, record, owners, index)
    return found or record


def _publish(files: StoreDir, record: Layer, owners: Owners, index: Index) -> None:
    draft = files.draft(record.id)
    with disk.guard("write", draft.root):
        draft.root.mkdir(mode=0o700, exist_ok=True)  # what a crash has left is filled anew
    lock = locks.try_lock(draft.root, patience=locks.GLANCE)
    if lock is None:
        raise BusyError(f"layer {record.id} is being pulled by another", hint="Try again in a moment.")
    try:
        disk.replace(layer.owners_file(draft, record), owners.dump(), durable=True)
        disk.replace(layer.index_file(draft, record), index.dump(), durable=True)
        layer.save(draft, record, durable=True)
        with disk.guard("write", files.layers):
            draft.root.rename(files.layer(record.id).root)
        disk.sync(files.layers)
    except BaseException:
        shutil.rmtree(draft.root, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _same_size(files: StoreDir, digest: str, size: int) -> None:
    """A blob that is here must not be cut to the length that a stranger says."""
    with contextlib.suppress(FileNotFoundError):
        known = remote.load(files, digest)
        found = known.size if known else files.blob(digest).stat().st_size
        if found != size:
            raise LayerError(f"blob {digest} has {found} bytes here, and the registry says {size}: one of them is damaged")
