"""What should be: machines, in SQLite (WAL) through SQLAlchemy, the schema by alembic migrations. Every change is on disk when its method returns."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import alembic.command
import alembic.config
import sqlalchemy as sa
from pydantic import TypeAdapter
from sqlalchemy.exc import DatabaseError, IntegrityError

from ramet.errors import ExistsError, HostError, NoSpaceError
from ramet.model import Accelerator, Snapshot, Spec, State
from ramet.records import dump

T = TypeVar("T")
R = TypeVar("R", "Record", Snapshot)
_SHARED = 32 << 10  # bytes that the index of a write-ahead log takes (https://sqlite.org/walformat.html)
_METADATA = sa.MetaData()
MACHINES = sa.Table(
    "machines",
    _METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("name", sa.String, nullable=False, unique=True),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("image_digest", sa.String, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("started_at", sa.Float),
    sa.Column("boot_time", sa.Float),
    sa.Column("initialised", sa.Boolean, nullable=False),
    sa.Column("accelerator", sa.String),
    sa.Column("kernel", sa.String, nullable=False),
    sa.Column("source_id", sa.String, nullable=False),
    sa.Column("snapshot_id", sa.String, nullable=False),
    sa.Column("memory_layer", sa.String, nullable=False),
    sa.Column("pool", sa.String, nullable=False),
    sa.Column("memory_limit", sa.Integer, nullable=False),
)
SNAPSHOTS = sa.Table(
    "snapshots",
    _METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("machine", sa.String, nullable=False),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("memory", sa.Boolean, nullable=False),
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("parent", sa.String, nullable=False),
    sa.Column("image_digest", sa.String, nullable=False),
    sa.Column("disk_layer", sa.String, nullable=False),
    sa.Column("memory_layer", sa.String, nullable=False),
    sa.Column("template", sa.Boolean, nullable=False),
    sa.Column("pool", sa.Integer, nullable=False),
    sa.Column("pause", sa.Float),
    sa.Column("saved", sa.Integer, nullable=False),
    sa.Column("slimmed", sa.Integer, nullable=False),
    sa.Column("memory_limit", sa.Integer, nullable=False),
    sa.Column("drive_layers", sa.Text, nullable=False),
    sa.Column("origin", sa.Text, nullable=False),
    sa.Column("compatibility", sa.Text),
    sa.Index("snapshots_name", "name", unique=True, sqlite_where=sa.text("name != ''")),  # the automatic ones have none
)


@dataclass(frozen=True, kw_only=True)
class Record:
    """A machine as the database knows it.

    initialised: its lifecycle's create command has run; boot_time: seconds. source_id: the snapshot that it was made from, or empty.
    snapshot_id: the one that it last came from or was saved as. memory_layer: what its running memory maps, or empty. pool: id of the
    snapshot that it is parked for, until it is claimed. memory_limit: bytes that its balloon is to leave it, 0: all.
    """

    id: str
    name: str
    state: State
    spec: Spec
    created_at: float
    image_digest: str = ""
    reason: str = ""
    started_at: float | None = None
    boot_time: float | None = None
    initialised: bool = False
    accelerator: Accelerator | None = None
    kernel: str = ""
    source_id: str = ""
    snapshot_id: str = ""
    memory_layer: str = ""
    pool: str = ""
    memory_limit: int = 0


_MACHINE: TypeAdapter[Record] = TypeAdapter(Record)
_SNAPSHOT: TypeAdapter[Snapshot] = TypeAdapter(Snapshot)


def _to_row(table: sa.Table, record: Any) -> dict[str, Any]:
    """A record's columns; records and tuples inside it as JSON."""
    values = {column.name: getattr(record, column.name) for column in table.columns}
    nested = {name: dataclasses.is_dataclass(value) or isinstance(value, tuple) for name, value in values.items()}
    return {name: json.dumps(dump(value)) if nested[name] else value for name, value in values.items()}


def _from_row(adapter: TypeAdapter[R], row: sa.RowMapping) -> R:
    values = dict(row)
    for name in ("spec", "compatibility", "drive_layers"):
        if isinstance(values.get(name), str):
            values[name] = json.loads(values[name])
    return adapter.validate_python(values, strict=False)


