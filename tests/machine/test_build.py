"""`ramet build` as a CI job runs it: without a daemon, to a real registry, and nothing built twice."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ramet import process, service
from ramet.paths import StateDir
from tests.fixtures import Artifacts, Box, States, opened
from tests.host.conftest import Registry, registries

__all__ = ["registries"]
RAMET = (sys.executable, "-P", "-c", "import ramet.cli; ramet.cli.main()")
DEADLINE = 300.0


@pytest.fixture
def registry(registries: Callable[..., Registry]) -> Registry:
    return registries()


def definition(directory: Path, artifacts: Artifacts, create: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "ramet.toml").write_text(
        f'name = "shop"\nimage = "{artifacts.tiny}"\nmemory = "256MiB"\ndisk = "256MiB"\n\n[lifecycle]\ncreate = "{create}"\n'
    )
    return directory


async def ramet(state: StateDir, *words: str) -> process.Finished:
    """The program, with its output and its messages apart."""
    env = {"RAMET_HOME": str(state.root), "RAMET_URL": ""}
    return await process.run([*RAMET, *words], deadline=DEADLINE, env=env, apart=True)


async def built(state: StateDir, *words: str) -> tuple[dict[str, Any], str]:
    """What a build that succeeds says, and its log."""
    found = await ramet(state, "build", "--json", *words)
    assert found.returncode == 0, found.errors
    return json.loads(found.output), found.errors


async def test_a_job_builds_pushes_and_finds_it_again(states: States, artifacts: Artifacts, registry: Registry, tmp_path: Path) -> None:
    source = str(definition(tmp_path / "source", artifacts, "echo made > /srv/word"))
    place = f"{registry.address}/acme/shop"
    runner = states.new()
    first, log = await built(runner, source, "--push", f"{place}:main")
    assert not first["cached"]
    assert first["snapshot"] == f"shop:build-{first['key']}"
    assert first["pushed"][0].startswith(f"{place}@sha256:")
    assert "running lifecycle.create" in log
    assert service.status(runner) is None  # no daemon was needed, and none is left
    assert [each for each in os.listdir(runner.machines) if not each.startswith(".")] == []  # noqa: PTH208

    again, log = await built(runner, source, "--push", f"{place}:main")
    assert (again["cached"], again["pushed"]) == ("this host", first["pushed"])
    other, log = await built(states.new(), source, "--push", f"{place}:next")  # another runner, which has nothing
    assert (other["cached"], other["key"]) == (f"{place}:build-{first['key']}", first["key"])
    assert "running lifecycle.create" not in log
    assert other["pushed"] == first["pushed"]

    async with opened(states.new()) as engine:  # and a host that has never seen a build
        await engine.pull(f"{place}:next", lazy=True)
        await engine.create_from(f"{place}:next", "mine")
        assert await Box(engine, "mine").text("cat /srv/word; hostname") == "made\nmine"


async def test_another_definition_is_built_anew(states: States, artifacts: Artifacts, tmp_path: Path) -> None:
    state = states.new()
    first, _ = await built(state, str(definition(tmp_path / "a", artifacts, "true")), "--no-memory")
    second, _ = await built(state, str(definition(tmp_path / "a", artifacts, "echo other > /srv/word")), "--no-memory")
    assert first["key"] != second["key"]
    assert not second["cached"]


async def test_what_fails_says_so_and_leaves_nothing(states: States, artifacts: Artifacts, registry: Registry, tmp_path: Path) -> None:
    state = states.new()
    source = str(definition(tmp_path / "source", artifacts, "echo the reason >&2; exit 3"))
    failed = await ramet(state, "build", source, "--push", f"{registry.address}/acme/shop:main")
    assert failed.returncode == 7
    assert "lifecycle.create ended with status 3: the reason" in failed.errors
    async with opened(state) as engine:
        assert await engine.list() == []
        assert await engine.snapshots() == []
    source = str(definition(tmp_path / "source", artifacts, "true"))
    nowhere = await ramet(state, "build", source, "--push", "127.0.0.1:1/acme/shop:main", "--no-memory")
    assert nowhere.returncode == 6
    assert "127.0.0.1:1" in nowhere.errors


async def test_killed_in_the_middle_the_next_one_builds(states: States, artifacts: Artifacts, tmp_path: Path) -> None:
    state = states.new()
    source = str(definition(tmp_path / "source", artifacts, "sleep 5"))
    command = [*RAMET, "build", source, "--no-memory"]
    async with process.running(command, env={"RAMET_HOME": str(state.root)}) as program, asyncio.timeout(DEADLINE):
        assert program.stdout
        async for line in program.stdout:
            if b"running lifecycle.create" in line:
                break
        else:
            raise AssertionError("it ended")
        program.kill()
        await program.wait()
    made, _ = await built(state, source, "--no-memory")
    assert not made["cached"]
    async with opened(state) as engine:
        assert await engine.list() == []
        assert [each.name for each in await engine.snapshots()] == [made["snapshot"]]
