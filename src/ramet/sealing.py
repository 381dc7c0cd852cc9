"""What is done to a snapshot after its machine runs again: compressing and hashing, in a process of its own, one at a time, then a first start to prove it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Sequence

from ramet import process, restoring
from ramet.errors import LayerError, RametError, from_wire
from ramet.model import Snapshot, SnapshotState
from ramet.operations import Operations, log

_DEADLINE = 3600.0  # seconds for the layers of one snapshot
_NICE = 15  # machines come first


class Sealer:
    """A queue with one worker. done: told of each snapshot that became ready."""

    def __init__(self, ops: Operations, done: Callable[[Snapshot], None]) -> None:
        self._ops = ops
        self._done = done
        self._queue: asyncio.Queue[tuple[str, bool]] = asyncio.Queue()
        self._again: set[str] = set()
        self._worker: asyncio.Task[None] | None = None

    def add(self, snapshot: Snapshot, *, test: bool) -> None:
        """test: start it once before it is ready."""
        self._queue.put_nowait((snapshot.id, test))
        if self._worker is None or self._worker.done():
            self._worker = self._ops.spawn(self._work())

    async def _work(self) -> None:
        while not self._queue.empty():
            snapshot_id, test = self._queue.get_nowait()
            try:
                await self._seal(snapshot_id, test)
            except RametError as error:
                log.error("snapshot %s: %s", snapshot_id, error.message)
            if self._queue.empty():
                await self._ops.collect()  # a sealed layer needs less than it did before

    async def _seal(self, snapshot_id: str, test: bool) -> None:
        found = self._ops.snapshots.get(snapshot_id)
        if found is None or found.state is SnapshotState.BROKEN:  # what its test found stays true once it can be compressed
            return
        reason = ""
        try:
            async with self._ops.layers_in_use():
                await self.compress(found.layers)
        except LayerError as error:
            reason = error.message
        except RametError as error:  # it is whole all the same
            log.warning("%s stays uncompressed for now: %s", found.title, error.message)
            self._again.add(snapshot_id)
        else:
            for each in self._again - {snapshot_id}:  # what stood in the way of others may be gone too
                self._queue.put_nowait((each, False))
            self._again.clear()
        if snapshot_id not in self._ops.snapshots:
            return
        if test and found.memory and not reason:
            await self._ops.snapshots.change(snapshot_id, state=SnapshotState.TESTING)
            reason = await restoring.test(self._ops, found)
            if reason:
                log.warning("%s did not pass its test: %s", found.title, reason)
        if snapshot_id in self._ops.snapshots:
            state = SnapshotState.BROKEN if reason else SnapshotState.READY
            self._done(await self._ops.snapshots.change(snapshot_id, state=state, reason=reason))

    async def compress(
        self,
        layers: Sequence[str],
        *,
        thorough: bool = False,
        progress: Callable[[float], None] = lambda done: None,
        what: str = "compressing a snapshot",
    ) -> None:
        """Seal layers, those that others stand on first; one that is sealed may be so anew.

        Small ancestors that nothing names directly give up their pages to these, so that chains do not grow with each generation.
        thorough: of those that nobody else needs also larger ones, where much of them is not read any more.
        """
        store, needed = self._ops.store, self._ops.needed_layers()

        def adoptable() -> set[str]:
            return {old for layer in layers for old in store.adoptable(layer, needed, shared=not thorough)}

        def said(line: str) -> None:
            layer, _, fraction = line.partition(" ")
            if layer in layers:
                progress((layers.index(layer) + float(fraction)) / len(layers))

        adopt = await asyncio.to_thread(adoptable)
        words = [sys.executable, "-P", "-m", "ramet.store.seal", str(store.files.root), *layers]
        words += [word for old in sorted(adopt) for word in ("--adopt", old)] + (["--thorough"] if thorough else [])
        finished = await process.run(words, deadline=_DEADLINE, nice=_NICE, on_line=said)
        if finished.returncode:
            with contextlib.suppress(ValueError, IndexError):
                raise from_wire(json.loads(finished.output.strip().splitlines()[-1]))
            finished.check(what)
