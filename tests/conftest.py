"""Every test: the marker of its tier, a check that it leaves nothing behind; sessions that share a tier. Fixtures that need a host are in `fixtures.py`."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests import leaks
from tests.leaks import Scratch

pytest_plugins = ["tests.fixtures"]

TIERS = ("unit", "host", "machine", "perf")
TASK_PATIENCE = 120.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share", type=Path, metavar="DIRECTORY", help="run only files of tests that no other session of this directory has begun"
    )


def tier(item: pytest.Item) -> str:
    """The directory below tests/ that a test is in."""
    return item.path.relative_to(Path(__file__).parent).parts[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        assert tier(item) in TIERS, f"{item.path} is in none of the tiers {TIERS}"
        item.add_marker(tier(item))
        if not pytest_asyncio.is_async_test(item):
            continue
        # Machines outlive a test, and so must the loop that holds their connections.
        shared = tier(item) == "machine"
        item.add_marker(pytest.mark.asyncio(loop_scope="session" if shared else "function"), append=False)
        # After fixtures of wider scope, before the test's own: what those start they must end.
        names = item.fixturenames
        names.insert(names.index("leaks_of_test") + 1, "tasks_of_session" if shared else "tasks_of_function")


def _share(items: list[pytest.Item], taken: Path) -> Iterator[pytest.Item]:
    """The tests of those files that nobody had taken when their turn came. The longest come first, so that sessions end at about the same time."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    taken.mkdir(exist_ok=True)
    for path in sorted(files, key=lambda path: -path.stat().st_size):
        try:
            (taken / path.name).touch(exist_ok=False)
        except FileExistsError:
            continue
        yield from files[path]


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """As pytest's own, over what is ours as we come to it."""
    taken: Path | None = session.config.getoption("share")
    if taken is None or session.config.option.collectonly or session.testsfailed:
        return None
    items = _share(session.items, taken)
    item = next(items, None)
    while item:
        following = next(items, None)  # what it does not need of the fixtures ends with this one
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following
    return True


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scratch]:
    """Where everything of this session happens. Programs inherit TMPDIR, which is how they are known again."""
    root = Path(os.path.realpath(tmp_path_factory.getbasetemp()))
    (root / "tmp").mkdir()
    old, cached = os.environ.get("TMPDIR"), tempfile.tempdir
    os.environ["TMPDIR"] = tempfile.tempdir = str(root / "tmp")
    yield Scratch(root)
    tempfile.tempdir = cached
    if old is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = old


@pytest.fixture(scope="session", autouse=True)
def leaks_of_session(scratch: Scratch) -> Iterator[None]:
    """What fixtures of wider scope leave."""
    before = leaks.snapshot(scratch, thorough=True, before=True)
    before.pop("descriptor")  # loops, pytest's own capture
    yield
    _check(scratch, before, thorough=True)


@pytest.fixture(autouse=True)
def leaks_of_test(request: pytest.FixtureRequest, scratch: Scratch) -> Iterator[None]:
    """Fails a test that leaves a process, mount, descriptor, network device, cgroup, socket or file that was not there before."""
    thorough = tier(request.node) != "unit"
    before = leaks.snapshot(scratch, thorough=thorough, before=True)
    yield
    _check(scratch, before, thorough=thorough)


def _check(scratch: Scratch, before: leaks.Snapshot, *, thorough: bool) -> None:
    def look() -> leaks.Snapshot:
        now = leaks.snapshot(scratch, thorough=thorough)
        return {kind: now[kind] for kind in before}

    if left := leaks.left(before, look):
        leaks.clean_up(scratch, before, thorough=thorough)
        pytest.fail("left behind:\n  " + "\n  ".join(left), pytrace=False)


async def _no_new_tasks() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    mine = asyncio.current_task()
    new = {task for task in asyncio.all_tasks() - before if task is not mine}
    if new:
        _, new = await asyncio.wait(new, timeout=TASK_PATIENCE)
    for task in new:
        task.cancel()
    assert not new, f"tasks are left: {new}"


@pytest_asyncio.fixture(loop_scope="function")
async def tasks_of_function() -> AsyncIterator[None]:
    async for _ in _no_new_tasks():
        yield


@pytest_asyncio.fixture(loop_scope="session")
async def tasks_of_session() -> AsyncIterator[None]:
    async for _ in _no_new_tasks():
        yield
