"""`update` on its way from the command line, the SDK and HTTP, and what is said where a guest, or the host, does not give what was asked for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from typer.testing import CliRunner

from ramet.aio import AsyncMachine
from ramet.cli import app
from ramet.client import Client
from ramet.errors import NoCapacityError, SpecError
from ramet.model import Reclaim, State
from tests.unit.memory import TOKEN, Memory, beside, serving

MIB = 1 << 20


@pytest.fixture
def verbs() -> Memory:
    made = Memory()
    made.stock()
    return made


@pytest.fixture
def cli(verbs: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[int, str, str]]]:
    with beside(verbs, tmp_path / "s") as url:
        monkeypatch.setenv("RAMET_URL", url)
        monkeypatch.setenv("RAMET_TOKEN", TOKEN)
        yield lambda *words: (lambda ended: (ended.exit_code, ended.stdout, ended.stderr))(CliRunner().invoke(app, ["update", *words]))


def test_it_says_what_the_guest_has(cli: Callable[..., tuple[int, str, str]], verbs: Memory) -> None:
    assert cli("m", "--memory", "256M") == (0, "m may use 256 MiB of memory.\n", "")
    assert cli("m", "--memory", "64M")[1] == "m may use 64 MiB of memory, but needs more now: it has 128 MiB.\n"
    assert cli("m", "--memory", "0", "--reclaim", "eager")[1] == (
        "m may use 512 MiB of memory.\nm gives back what it does not use: eager.\n"
    )
    assert verbs.seen == [
        ("update", "m", 256 * MIB, None),
        ("update", "m", 64 * MIB, None),
        ("update", "m", 0, Reclaim.EAGER),
    ]
    assert json.loads(cli("m", "--memory", "200M", "--json")[1])["memory_limit"] == 200 * MIB


def test_what_does_not_run_keeps_to_it_later(cli: Callable[..., tuple[int, str, str]], verbs: Memory) -> None:
    assert cli("idle", "--memory", "256M")[1] == "idle may use 256 MiB of memory from its next start on.\n"
    verbs.machines["m"] = dataclasses.replace(verbs.machines["m"], state=State.PAUSED)
    assert cli("m", "--memory", "64M")[1] == "m may use 64 MiB of memory as soon as it runs again.\n"


def test_what_is_wrong_is_said(cli: Callable[..., tuple[int, str, str]]) -> None:
    for words, said in (
        (["m"], "nothing to change"),
        (["m", "--memory", "lots"], "is not a size"),
        (["m", "--reclaim", "all"], "'all' is not one of off, gentle, eager"),
    ):
        status, out, err = cli(*words)
        assert (status, out) == (5, "")
        assert said in err
    status, _, err = cli("m", "--memory", "1G")
    assert status == 6
    assert "error: no capacity\nhint: Stop or hibernate a machine (`ramet hibernate NAME`)" in err


async def test_over_http(verbs: Memory, tmp_path: Path) -> None:
    async with serving(verbs, tmp_path / "s") as url:
        transport = httpx2.AsyncHTTPTransport(uds=url.removeprefix("unix://"))
        headers = {"authorization": f"Bearer {TOKEN}"}
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as http:
            changed = await http.patch("/v1/machines/m", json={"memory": 128 * MIB})
            assert (changed.status_code, changed.json()["memory_limit"]) == (200, 128 * MIB)
            assert (await http.patch("/v1/machines/m", json={})).json()["memory_limit"] == 128 * MIB
            refused = await http.patch("/v1/machines/m", json={"memory": 1 << 30})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "30")
            assert refused.json()["error"]["code"] == "no_capacity"
            for wrong in ({"memory": -1}, {"reclaim": "all"}, {"disk": 1}):
                assert (await http.patch("/v1/machines/m", json=wrong)).status_code == 422


async def test_in_the_sdk(verbs: Memory, tmp_path: Path) -> None:
    async with serving(verbs, tmp_path / "s") as url, Client(url, TOKEN) as client:
        machine = await AsyncMachine.get("m", verbs=client)
        changed = await machine.update(memory="256MiB", reclaim="off")
        assert (changed.memory_limit, changed.memory_granted, changed.spec.reclaim) == (256 * MIB, 256 * MIB, Reclaim.OFF)
        assert machine.record == changed
        with pytest.raises(NoCapacityError) as caught:
            await machine.update(memory=1 << 30)
        assert caught.value.details["retry_after"] == 30
        for wrong in ({"memory": "lots"}, {"reclaim": "all"}):
            with pytest.raises(SpecError):
                await machine.update(**wrong)  # type: ignore[arg-type]