def _migrate(url: str) -> None:
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    alembic.command.upgrade(config, "head")


class Database:
    """One thread does all the work, in order; the event loop never waits for a disk."""

    def __init__(self, engine: sa.Engine, worker: ThreadPoolExecutor, place: Path) -> None:
        self._engine = engine
        self._worker = worker
        self._place = place

    @classmethod
    @asynccontextmanager
    async def open(cls, path: Path) -> AsyncIterator[Database]:
        """Open (and migrate) the database file. HostError when it cannot be used."""
        url = f"sqlite:///{path}"
        engine = sa.create_engine(url)

        @sa.event.listens_for(engine, "connect")
        def pragmas(connection: Any, _: Any) -> None:
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
                connection.execute(f"PRAGMA {pragma}")

        worker = ThreadPoolExecutor(1, thread_name_prefix="database")
        database = cls(engine, worker, path.parent)
        try:
            await database._in_worker(lambda: _migrate(url))
            yield database
        finally:
            worker.shutdown(wait=True)
            engine.dispose()

    async def _in_worker(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, work)
        except IntegrityError as error:
            raise ExistsError(
                "a machine or snapshot of that name exists already", hint="`ramet list` and `ramet snapshots` show it."
            ) from error
        except DatabaseError as error:
            # Where there is none for the file that readers of a WAL share, SQLite calls it an I/O error.
            if "full" in str(error.orig) or shutil.disk_usage(self._place).free < _SHARED:
                raise NoSpaceError("the database cannot be written: no space left on the disk") from error
            raise HostError(f"the database cannot be used: {error.orig}") from error

    async def _write(self, *statements: sa.Executable) -> None:
        """All of them, or none."""

        def work() -> None:
            with self._engine.begin() as connection:
                for statement in statements:
                    connection.execute(statement)

        await self._in_worker(work)

    async def insert(self, record: Record) -> None:
        """ExistsError when the name is taken."""
        await self._write(MACHINES.insert().values(_to_row(MACHINES, record)))

    async def update(self, record: Record) -> None:
        await self._write(_update(MACHINES, record))

    async def delete(self, machine_id: str) -> None:
        await self._write(MACHINES.delete().where(MACHINES.c.id == machine_id))

    async def machines(self) -> list[Record]:
        """All, oldest first."""
        return await self._all(_MACHINE, MACHINES)

    async def problems(self) -> list[str]:
        """What SQLite finds wrong with the file, a sentence each."""

        def work() -> list[str]:
            with self._engine.connect() as connection:
                return [str(line) for (line,) in connection.execute(sa.text("PRAGMA integrity_check")) if line != "ok"]

        try:
            return [f"the database is damaged: {line}; restore it from a copy" for line in await self._in_worker(work)]
        except HostError as error:
            return [error.message]

    async def add_snapshot(self, snapshot: Snapshot, machine: Record | None) -> None:
        """A new snapshot, together with what it changes of the machine. ExistsError when its name is taken."""
        changes = [_update(MACHINES, machine)] if machine else []
        await self._write(SNAPSHOTS.insert().values(_to_row(SNAPSHOTS, snapshot)), *changes)

    async def update_snapshot(self, snapshot: Snapshot) -> None:
        await self._write(_update(SNAPSHOTS, snapshot))

    async def delete_snapshot(self, snapshot_id: str) -> None:
        await self._write(SNAPSHOTS.delete().where(SNAPSHOTS.c.id == snapshot_id))

    async def snapshots(self) -> list[Snapshot]:
        """All, oldest first."""
        return await self._all(_SNAPSHOT, SNAPSHOTS)

    async def _all(self, adapter: TypeAdapter[R], table: sa.Table) -> list[R]:
        def work() -> list[R]:
            with self._engine.connect() as connection:
                return [_from_row(adapter, row) for row in connection.execute(table.select().order_by(table.c.created_at)).mappings()]

        return await self._in_worker(work)


def _update(table: sa.Table, record: Any) -> sa.Executable:
    return table.update().where(table.c.id == record.id).values(_to_row(table, record))
