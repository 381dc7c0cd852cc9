"""A host's layers: drafts, publishing, sealing, and what is asked of them.

Everything is staged, then renamed: a crash leaves the old or the new, and what `gc` removes.

Locks, all by flock, so that they end with their holder:
a draft's directory, also after it is published, until its maker has written down that it exists;
a spool's `runs`, while it is sealed or made durable;
the directory of blobs, shared by those who refer to blobs that no record names yet, alone by one who removes blobs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ramet import locks
from ramet.errors import BusyError, LayerError, SpecError
from ramet.paths import LayerDir, StoreDir
from ramet.store import disk, garbage, layer, sealing, verify
from ramet.store.blob import Writer
from ramet.store.chain import Chain, Locate, published, read_owners, spool_runs
from ramet.store.garbage import Freed
from ramet.store.layer import PAGE, Kind, Layer
from ramet.store.runs import ZERO, Owners, Runs
from ramet.store.sealing import Progress
from ramet.store.source import Spool, is_hole

_BLOCK = 1 << 20
_NAP = 0.02
_GLANCE = 0.2  # seconds after which a lock is somebody's, and not only looked at
_PATIENCE = 300.0  # seconds that somebody who needs a layer on the disk waits for another who seals it
_TAIL = 1 << 16  # bytes by which a file may end before its last page does: a cluster of a qcow2 file


class Draft:
    """A layer that is being made: fill `spool`, then publish it.

    Leave the body when others know of the layer: until then `gc` takes neither it nor its parent.
    """

    def __init__(self, files: LayerDir, record: Layer, lock: int) -> None:
        self.files = files
        self.layer = record
        self._lock = lock

    @property
    def id(self) -> str:
        return self.layer.id

    @property
    def spool(self) -> Path:
        return self.files.spool

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go: what was not published is removed."""
        if self._lock >= 0:
            shutil.rmtree(self.files.root, ignore_errors=True)  # a published one has another name by now
            os.close(self._lock)
            self._lock = -1


def _no_step(name: str) -> None:
    pass


