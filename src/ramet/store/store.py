"""A host's layers: drafts, publishing, sealing, and what is asked of them.

Everything is staged, then renamed: a crash leaves the old or the new, and what `gc` removes.

Locks, all by flock, so that they end with their holder:
a draft's directory, also after it is published, until its maker has written down that it exists;
a spool's `runs`, while it is sealed or made durable; a sealed layer's index, while it is sealed anew;
the directory of blobs, shared by those who refer to blobs that no record names yet, alone by one who removes blobs;
a blob that can be fetched, shared by those who fetch and verify all of it, alone by one who gives up chunks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ramet import locks
from ramet.errors import BusyError, HostError, LayerError, SpecError
from ramet.paths import LayerDir, StoreDir
from ramet.store import disk, eviction, garbage, layer, sealing, tracing, verify
from ramet.store.adoption import LARGEST, Adoption, fetched
from ramet.store.blob import Writer
from ramet.store.chain import Chain, Fetch, Locate, published, published_owners, spool_runs
from ramet.store.eviction import Evicted
from ramet.store.garbage import Freed
from ramet.store.layer import PAGE, Kind, Layer
from ramet.store.runs import ZERO, Owners, Runs
from ramet.store.sealing import Pages, Progress
from ramet.store.source import Spool, is_hole

_BLOCK = 1 << 20
_NAP = 0.02
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

        parent: what it is a difference of, which the caller keeps from being removed. base: for the first layer of a disk what is below it, as in its
        record; the caller keeps that too.
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
        if name := base.removeprefix(layer.BASE_LAYER) if base.startswith(layer.BASE_LAYER) else "":
            below = layer.published(self.files, name)
            if below.kind is not Kind.DISK or below.base or not below.sealed:
                raise SpecError(f"layer {name} cannot be a base: that is a sealed disk without one")
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
        owners, chain = self._owners(record, files, runs)
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
        with self.referring():
            self._settle_below(record)
            record, kept = self._seal(record, files, source, progress)
            owners, chain = self._owners(record, files, kept)
            record = dataclasses.replace(record, chain=chain)
            disk.replace(files.owners, owners.dump(), durable=True)
            self._verified(record, files, source, None)
            layer.save(files, record, durable=True)
            self._publish(draft, durable=True)
        return record

    def seal(self, layer_id: str, progress: Progress | None = None, *, adopt: Collection[str] = (), thorough: bool = False) -> Layer:
        """Compress a layer's spool into a blob, and delete the spool; a sealed layer stays as it is. BusyError while another seals it.

        adopt: layers, of which those in its chain become superfluous to it: it takes over the pages that come from them, unless they are more than
        `adoption.LARGEST`, and is sealed anew for that when it is sealed already. thorough: also more, where that frees enough of what the other has.
        NoSpaceError, HostError, LayerError: it is as it was.
        """
        files = self.files.layer(layer_id)
        record = layer.published(self.files, layer_id)
        if adopt or not record.sealed:
            with self._seal_lock(layer_id) as record, self.referring():
                if adopt or not record.sealed:
                    adopting = Adoption(self.files, record, adopt, thorough=thorough) if adopt else None
                    record = self._seal_anew(record, files, progress, adopting)
                    self._step("seal spool")
        _drop_old(files, record)
        if progress:
            progress(1.0)
        return record

    def adoptable(self, layer_id: str, keep: Iterable[str], *, shared: bool = False) -> list[str]:
        """The layers that are there only because this one needs their pages, for `seal` to adopt; it reads no more records than it must.

        keep: the layers that are to stay, this one among them or not. shared: also those that others of `keep` need. They go when all of these have adopted
        them or are gone, so a chain does not grow either when a parent is deleted after its child was sealed; until then small ones are there twice.
        """
        records = garbage.Records(self.files)
        others = set(keep) - {layer_id}
        found = records.get(layer_id)
        below = garbage.needed(records, found.chain, whole=False) if found and not fetched(self.files, found) else set()
        elsewhere = others if shared else garbage.needed(records, others)
        alone = below - elsewhere - {layer_id}
        return sorted(name for name in alone if name not in records or not fetched(self.files, records[name]))

    def get(self, layer_id: str) -> Layer:
        """A layer's record. NotFoundError, LayerError."""
        return layer.load(self.files.layer(layer_id), layer_id)

    def layers(self) -> list[Layer]:
        """The published layers, oldest first, without those whose record is damaged: `verify` names them."""
        return garbage.readable(self.files)

    def verify(self, *layer_ids: str) -> list[str]:
        """Read layers and all they stand on, every chunk and every blob: what is wrong, each with its layer, chunk and blob."""
        return verify.problems(self.files, layer_ids)

    def export(self, layer_id: str, out: BinaryIO | int, progress: Progress | None = None, fetch: Fetch | None = None) -> None:
        """Write the raw image: sparse into a file (empty, or new), with all its zeros into a pipe. fetch: as of `Chain.open`."""
        fd = out if isinstance(out, int) else out.fileno()
        name = Path(f"/proc/self/fd/{fd}")
        with Chain.open(self.files, layer_id, fetch=fetch) as chain:
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

    def gc(self, keep: Iterable[str] | Callable[[], Iterable[str]], *, dry_run: bool = False) -> Freed:
        """Remove the layers that neither are named nor needed by one that is, what was abandoned half-made, and the blobs that no layer refers to.

        keep: a function is asked after the layers were listed, so that what is published while it thinks is not taken; what it names for others to keep
        must be on record before its draft is let go. dry_run: nothing is removed.
        """
        return garbage.collect(self.files, keep, self._step, dry_run=dry_run)

    def evict(self, excess: int, in_use: Callable[[], Iterable[str]], *, dry_run: bool = False) -> Evicted:
        """Give up so many bytes of chunks that can be fetched again, where no layer that is in use needs them; as many as there are, where that is less."""
        return eviction.evict(self.files, excess, in_use, self._step, dry_run=dry_run)

    def begin_trace(self, layer_id: str) -> None:
        """See `tracing.begin`."""
        tracing.begin(self.files, layer_id)

    def end_trace(self, layer_id: str) -> list[int]:
        """See `tracing.end`."""
        return tracing.end(self.files, layer_id)

    # How layers come to be

    def _owners(self, record: Layer, files: LayerDir, runs: Runs) -> tuple[Owners, tuple[str, ...]]:
        if not record.parent:
            return Owners.nobody(record.pages).overlay(runs, 1, based=bool(record.base)), (record.id,)
        while True:
            above, owners = published_owners(self.files, record.parent)
            chain = [*above.chain, record.id]
            owners, names = owners.overlay(runs, len(chain), based=bool(record.base)).compact(chain)
            # If the parent does without some of them by now, only this draft tells a gc that they are needed.
            layer.save(files, dataclasses.replace(record, chain=names), durable=False)
            if layer.published(self.files, above.id).tables == above.tables:
                return owners, names

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

    def _seal_anew(self, record: Layer, files: LayerDir, progress: Progress | None, adopting: Adoption | None) -> Layer:
        try:
            with contextlib.ExitStack() as stack:
                adoption = None if adopting is None else stack.enter_context(adopting)
                if record.sealed and not adoption:
                    return record
                source: Pages | None = None
                if not record.sealed:
                    runs = spool_runs(files, record)
                    source = Spool(runs, files.spool, f"the spool of layer {record.id}", length=record.spool_bytes)
                    stack.callback(source.release)
                record, _ = self._seal(record, files, source, progress, adoption or None)
                self._verified(record, files, source, adoption or None)
        except FileNotFoundError as error:
            raise LayerError(f"layer {record.id} cannot be sealed: {error.filename} is missing") from error
        self._step("seal record")
        layer.save(files, record, durable=True)
        return record

    def _seal(
        self, record: Layer, files: LayerDir, source: Pages | None, progress: Progress | None, adoption: Adoption | None = None
    ) -> tuple[Layer, Runs]:
        """Write the index and the blob. The record that will name them, and the pages that they answer for. source: None for what is sealed already."""
        self._step("seal pages")
        adopted = adoption.adopted if adoption else frozenset()
        layers = self.layers()
        with contextlib.ExitStack() as stack:
            # What is adopted is to go, with its blobs; as is the layer's own blob, unless it would be much to write again.
            spared = {record.id} if record.data_bytes <= LARGEST else set()
            frames = stack.enter_context(sealing.known(self.files, (each for each in layers if each.id not in adopted | spared)))
            below = self._below(record) if source else None
            if below:
                stack.enter_context(below)
            writer = stack.enter_context(Writer(self.files.blobs))
            sealer = sealing.Sealer(writer, frames, below, based=bool(record.base), adopted=adopted)
            made = sealer.run([each for each in (source, adoption) if each], progress, adoption.moved() if adoption else ())
            if not record.chain:
                made = made.without_moves()  # nobody stands on it yet: what it does not hold will be said to be others'
            if adoption:
                owners, chain = adoption.owners(made)
                record = dataclasses.replace(record, tables=record.tables + 1, chain=chain)
                self._step("seal owners")
                disk.replace(layer.owners_file(files, record), owners.dump(), durable=True)
            self._step("seal index")
            content = made.index.dump()
            disk.replace(layer.index_file(files, record), content, durable=True)
            self._step("seal blob")
            writer.publish()
        return _sealed(record, made, content, self._kept_blobs(record, made, layers)), made.kept

    def _kept_blobs(self, record: Layer, made: sealing.Sealing, layers: Iterable[Layer]) -> int:
        """Bytes of the blobs that the layer had to itself before it was sealed anew, and still has."""
        shared = {digest for each in layers if each.id != record.id for digest in each.blobs}
        return sum(disk.allocated(self.files.blob(digest)) for digest in made.blobs if digest in record.blobs and digest not in shared)

    def _below(self, record: Layer) -> Chain | None:
        if not record.parent:
            return Chain.bottom(self.files, record)
        try:
            return Chain.open(self.files, record.parent)
        except LayerError:
            return None  # removed or damaged: the layer has all that is its own

    def _verified(self, record: Layer, files: LayerDir, source: Pages | None, adoption: Adoption | None) -> None:
        """LayerError unless the layer reads as its source does, and as before, when `record` is its record."""
        others = published(self.files)
        locate: Locate = lambda name: (record, files) if name == record.id else others(name)  # noqa: E731
        self._step("seal read back")
        with Chain.open(self.files, record.id, locate) as chain:
            if source:
                sealing.read_back(chain, source)
            if adoption:
                adoption.read_back(chain)

    # What is on the disk

    def settle(self, layer_id: str) -> None:
        """Put a published layer on the disk, and all it stands on."""
        before: dict[str, Layer] | None = None
        while True:
            seen: dict[str, Layer] = {}
            try:
                self._settle_all(layer_id, seen)
                return
            except (LayerError, HostError):
                # What one of them has adopted since may be gone: then the records say something else the next time.
                if seen == before:
                    raise
                before = seen

    def _settle_below(self, record: Layer) -> None:
        if record.parent:
            self.settle(record.parent)

    def _settle_all(self, layer_id: str, seen: dict[str, Layer]) -> None:
        waiting = list(layer.published(self.files, layer_id).chain)
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen[name] = self._settle(name)
                waiting += seen[name].beneath

    def _settle(self, layer_id: str) -> Layer:
        files = self.files.layer(layer_id)
        while (record := layer.published(self.files, layer_id)).boot:
            # Whoever seals it puts it on the disk as well.
            with self._seal_lock(layer_id, patience=_PATIENCE) as now:
                if now.boot:
                    for path in (files.spool, files.runs, layer.owners_file(files, now)):
                        disk.sync(path)
                    layer.save(files, dataclasses.replace(now, boot=""), durable=True)
                    disk.sync(self.files.layers)
        return record

    @contextlib.contextmanager
    def _seal_lock(self, layer_id: str, patience: float = locks.GLANCE) -> Iterator[Layer]:
        """Keep others from sealing the layer in the body; its record by then.

        BusyError when another has it for longer than `patience` seconds, LayerError when the file to lock is missing.
        """
        files = self.files.layer(layer_id)
        deadline = time.monotonic() + patience
        while True:
            record = layer.published(self.files, layer_id)
            path = layer.index_file(files, record) if record.sealed else files.runs
            lock = locks.try_lock(path)
            now = layer.published(self.files, layer_id)
            if lock is not None and (now.sealed, now.tables) == (record.sealed, record.tables):
                break
            if lock is not None:
                os.close(lock)
            elif now == record and not path.exists():
                raise LayerError(f"layer {layer_id} cannot be sealed: {path} is missing")
            if time.monotonic() > deadline:
                raise BusyError(f"layer {layer_id} is being sealed", hint="Try again in a moment.")
            time.sleep(_NAP)  # flock has no event that comes with a deadline
        try:
            yield now
        finally:
            os.close(lock)

    def referring(self) -> contextlib.AbstractContextManager[None]:
        """Nobody removes a blob in the body. Waits for one who does, which is a matter of unlinking files."""
        return disk.locked(self.files.blobs)


