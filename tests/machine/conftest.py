"""What the fault tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.fixtures import Artifacts

pytest.register_assert_rewrite("tests.machine.aftermath")

from tests.machine.aftermath import Nursery  # noqa: E402


@pytest_asyncio.fixture(loop_scope="session")
async def nursery(artifacts: Artifacts) -> AsyncIterator[Nursery]:
    async with Nursery.open() as made:
        yield made