class Store:
    """The layers below one directory; several processes may use it at once.

    step: called with the name of each step before it is done, for tests to fail there.
    """

    def __init__(self, files: StoreDir, *, step: Callable[[str], None] = _no_step) -> None:
        self.files = files
        self._step = step

    def draft(self, kind: Kind, size: int, parent: str = "", base: str = "") -> Draft:
        """Begin a layer. SpecError when what it is to stand on does not fit, LayerError when that is missing or damaged.

        parent: what it is a difference of, which the caller keeps from being removed. base: for the first layer of a disk, the raw image
        below it, relative to the state directory.
        """
        if parent:
            above = layer.published(self.files, parent)
            if (above.kind, above.size) != (kind, size):
                raise SpecError(f"a {kind} of {size} bytes cannot stand on layer {parent}: that is a {above.kind} of {above.size} bytes")
            base = base or above.base
            if base != above.base:
                raise SpecError(f"layer {parent} stands on {above.base or 'nothing'}, not on {base}")
        if problem := layer.base_problem(base):
            raise SpecError(f"{base}: {problem}")
        if base and kind is not Kind.DISK:
            raise SpecError("only a disk has a base image")
        if not 0 < size <= layer.MAX_PAGES * PAGE:
            raise SpecError(f"a layer cannot have {size} bytes")
        while True:
            record = Layer(id=layer.new_id(), kind=kind, size=size, created_at=time.time(), parent=parent, base=base)
            files = self.files.draft(record.id)
            with disk.guard("write", files.root):
                files.root.mkdir(mode=0o700)
            lock = locks.try_lock(files.root)
            if lock is not None:  # else a gc took it for abandoned, in the instant before it was locked
                break
        draft = Draft(files, record, lock)
        try:
            layer.save(files, record, durable=False)
        except BaseException:
            draft.close()
            raise
        return draft

    def publish(self, draft: Draft, runs: Runs, *, durable: bool) -> Layer:
        """Make a filled draft a layer. LayerError, NoSpaceError, HostError: nothing is published.

        runs: which pages its spool holds, and where in it. durable: it is on the disk, and all it stands on, when this returns; else it is
        lost, and known to be lost, when the host goes down before it is sealed.
        """
        record, files = draft.layer, draft.files
        length = files.spool.stat().st_size if files.spool.exists() else 0
        _check(record, runs, length)
        if durable:
            self._settle_below(record)
        owners, chain = self._owners(record, runs)
        data, zero = runs.pages()
        record = dataclasses.replace(
            record,
            chain=chain,
            spool_bytes=length,
            data_bytes=data * PAGE,
            zero_bytes=zero * PAGE,
            stored_bytes=disk.allocated(files.spool),
            boot="" if durable else layer.this_boot(),
        )
        self._step("publish files")
        if durable and length:
            disk.sync(files.spool)
        if not length:
            files.spool.touch(mode=0o600)
        disk.replace(files.runs, runs.dump(), durable=durable)
        disk.replace(files.owners, owners.dump(), durable=durable)
        layer.save(files, record, durable=durable)
        self._publish(draft, durable=durable)
        return record

    def publish_sealed(self, draft: Draft, fd: int, runs: Runs, progress: Progress | None = None) -> Layer:
        """Make a draft a sealed layer at once, from the pages of an open file, whose places the runs tell: no spool is written.

        On the disk when this returns, with all it stands on. Errors as of `publish`.
        """
        record, files = draft.layer, draft.files
        if runs.end > record.pages:
            raise LayerError(f"layer {record.id} has {record.pages} pages, and its runs {runs.end}")
        source = Spool(runs, Path(f"/proc/self/fd/{fd}"), f"what layer {record.id} is made from", length=1 << 63, fd=fd)
        with self._referring():
            self._settle_below(record)
            record, kept = self._seal(record, files, source, progress)
            owners, chain = self._owners(record, kept)
            record = dataclasses.replace(record, chain=chain)
            disk.replace(files.owners, owners.dump(), durable=True)
            self._verified(record, files, source)
            layer.save(files, record, durable=True)
            self._publish(draft, durable=True)
        return record

    def seal(self, layer_id: str, progress: Progress | None = None) -> Layer:
        """Compress a layer's spool into a blob, and delete the spool; a sealed layer stays as it is. BusyError while another seals it.

        NoSpaceError, HostError, LayerError: it is as it was.
        """
        files = self.files.layer(layer_id)
        with self._spool_lock(layer_id) as locked, self._referring():
            record = layer.published(self.files, layer_id)
            if not record.sealed and locked:
                record = self._seal_spool(record, files, progress)
                self._step("seal spool")
            if record.sealed:
                _drop_spool(files)
        if progress:
            progress(1.0)
        return record

    def get(self, layer_id: str) -> Layer:
        """A layer's record. NotFoundError, LayerError."""
        return layer.load(self.files.layer(layer_id), layer_id)

    def layers(self) -> list[Layer]:
        """The published layers, oldest first, without those whose record is damaged: `verify` names them."""
        return garbage.readable(self.files)

    def verify(self, layer_id: str) -> list[str]:
        """Read the layer and all it stands on, every chunk and every blob: what is wrong, each with its layer, chunk and blob."""
        return verify.problems(self.files, layer_id)

    def export(self, layer_id: str, out: BinaryIO | int, progress: Progress | None = None) -> None:
        """Write the raw image: sparse into a file (empty, or new), with all its zeros into a pipe."""
        fd = out if isinstance(out, int) else out.fileno()
        name = Path(f"/proc/self/fd/{fd}")
        with Chain.open(self.files, layer_id) as chain:
            with disk.guard("write", name):
                sparse = _seekable(fd)
            for offset in range(0, chain.size, _BLOCK):
                parts = chain.read(offset, _BLOCK)
                with disk.guard("write", name):
                    for part in parts:
                        if sparse and is_hole(part):
                            os.lseek(fd, len(part), os.SEEK_CUR)
                        else:
                            disk.write_all(fd, part)
                if progress:
                    progress(min(1.0, (offset + _BLOCK) / chain.size))
            if sparse:
                with disk.guard("write", name):
                    os.ftruncate(fd, chain.size)

    def gc(self, keep: Iterable[str] | Callable[[], Iterable[str]]) -> Freed:
        """Remove the layers that neither are named nor needed by one that is, what was abandoned half-made, and the blobs that no layer refers to.

        keep: a function is asked after the layers were listed, so that what is published while it thinks is not taken; what it names for others to keep
        must be on record before its draft is let go.
        """
        return garbage.collect(self.files, keep, self._step)

    # How layers come to be

    def _owners(self, record: Layer, runs: Runs) -> tuple[Owners, tuple[str, ...]]:
        chain: list[str] = []
        owners = Owners.nobody(record.pages)
        if record.parent:
            above = layer.published(self.files, record.parent)
            chain = list(above.chain)
            owners = read_owners(self.files.layer(above.id), above)
        chain.append(record.id)
        return owners.overlay(runs, len(chain), based=bool(record.base)).compact(chain)

    def _publish(self, draft: Draft, *, durable: bool) -> None:
        self._step("publish rename")
        with disk.guard("write", self.files.layers):
            draft.files.root.rename(self.files.layer(draft.id).root)
        if durable:
            try:
                disk.sync(self.files.layers)
            except BaseException:
                self.files.layer(draft.id).root.rename(draft.files.root)
                raise

    def _seal_spool(self, record: Layer, files: LayerDir, progress: Progress | None) -> Layer:
        try:
            runs = spool_runs(files, record)
            source = Spool(runs, files.spool, f"the spool of layer {record.id}", length=record.spool_bytes)
            try:
                record, _ = self._seal(record, files, source, progress)
                self._verified(record, files, source)
            finally:
                source.release()
        except FileNotFoundError as error:
            raise LayerError(f"layer {record.id} cannot be sealed: {error.filename} is missing") from error
        self._step("seal record")
        layer.save(files, record, durable=True)
        return record

    def _seal(self, record: Layer, files: LayerDir, source: Spool, progress: Progress | None) -> tuple[Layer, Runs]:
        """Write the index and the blob. The record that will name them, and the pages that they answer for."""
        self._step("seal pages")
        with contextlib.ExitStack() as stack:
            frames = stack.enter_context(sealing.known(self.files, self.layers()))
            below = self._below(record)
            if below:
                stack.enter_context(below)
            writer = stack.enter_context(Writer(self.files.blobs))
            made = sealing.Sealer(writer, frames, below, based=bool(record.base)).run(source, progress)
            if not record.chain:
                made = made.without_moves()  # nobody stands on it yet: what it does not hold will be said to be others'
            self._step("seal index")
            content = made.index.dump()
            disk.replace(files.index, content, durable=True)
            self._step("seal blob")
            writer.publish()
        data, zero = made.index.pages()
        record = dataclasses.replace(
            record,
            sealed=True,
            blobs=made.blobs,
            beneath=made.beneath,
            index_digest=f"sha256:{hashlib.sha256(content).hexdigest()}",
            spool_bytes=0,
            data_bytes=data * PAGE,
            zero_bytes=zero * PAGE,
            stored_bytes=made.stored + len(content),
            boot="",
        )
        return record, made.kept

    def _below(self, record: Layer) -> Chain | None:
        if not record.parent:
            return Chain.bottom(self.files, record)
        try:
            return Chain.open(self.files, record.parent)
        except LayerError:
            return None  # removed or damaged: the layer has all that is its own

    def _verified(self, record: Layer, files: LayerDir, source: Spool) -> None:
        """LayerError unless the layer reads as its source does, when `record` is its record."""
        others = published(self.files)
        locate: Locate = lambda name: (record, files) if name == record.id else others(name)  # noqa: E731
        self._step("seal read back")
        with Chain.open(self.files, record.id, locate) as chain:
            sealing.read_back(chain, source)

    # What is on the disk

    def settle(self, layer_id: str) -> None:
        """Put a published layer on the disk, and all it stands on."""
        self._settle_all(list(layer.published(self.files, layer_id).chain))

    def _settle_below(self, record: Layer) -> None:
        if record.parent:
            self.settle(record.parent)

    def _settle_all(self, waiting: list[str]) -> None:
        settled: set[str] = set()
        while waiting:
            name = waiting.pop()
            if name not in settled:
                settled.add(name)
                waiting += self._settle(name).beneath

    def _settle(self, layer_id: str) -> Layer:
        files = self.files.layer(layer_id)
        while (record := layer.published(self.files, layer_id)).boot:
            # Whoever seals it puts it on the disk as well.
            with self._spool_lock(layer_id, patience=_PATIENCE) as locked:
                record = layer.published(self.files, layer_id)
                if locked and record.boot:
                    for path in (files.spool, files.runs, files.owners):
                        disk.sync(path)
                    layer.save(files, dataclasses.replace(record, boot=""), durable=True)
                    disk.sync(self.files.layers)
        return record

    @contextlib.contextmanager
    def _spool_lock(self, layer_id: str, patience: float = _GLANCE) -> Iterator[bool]:
        """Keep others from sealing the layer in the body. False when there is no spool: it is sealed.

        BusyError when another has it for longer than `patience` seconds.
        """
        path = self.files.layer(layer_id).runs
        deadline = time.monotonic() + patience
        while (lock := locks.try_lock(path)) is None and path.exists():
            if time.monotonic() > deadline:
                raise BusyError(f"layer {layer_id} is being sealed", hint="Try again in a moment.")
            time.sleep(_NAP)  # flock has no event that comes with a deadline
        try:
            yield lock is not None
        finally:
            if lock is not None:
                os.close(lock)

    @contextlib.contextmanager
    def _referring(self) -> Iterator[None]:
        """Nobody removes a blob in the body. Waits for one who does, which is a matter of unlinking files."""
        with disk.guard("read", self.files.blobs):
            fd = os.open(self.files.blobs, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            yield
        finally:
            os.close(fd)


def _check(record: Layer, runs: Runs, length: int) -> None:
    """LayerError for runs that the layer or its spool do not have room for."""
    if runs.end > record.pages:
        raise LayerError(f"layer {record.id} has {record.pages} pages, and its runs {runs.end}")
    for first, count, where in runs:
        if where != ZERO and (where * PAGE >= length or (where + count) * PAGE > length + _TAIL):
            raise LayerError(f"the spool of layer {record.id} has {length} bytes: the {count} pages from {first} are not in it")


def _drop_spool(files: LayerDir) -> None:
    # The runs last: as long as they are there, whoever seals again knows that something may be left.
    with disk.guard("remove", files.spool):
        files.spool.unlink(missing_ok=True)
        files.runs.unlink(missing_ok=True)


def _seekable(fd: int) -> bool:
    try:
        os.lseek(fd, 0, os.SEEK_CUR)
    except OSError as error:
        if error.errno == errno.ESPIPE:
            return False
        raise
    return True
