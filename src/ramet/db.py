"""What should be: machines, in SQLite (WAL) through SQLAlchemy, the schema by alembic migrations. Every change is on disk when its method returns."""

from __future__ import annotations

import asyncio
import dataclasses
import json
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
from ramet.model import Accelerator, Spec, State

T = TypeVar("T")
_SPEC = TypeAdapter(Spec)
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
)


@dataclass(frozen=True, kw_only=True)
class Record:
    """A machine as the database knows it. initialised: its lifecycle's create command has run; boot_time: seconds."""

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


def _to_row(record: Record) -> dict[str, Any]:
    row = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return row | {"spec": _SPEC.dump_json(record.spec).decode()}


def _from_row(row: sa.RowMapping) -> Record:
    values = dict(row)
    accelerator = values.pop("accelerator")
    return Record(
        **values | {"spec": _SPEC.validate_python(json.loads(values["spec"]), strict=False), "state": State(values["state"])},
        accelerator=Accelerator(accelerator) if accelerator else None,
    )


def _migrate(url: str) -> None:
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    alembic.command.upgrade(config, "head")


class Database:
    """One thread does all the work, in order; the event loop never waits for a disk."""

    def __init__(self, engine: sa.Engine, worker: ThreadPoolExecutor) -> None:
        self._engine = engine
        self._worker = worker

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
        database = cls(engine, worker)
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
            raise ExistsError("a machine of that name exists already", hint="`ramet list` shows it.") from error
        except DatabaseError as error:
            if "full" in str(error.orig):
                raise NoSpaceError(
                    "the database cannot be written: no space left on the disk", hint="Free some space and try again."
                ) from error
            raise HostError(f"the database cannot be used: {error.orig}") from error

    async def _write(self, statement: sa.Executable) -> None:
        def work() -> None:
            with self._engine.begin() as connection:
                connection.execute(statement)

        await self._in_worker(work)

    async def insert(self, record: Record) -> None:
        """ExistsError when the name is taken."""
        await self._write(MACHINES.insert().values(_to_row(record)))

    async def update(self, record: Record) -> None:
        await self._write(MACHINES.update().where(MACHINES.c.id == record.id).values(_to_row(record)))

    async def delete(self, machine_id: str) -> None:
        await self._write(MACHINES.delete().where(MACHINES.c.id == machine_id))

    async def machines(self) -> list[Record]:
        """All, oldest first."""

        def work() -> list[Record]:
            with self._engine.connect() as connection:
                return [_from_row(row) for row in connection.execute(MACHINES.select().order_by(MACHINES.c.created_at)).mappings()]

        return await self._in_worker(work)
