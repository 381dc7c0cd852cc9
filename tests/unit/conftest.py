"""What tests of the API and of the command line share: verbs in memory, served, and who asks them. A module that needs others has its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from typer.testing import CliRunner

from ramet.cli import app
from ramet.client import Client
from tests.unit.memory import TOKEN, Memory, beside, environment, serving

Run = Callable[..., tuple[int, str, str]]


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


@pytest.fixture
def served(verbs: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a server for commands, which bring their own loop. The environment names it."""
    with beside(verbs, tmp_path / "s") as made:
        for name, value in environment(made).items():
            monkeypatch.setenv(name, value)
        yield made


@pytest.fixture
def cli(served: str) -> Run:
    """Run a command in this process: status, stdout, stderr. No table is wider than 80 columns, no text has a guest's control characters."""

    def call(*arguments: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        if "--json" not in arguments and "-" not in arguments:
            assert "\x1b" not in result.stdout + result.stderr
            assert arguments[0] not in ("list", "snapshots", "tree") or max(map(len, result.stdout.splitlines()), default=0) <= 80
        return result.exit_code, result.stdout, result.stderr

    return call
