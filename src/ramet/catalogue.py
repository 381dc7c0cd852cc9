"""The snapshots of this host, by id: in memory as in the database."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from ramet.db import Database
from ramet.errors import NotFoundError
from ramet.model import Snapshot


class Catalogue(dict[str, Snapshot]):
    """Changes are made one after the other: what two change at the same time is both changed, and what was forgotten does not come back."""

    def __init__(self, database: Database) -> None:
        super().__init__()
        self._db = database
        self._changing = asyncio.Lock()

    async def change(self, snapshot_id: str, **changes: Any) -> Snapshot:
        """Change a record: on disk first, then in memory. NotFoundError when it has been forgotten meanwhile."""
        async with self._changing:
            return await self._change(snapshot_id, **changes)

    async def forget(self, found: Snapshot) -> None:
        """Take a snapshot out of the records; those that stood on it stand on what it stood on."""
        async with self._changing:
            for each in list(self.values()):
                if each.parent == found.id:
                    await self._change(each.id, parent=found.parent)
            await self._db.delete_snapshot(found.id)
            self.pop(found.id, None)

    async def _change(self, snapshot_id: str, **changes: Any) -> Snapshot:
        if snapshot_id not in self:
            raise NotFoundError(f"the snapshot {snapshot_id} has just been deleted", hint="`ramet snapshots` shows those there are.")
        changed = dataclasses.replace(self[snapshot_id], **changes)
        await self._db.update_snapshot(changed)
        self[snapshot_id] = changed
        return changed
