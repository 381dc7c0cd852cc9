"""Machines in a real SQLite: what comes back, what is refused, and that the migrations end at what the code believes."""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import alembic.autogenerate
import alembic.command
import alembic.config
import pytest
import pytest_asyncio
import sqlalchemy as sa
from alembic.migration import MigrationContext

from ramet import db
from ramet.catalogue import Catalogue
from ramet.db import Database, Record
from ramet.errors import ExistsError, HostError, NoSpaceError, NotFoundError
from ramet.host import Host
from ramet.model import Accelerator, Drive, InitMode, Lifecycle, Port, Snapshot, SnapshotState, Spec, State
from ramet.operations import Operations
from ramet.paths import StateDir

SPEC = Spec(
    name="web",
    env={"A": "ü"},
    ports=(Port(guest=80, host=8000),),
    lifecycle=Lifecycle(create="x"),
    init=InitMode.IMAGE,
    drives=(Drive(name="data", size=1 << 30, mount="/data"), Drive(name="raw", size=1 << 26)),
)
FULL = Record(
    id="1",
    name="web",
    state=State.RUNNING,
    spec=SPEC,
    created_at=1.5,
    image_digest="sha256:0",
    reason="because",
    started_at=2.25,
    boot_time=0.5,
    initialised=True,
    accelerator=Accelerator.TCG,
    kernel="6.1",
)


@pytest_asyncio.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    async with Database.open(tmp_path / "ramet.db") as opened:
        yield opened


def record(number: int) -> Record:
    return Record(id=str(number), name=f"m{number}", state=State.CREATING, spec=Spec(name=f"m{number}"), created_at=float(number))


async def test_every_field_comes_back(database: Database) -> None:
    await database.insert(FULL)
    await database.insert(record(2))
    assert await database.machines() == [FULL, record(2)]


async def test_changes_and_removals(database: Database) -> None:
    for number in (3, 1, 2):
        await database.insert(record(number))
    changed = dataclasses.replace(record(2), state=State.FAILED, reason="no")
    await database.update(changed)
    await database.delete("3")
    await database.delete("nobody")
    assert await database.machines() == [record(1), changed]


def snapshot(number: int, *drive_layers: str) -> Snapshot:
    return Snapshot(
        id=str(number),
        name=f"web@{number}",
        machine="web",
        state=SnapshotState.READY,
        created_at=float(number),
        memory=False,
        spec=SPEC,
        disk_layer="d",
        drive_layers=drive_layers,
    )


async def test_the_layers_of_drives_come_back(database: Database) -> None:
    kept = [snapshot(1), snapshot(2, "a", "b")]
    for each in kept:
        await database.add_snapshot(each, None)
    changed = dataclasses.replace(kept[1], drive_layers=("c", "b"))
    await database.update_snapshot(changed)
    assert await database.snapshots() == [kept[0], changed]
    assert changed.disk_layers == changed.layers == ("d", "c", "b")
    assert dataclasses.replace(changed, disk_layer="", memory_layer="m").layers == ("c", "b", "m")


async def test_a_snapshot_from_before_there_were_drives_and_registries(tmp_path: Path) -> None:
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(db.__file__).parent / "migrations"))
    config.set_main_option("sqlalchemy.url", f"sqlite:///{tmp_path / 'ramet.db'}")
    await asyncio.to_thread(alembic.command.upgrade, config, "0004")
    columns = db._to_row(db.SNAPSHOTS, snapshot(1)).items()
    values = {name: value for name, value in columns if name not in ("drive_layers", "origin")}
    with sqlite3.connect(tmp_path / "ramet.db") as old:
        old.execute(f"INSERT INTO snapshots ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})", list(values.values()))
    old.close()
    async with Database.open(tmp_path / "ramet.db") as database:
        assert await database.snapshots() == [snapshot(1)]


async def test_a_name_is_taken_once(database: Database) -> None:
    await database.insert(record(1))
    with pytest.raises(ExistsError):
        await database.insert(dataclasses.replace(record(1), id="other"))
    assert len(await database.machines()) == 1


