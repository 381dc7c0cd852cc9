"""What the fault tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from ramet import recovery
from tests.fixtures import Artifacts

pytest.register_assert_rewrite("tests.machine.aftermath")

from tests.machine.aftermath import Nursery  # noqa: E402


@pytest.fixture(autouse=True)
def found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine has found all its machines again when it is open, however busy the host is."""
    monkeypatch.setattr(recovery, "_ADOPTING", 240.0)


@pytest_asyncio.fixture(loop_scope="session")
async def nursery(artifacts: Artifacts) -> AsyncIterator[Nursery]:
    async with Nursery.open() as made:
        yield made
