"""What tests of the API share: verbs in memory, served, and who asks them. A module that needs others has its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from ramet.client import Client
from tests.unit.memory import TOKEN, Memory, serving


@pytest.fixture
def verbs() -> Memory:
    made = Memory()
    made.stock()
    made.plant()
    return made


@pytest.fixture
async def url(verbs: Memory, tmp_path: Path) -> AsyncIterator[str]:
    async with serving(verbs, tmp_path / "s") as made:
        yield made


@pytest.fixture
async def client(url: str) -> AsyncIterator[Client]:
    async with Client(url, TOKEN) as made:
        yield made


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.AsyncHTTPTransport(uds=url.removeprefix("unix://"))
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", headers={"authorization": f"Bearer {TOKEN}"}) as made:
        yield made
