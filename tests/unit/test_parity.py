"""One list of verbs is the product: the Protocol, the routes, the client, the engine and the command line are held to it."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from ramet.client import Client
from ramet.engine import Engine
from ramet.server.app import create_app
from ramet.verbs import Verbs
from tests.unit.memory import TOKEN, Memory, beside, program

# verb -> a command line that uses it
COMMANDS: dict[str, list[str]] = {
    "info": ["info"],
    "create": ["create", "new"],
    "list": ["list"],
    "get": ["show", "m"],
    "start": ["start", "m"],
    "stop": ["stop", "m"],
    "update": ["update", "m", "--memory", "256M"],
    "delete": ["delete", "m"],
    "fork": ["fork", "m"],
    "pause": ["pause", "m"],
    "resume": ["resume", "m"],
    "hibernate": ["hibernate", "m"],
    "compact": ["compact", "m"],
    "snapshot": ["snapshot", "m"],
    "snapshots": ["snapshots"],
    "get_snapshot": ["restore", "m", "m@warm", "--dry-run"],
    "restore": ["restore", "m", "m@warm", "--yes"],
    "create_from": ["create", "--from", "m@warm", "new"],
    "template": ["template", "m@warm", "shop:1"],
    "delete_snapshot": ["delete", "m@bad"],
    "tree": ["tree"],
    "layers": ["layer", "ls"],
    "get_layer": ["layer", "show", "00000000000000aa"],
    "verify_layer": ["layer", "verify", "00000000000000aa"],
    "export_layer": ["layer", "export", "00000000000000aa", "raw"],
    "push": ["push", "m@warm", "127.0.0.1:5000/acme/shop:1"],
    "pull": ["pull", "127.0.0.1:5000/acme/shop:1"],
    "convert": ["convert", "debian:bookworm"],
    "gc": ["gc"],
    "fsck": ["fsck"],
    "read_blob": [],  # other hosts ask for it: test_server_storage.py
    "logs": ["logs", "m"],
    "metrics": ["metrics", "m"],
    "run": ["run", "m", "--json", "x"],
    "execute": ["run", "m", "echo"],
    "attach": ["attach", "m", "1"],
    "processes": ["ps", "m"],
    "send_input": ["run", "-i", "m", "cat"],
    "signal": ["kill", "m", "1"],
    "resize": [],  # only a terminal can: test_shell.py
    "forget": ["kill", "m", "1", "--forget"],
    "read_file": ["cp", "m:/f", "-"],
    "write_file": ["cp", "-", "m:/g"],
    "stat_file": ["files", "stat", "m:/f"],
    "list_files": ["files", "ls", "m:/"],
    "remove_file": ["files", "rm", "m:/f"],
    "rename_file": ["files", "mv", "m:/f", "/g"],
    "make_dir": ["files", "mkdir", "m:/d"],
    "pack": ["cp", "m:/dir", "out"],
    "unpack": ["cp", "here", "m:/t"],
    "open_port": ["forward", "m", "80"],
    "close_port": ["forward", "m", "80", "--close"],
    "events": ["up", "."],
}


def public(kind: type) -> dict[str, inspect.Signature]:
    """Names and signatures of the methods that are for others."""
    return {
        name: inspect.signature(member) for name, member in vars(kind).items() if inspect.isfunction(member) and not name.startswith("_")
    }


VERBS = public(Verbs)


def test_the_client_has_the_verbs() -> None:
    assert {name: sign for name, sign in public(Client).items() if name != "aclose"} == VERBS


def test_the_engine_has_the_verbs() -> None:
    engine = public(Engine)
    assert VERBS.keys() <= engine.keys()
    for name, signature in VERBS.items():
        assert list(engine[name].parameters.values()) == list(signature.parameters.values()), name


def test_the_routes_are_the_verbs() -> None:
    operations = [
        operation["operationId"] for item in create_app(Memory(), TOKEN).openapi()["paths"].values() for operation in item.values()
    ]
    assert sorted(operations) == sorted([*VERBS, "health"])


def test_the_command_line_has_the_verbs() -> None:
    assert COMMANDS.keys() == VERBS.keys()


class Noting(Memory):
    """Remembers which verbs were used."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[str] = set()

    def __getattribute__(self, name: str) -> object:
        if name in COMMANDS:
            self.used.add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("verb", [verb for verb, line in COMMANDS.items() if line])
def test_each_command_uses_its_verb(tmp_path: Path, verb: str) -> None:
    verbs = Noting()
    verbs.stock()
    verbs.plant()
    (tmp_path / "here").mkdir()
    (tmp_path / "ramet.toml").write_text('name = "fresh"\n')
    with beside(verbs, tmp_path / "s") as url:
        ended = program(url, COMMANDS[verb], stdin=b"x", cwd=tmp_path)
    assert verb in verbs.used, (ended.stdout, ended.stderr)
