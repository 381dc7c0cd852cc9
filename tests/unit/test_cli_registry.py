"""The commands about registries and about what is kept, against a `Verbs` in memory: what they print, what as JSON, the status they leave with."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from ramet.model import Activity, Event
from ramet.storage import Transfer
from tests.unit.conftest import Run
from tests.unit.lineage import DIGEST
from tests.unit.memory import Memory, until

REFERENCE = "127.0.0.1:5000/acme/shop:1"


class Telling(Memory):
    """Says how far a push is, as soon as somebody listens."""

    async def push(self, snapshot: str, reference: str) -> Transfer:
        await until(lambda: self.listeners, 30)
        for fraction in (0.1, 0.5, 0.5):
            doing = Activity(verb="push", step="sending\x1b[2J", fraction=fraction)
            self.tell(Event(at=time.time(), kind="activity", machine=reference, activity=doing))
        await asyncio.sleep(0.05)
        return await super().push(snapshot, reference)


@pytest.fixture
def verbs() -> Memory:
    made = Telling()
    made.stock()
    made.plant()
    return made


def test_push(cli: Run) -> None:
    status, out, err = cli("push", "m@warm", REFERENCE)
    assert (status, err) == (0, f"{REFERENCE}: sending�[2J\n")  # once for each step
    assert out == (
        f"m@warm is at {REFERENCE}: 40 MiB sent, 50 MiB was there already, 1.5 s.\n  {DIGEST}\n  ramet create --from {REFERENCE} NAME\n"
    )
    assert json.loads(cli("push", "m@warm", REFERENCE, "--json")[1])["digest"] == DIGEST
    assert cli("push", "nope", REFERENCE)[0] == 3


def test_pull(cli: Run, verbs: Memory) -> None:
    status, out, _ = cli("pull", "--lazy", REFERENCE)
    assert (status, out) == (
        0,
        f"{REFERENCE} is here: 10 MiB fetched, 2.0 s.\n  80 MiB more come when they are needed, and in the background.\n"
        f"  ramet create --from {REFERENCE} NAME\n",
    )
    assert (
        cli("pull", f"docker://{REFERENCE}")[1] == f"{REFERENCE} is here: 90 MiB fetched, 2.0 s.\n  ramet create --from {REFERENCE} NAME\n"
    )
    status, out, err = cli("pull", "127.0.0.1:5000/missing:1", "--json")
    assert (status, out, json.loads(err)["error"]["hint"]) == (5, "", "Is its name right?")
    assert [call[2] for call in verbs.seen] == [True, False, False]


def test_what_is_not_here_is_shown(cli: Run) -> None:
    assert "ABSENT" not in cli("snapshots")[1]
    cli("pull", "--lazy", REFERENCE)
    lines = cli("snapshots")[1].splitlines()
    assert lines[0].split()[-1] == "ABSENT"
    assert [line.endswith("80 MiB") for line in lines[1:]].count(True) == 1
    assert max(map(len, lines)) <= 80


def test_convert(cli: Run, verbs: Memory) -> None:
    assert cli("convert", "alpine:3", "acme/alpine:3")[1] == (
        "acme/alpine:3 is a template.\n  ramet push acme/alpine:3 REGISTRY/NAME:TAG\n  ramet create --from acme/alpine:3 NAME\n"
    )
    cli("convert", "debian")
    assert verbs.seen == [("convert", "alpine:3", "acme/alpine:3"), ("convert", "debian:latest", "")]
    assert not json.loads(cli("convert", "alpine:4", "--json")[1])["memory"]


def test_gc(cli: Run, verbs: Memory) -> None:
    status, out, err = cli("gc", "--budget", "20G")
    assert (status, err) == (0, "note: layer 00000000000000dd is being pulled.\n")
    assert out == (
        f"layer 00000000000000cc is removed\nblob {DIGEST} is removed\n"
        "7 MiB given back, 5 MiB of it chunks that a registry has too; layers take 300 MiB.\n"
    )
    out = cli("gc", "--dry-run")[1]
    assert out == (
        f"layer 00000000000000cc would be removed\nblob {DIGEST} would be removed\n"
        "7 MiB would be given back, 5 MiB of it chunks that a registry has too; layers would take 300 MiB.\n"
    )
    assert json.loads(cli("gc", "--json")[1])["evicted"] == 5 << 20
    assert verbs.seen == [("gc", 20 << 30, False), ("gc", None, True), ("gc", None, False)]
    assert cli("gc", "--budget", "much")[0] == 5


def test_fsck(cli: Run, verbs: Memory) -> None:
    assert cli("fsck") == (1, "chunk 3 of blob sha256-bb is damaged�[2J\n", "")
    assert (cli("fsck", "--json", "--repair")[0], verbs.seen[-1]) == (1, ("fsck", True))
    verbs.wrong.clear()
    assert cli("fsck") == (0, "Nothing is wrong.\n", "")
    assert cli("fsck", "--json") == (0, "[]\n", "")
