"""Registries, collection and blobs over HTTP: the routes by hand, the client's round trips, the SDK's objects."""

from __future__ import annotations

import asyncio

import httpx2
import pytest

from ramet.aio import AsyncHost
from ramet.client import Client
from ramet.errors import ImageError, NotFoundError, SpecError
from ramet.storage import Collected, Transfer
from tests.unit.lineage import DIGEST, MIB
from tests.unit.memory import TOKEN, Memory, until

Http = httpx2.AsyncClient
REFERENCE = "127.0.0.1:5000/acme/shop:1"


# the client


async def test_push_and_pull(client: Client, verbs: Memory) -> None:
    pushed = await client.push("acme/shop@4f2a", REFERENCE)
    assert pushed == Transfer(
        reference=REFERENCE, digest=DIGEST, snapshot="acme/shop@4f2a", size=90 * MIB, moved=40 * MIB, shared=50 * MIB, seconds=1.5
    )
    pulled = await client.pull(REFERENCE, lazy=True)
    assert (pulled.snapshot, pulled.moved) == (REFERENCE, 10 * MIB)
    found = await client.get_snapshot(REFERENCE)
    assert (found.template, found.origin, found.absent) == (True, f"127.0.0.1:5000/acme/shop@{DIGEST}", 80 * MIB)
    assert (await client.create_from(REFERENCE, "new")).snapshot == REFERENCE
    with pytest.raises(ImageError, match="there is no 127"):
        await client.pull("127.0.0.1:5000/missing:1")
    with pytest.raises(NotFoundError, match="no snapshot nope"):
        await client.push("nope", REFERENCE)
    assert [call for call in verbs.seen if call[0] in ("push", "pull")] == [
        ("push", "acme/shop@4f2a", REFERENCE),
        ("pull", REFERENCE, True),
        ("pull", "127.0.0.1:5000/missing:1", False),
    ]


async def test_convert_gc_and_fsck(client: Client, verbs: Memory) -> None:
    made = await client.convert("alpine:3", "acme/alpine:3")
    assert (made.name, made.memory, made.template) == ("acme/alpine:3", False, True)
    done = await client.gc(budget=5, dry_run=True)
    assert isinstance(done, Collected)
    assert (done.layers, done.blobs, done.evicted) == (("00000000000000cc",), (DIGEST,), 5 * MIB)
    await client.gc()
    assert await client.fsck(repair=True) == verbs.wrong["00000000000000bb"]
    assert verbs.seen == [("convert", "alpine:3", "acme/alpine:3"), ("gc", 5, True), ("gc", None, False), ("fsck", True)]


async def test_blobs(client: Client, verbs: Memory) -> None:
    whole = verbs.blobs[DIGEST]
    assert b"".join([part async for part in client.read_blob(DIGEST)]) == whole
    assert b"".join([part async for part in client.read_blob(DIGEST, offset=7, length=300_000)]) == whole[7:300_007]
    assert b"".join([part async for part in client.read_blob(DIGEST, offset=len(whole) - 3)]) == whole[-3:]
    with pytest.raises(NotFoundError, match="not here"):
        [part async for part in client.read_blob("sha256:" + "0" * 64)]
    for name in ("sha256:..", "../../../etc/passwd", "sha256:" + "A" * 64):
        with pytest.raises((SpecError, NotFoundError)):
            [part async for part in client.read_blob(name)]
    assert {call[1] for call in verbs.seen} == {DIGEST, "sha256:" + "0" * 64}


@pytest.mark.parametrize("verb", ["push", "pull", "convert", "fsck"])
async def test_who_leaves_ends_it(url: str, verbs: Memory, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def slow(*_: object, **__: object) -> None:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    monkeypatch.setattr(verbs, verb, slow)
    arguments = {"push": ("m@warm", REFERENCE), "pull": (REFERENCE,), "convert": ("alpine:3",), "fsck": ()}[verb]
    async with Client(url, TOKEN) as client:
        task = asyncio.create_task(getattr(client, verb)(*arguments))
        await asyncio.wait_for(began.wait(), 60)
        task.cancel()
        await asyncio.wait_for(ended.wait(), 60)
        await until(task.done)


async def test_the_host_object(verbs: Memory) -> None:
    host = AsyncHost(verbs)
    assert (await host.push("m@warm", REFERENCE)).snapshot == "m@warm"
    assert (await host.pull(REFERENCE)).moved == 90 * MIB
    assert (await host.convert("alpine:3")).name == "alpine:3"
    await host.gc(budget="2G")
    assert verbs.seen[-1] == ("gc", 2 << 30, False)
    with pytest.raises(SpecError, match="budget 'much' is not a size"):
        await host.gc(budget="much")
    assert len(await host.fsck()) == 1
    assert len(b"".join([part async for part in host.read_blob(DIGEST)])) == MIB


# the routes


async def test_a_range_of_a_blob_is_answered_as_http_has_it(http: Http, verbs: Memory) -> None:
    whole = verbs.blobs[DIGEST]
    answer = await http.get(f"/v1/blobs/{DIGEST}", headers={"range": "bytes=10-19"})
    assert (answer.status_code, answer.content) == (206, whole[10:20])
    assert answer.headers["content-range"] == "bytes 10-19/*"
    assert (answer.headers["content-length"], answer.headers["accept-ranges"]) == ("10", "bytes")
    answer = await http.get(f"/v1/blobs/{DIGEST}")
    assert (answer.status_code, answer.content, answer.headers["accept-ranges"]) == (200, whole, "bytes")
    answer = await http.get(f"/v1/blobs/{DIGEST}", headers={"range": f"bytes=10-{len(whole)}"})  # one byte more than there is
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("wanted", ["bytes=-5", "bytes=5-", "bytes=9-3", "bytes=0-1,4-5", "lines=1-2", "bytes=a-b", "bytes=1-" + "9" * 30])
async def test_ranges_of_other_kinds_are_not_looked_at(http: Http, verbs: Memory, wanted: str) -> None:
    answer = await http.get(f"/v1/blobs/{DIGEST}", headers={"range": wanted})
    assert (answer.status_code, answer.content) == (200, verbs.blobs[DIGEST])


async def test_a_name_that_is_no_digest_reaches_nobody(http: Http, verbs: Memory) -> None:
    for name in ("sha256:" + "g" * 64, "sha256-" + "0" * 64, "..%2f..%2ftoken", "sha256:" + "0" * 64 + "%0a"):
        assert (await http.get(f"/v1/blobs/{name}")).status_code in (404, 422)
    assert verbs.seen == []


async def test_bodies_are_checked(http: Http, verbs: Memory) -> None:
    for path, body in (
        ("/v1/pull", {}),
        ("/v1/pull", {"reference": REFERENCE, "eager": True}),
        ("/v1/pull", {"reference": REFERENCE, "lazy": "perhaps"}),
        ("/v1/snapshots/m@warm/push", {}),
        ("/v1/gc", {"budget": -1}),
        ("/v1/convert", {"name": "x"}),
    ):
        answer = await http.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid"), (path, body)
    assert verbs.seen == []
    assert (await http.post("/v1/gc")).status_code == 200
    assert (await http.post("/v1/fsck")).json() == verbs.wrong["00000000000000bb"]


async def test_snapshots_with_slashes_are_pushed(http: Http, verbs: Memory) -> None:
    for path in ("/v1/snapshots/acme/shop@4f2a/push", "/v1/snapshots/acme%2Fshop@4f2a/push"):
        assert (await http.post(path, json={"reference": REFERENCE})).status_code == 200
    assert {call[1] for call in verbs.seen} == {"acme/shop@4f2a"}