def _check(record: Layer, runs: Runs, length: int) -> None:
    """LayerError for runs that the layer or its spool do not have room for."""
    if runs.end > record.pages:
        raise LayerError(f"layer {record.id} has {record.pages} pages, and its runs {runs.end}")
    for first, count, where in runs:
        if where != ZERO and (where * PAGE >= length or (where + count) * PAGE > length + _TAIL):
            raise LayerError(f"the spool of layer {record.id} has {length} bytes: the {count} pages from {first} are not in it")


def _sealed(record: Layer, made: sealing.Sealing, content: bytes, kept: int) -> Layer:
    """The record of a layer that was sealed. content: its index. kept: bytes of its own that lie in older blobs."""
    data, zero = made.index.pages()
    return dataclasses.replace(
        record,
        sealed=True,
        blobs=made.blobs,
        beneath=made.beneath,
        index_digest=f"sha256:{hashlib.sha256(content).hexdigest()}",
        spool_bytes=0,
        data_bytes=data * PAGE,
        zero_bytes=zero * PAGE,
        stored_bytes=made.stored + kept + len(content),
        boot="",
    )


def _drop_old(files: LayerDir, record: Layer) -> None:
    """Remove what the layer was kept in before; another may be sealing it anew meanwhile: his files have other names."""
    with disk.guard("remove", files.spool):
        for path in (*layer.older_tables(files, record), files.spool, files.runs):
            path.unlink(missing_ok=True)


def _seekable(fd: int) -> bool:
    try:
        os.lseek(fd, 0, os.SEEK_CUR)
    except OSError as error:
        if error.errno == errno.ESPIPE:
            return False
        raise
    return True