async def test_many_at_once(database: Database) -> None:
    await asyncio.gather(*(database.insert(record(number)) for number in range(50)))
    assert len(await database.machines()) == 50


async def test_what_was_written_is_there_for_another_process(tmp_path: Path, database: Database) -> None:
    await database.insert(record(1))
    with sqlite3.connect(f"file:{tmp_path / 'ramet.db'}?mode=ro", uri=True) as other:
        assert other.execute("SELECT name, state FROM machines").fetchall() == [("m1", "creating")]
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.close()


async def test_migrations_end_at_the_schema_of_the_code(tmp_path: Path) -> None:
    async with Database.open(tmp_path / "ramet.db"):
        pass
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'ramet.db'}")
    with engine.connect() as connection:
        differences = alembic.autogenerate.compare_metadata(MigrationContext.configure(connection), db.MACHINES.metadata)
    engine.dispose()
    assert not differences


async def test_opening_again_migrates_nothing_and_loses_nothing(tmp_path: Path) -> None:
    for number in (1, 2):
        async with Database.open(tmp_path / "ramet.db") as database:
            await database.insert(record(number))
    async with Database.open(tmp_path / "ramet.db") as database:
        assert [each.id for each in await database.machines()] == ["1", "2"]


async def test_a_path_with_a_percent_sign(tmp_path: Path) -> None:
    directory = tmp_path / "50% of it"
    directory.mkdir()
    async with Database.open(directory / "ramet.db") as database:
        await database.insert(record(1))
    assert (directory / "ramet.db").exists()


async def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "ramet.db").write_bytes(b"not a database, but long enough to look like a header of one" * 20)
    with pytest.raises(HostError, match="the database cannot be used"):
        async with Database.open(tmp_path / "ramet.db"):
            pass


async def test_a_full_disk(database: Database) -> None:
    def fill() -> None:
        with database._engine.connect() as connection:
            used = connection.execute(sa.text("PRAGMA page_count")).scalar_one()
            connection.execute(sa.text(f"PRAGMA max_page_count={used}"))

    await database._in_worker(fill)
    huge = dataclasses.replace(record(1), reason="x" * 200_000)
    with pytest.raises(NoSpaceError, match="no space left") as caught:
        await database.insert(huge)
    assert caught.value.hint
    assert await database.machines() == []


async def test_what_two_change_at_once_is_both_changed(database: Database, tmp_path: Path) -> None:
    """Of a snapshot and of a machine: in memory, and on the disk."""
    snapshots = Catalogue(database)
    for number in (1, 2):
        snapshots[f"s{number}"] = Snapshot(
            id=f"s{number}", name="", machine="web", state=SnapshotState.SAVING, created_at=1.0, memory=False, spec=SPEC, parent="s1" * (number - 1)
        )  # fmt: skip
        await database.add_snapshot(snapshots[f"s{number}"], None)
    late = snapshots["s1"]
    changes = [snapshots.change("s2", state=SnapshotState.READY), snapshots.forget(late), snapshots.change("s1", name="web@late")]
    assert [type(each) for each in await asyncio.gather(*changes, return_exceptions=True)] == [Snapshot, type(None), NotFoundError]
    assert (snapshots["s2"].state, snapshots["s2"].parent) == (SnapshotState.READY, "")
    assert await database.snapshots() == list(snapshots.values()) == [snapshots["s2"]]
    ops = Operations(StateDir(root=tmp_path), database, Host(StateDir(root=tmp_path)))
    await database.insert(record(1))
    entry = ops.add(record(1))
    setting = asyncio.gather(ops.set(entry, kernel="6.1"), ops.set(entry, state=State.RUNNING), ops.set(entry, boot_time=0.5))
    await asyncio.sleep(0)
    ops.note(entry, reason="noted meanwhile")
    await setting
    assert (entry.record.kernel, entry.record.state, entry.record.boot_time, entry.record.reason) == (
        "6.1",
        State.RUNNING,
        0.5,
        "noted meanwhile",
    )
    assert await database.machines() == [entry.record]
