"""Instants over HTTP: the routes by hand, names with slashes, the client's round trips, the SDK's objects."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

import ramet
from ramet import aio, sdk
from ramet.aio import AsyncHost, AsyncMachine
from ramet.client import Client
from ramet.errors import DependentsError, ExistsError, IncompatibleError, LayerError, NotFoundError, SpecError, StateError
from ramet.model import NodeKind, Snapshot, SnapshotState, State
from ramet.rest import STREAM
from ramet.sdk import Host, Machine
from tests.unit.lineage import USAGE
from tests.unit.memory import TOKEN, Memory, beside

Http = httpx2.AsyncClient
GOOD, TORN = "00000000000000aa", "00000000000000bb"


# the client


async def test_a_machine_s_life(client: Client, verbs: Memory) -> None:
    assert (await client.pause("m")).state is State.PAUSED
    assert (await client.resume("m")).state is State.RUNNING
    assert (await client.hibernate("m")).state is State.HIBERNATED
    with pytest.raises(StateError, match="it is hibernated"):
        await client.pause("m")
    assert (await client.resume("m")).state is State.RUNNING
    assert [call[0] for call in verbs.seen] == ["pause", "unpause", "hibernate", "resume"]
    await client.hibernate("m", slim=False)
    assert [call[2] for call in verbs.seen if call[0] == "hibernate"] == [True, False]


async def test_fork(client: Client, verbs: Memory) -> None:
    outcomes = await client.fork("m", count=2)
    assert [each.name for each in outcomes] == ["m-1", "m-2"]
    assert outcomes[0].machine is None
    assert outcomes[0].error == {"code": "exists", "message": "m-1 exists", "hint": "Choose another name."}
    assert outcomes[1].machine == verbs.machines["m-2"]
    assert outcomes[1].error is None
    assert (verbs.machines["m-2"].parent, verbs.machines["m-2"].boot_time) == ("m", 0.125)
    assert [each.name for each in await client.fork("m", names=("x", "y"))] == ["x", "y"]


async def test_snapshots(client: Client, verbs: Memory) -> None:
    kept = await client.snapshot("m", "é", memory=False, test=False)
    assert kept == verbs.kept["m@é"]
    assert ("snapshot", "m", "é", False, False) in verbs.seen
    assert [each.name for each in await client.snapshots()] == ["m@warm", "acme/shop@4f2a", "m@bad", "old@s", "m@é"]
    assert [each.name for each in await client.snapshots("m")] == ["m@warm", "acme/shop@4f2a", "m@bad", "", "m@é"]
    assert verbs.seen[-2:] == [("snapshots", ""), ("snapshots", "m")]
    assert await client.get_snapshot("m@é") == kept
    assert (await client.restore("m", "m@warm")).snapshot == "m@warm"
    assert (await client.restore("m")).snapshot == "m@warm"
    with pytest.raises(ExistsError):
        await client.snapshot("m", "é")


@pytest.mark.parametrize(
    "name", ["acme/shop@4f2a", "a/b/c:1.2", "x@machines", "acme/template:1", "x@50%", "x@a b", "x@a?b#c", "é@ü", "a/x@%2F"]
)
async def test_any_name_passes_http(client: Client, verbs: Memory, name: str) -> None:
    verbs.kept[name] = Snapshot(
        id="1", name=name, machine="m", state=SnapshotState.READY, created_at=1.0, memory=True, spec=verbs.machines["m"].spec
    )
    assert (await client.get_snapshot(name)).name == name
    assert (await client.create_from(name, "new", disk_only=True)).snapshot == name
    assert verbs.seen[-1] == ("create_from", name, "new", True)
    with pytest.raises(DependentsError) as caught:
        await client.delete_snapshot(name)
    assert caught.value.details == {"dependents": ["new"]}
    assert await client.delete_snapshot(name, cascade=True, dry_run=True) == ["new", name]
    assert name in verbs.kept
    assert (await client.template(name, label="acme/shop:2", pool=2)).name == "acme/shop:2"
    assert verbs.seen[-1] == ("template", name, "acme/shop:2", 2)
    assert await client.delete_snapshot("acme/shop:2", cascade=True) == ["new", "acme/shop:2"]
    with pytest.raises(NotFoundError, match="no snapshot"):
        await client.get_snapshot(name)


@pytest.mark.parametrize("name", ["", ".", "..", "../machines/m", "a//b", "/m@x", "m@x/"])
async def test_names_that_are_paths_are_not_sent(client: Client, verbs: Memory, name: str) -> None:
    with pytest.raises(SpecError, match="not a snapshot's name"):
        await client.delete_snapshot(name)
    with pytest.raises(SpecError, match="not a layer's id"):
        await client.get_layer(name)
    assert not verbs.seen


async def test_the_tree(client: Client, verbs: Memory) -> None:
    nodes = {node.name: node for node in await client.tree()}
    assert nodes["debian:bookworm"].kind is NodeKind.IMAGE
    assert nodes["m"].usage == USAGE
    assert (nodes["old"].gone, nodes["old@s"].parent, nodes["child"].parent) == (True, "id-old", "old@s")
    assert nodes["m@warm"].stored == 3 << 20


async def test_layers(client: Client, verbs: Memory) -> None:
    first, second = await client.layers()
    assert (first.id, first.chain, first.used_by) == (GOOD, (GOOD,), ("m@warm", "m-1"))
    assert await client.get_layer(TORN) == second
    assert await client.verify_layer(GOOD) == []
    assert "damaged" in (await client.verify_layer(TORN))[0]
    assert b"".join([part async for part in client.export_layer(GOOD)]) == verbs.raw[GOOD]
    with pytest.raises(NotFoundError):
        [part async for part in client.export_layer("00")]


async def test_an_export_that_fails_halfway_says_why(client: Client, http: Http) -> None:
    got = b""
    with pytest.raises(LayerError, match="cut short") as caught:
        async for part in client.export_layer(TORN):
            got += part
    assert (got, "verify" in caught.value.hint) == (b"torn", True)
    with pytest.raises(httpx2.RemoteProtocolError):  # without frames only the broken connection can tell
        await http.get(f"/v1/layers/{TORN}/export")


# by hand, as with curl


@pytest.mark.parametrize("path", ["acme/shop@4f2a", "acme%2Fshop%404f2a", "acme/shop%404f2a"])
async def test_slashes_may_be_encoded_or_not(http: Http, path: str) -> None:
    assert (await http.get(f"/v1/snapshots/{path}")).json()["name"] == "acme/shop@4f2a"
    made = await http.post(f"/v1/snapshots/{path}/machines", json={"name": "x"})
    assert (made.status_code, made.json()["snapshot"]) == (201, "acme/shop@4f2a")


async def test_bodies_may_be_left_out(http: Http, verbs: Memory) -> None:
    assert [each["name"] for each in (await http.post("/v1/machines/m-1/fork")).json()] == ["m-1-1"]
    kept = await http.post("/v1/machines/m/snapshots")
    assert (kept.status_code, kept.json()["memory"]) == (201, True)
    assert (await http.post("/v1/machines/m/restore")).json()["snapshot"] == kept.json()["name"]
    assert (await http.post("/v1/snapshots/m@bad/template")).json()["name"] == "m:latest"


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("machines/m/fork", {"cuont": 2}, "cuont"),
        ("machines/m/fork", {"count": 0}, "count"),
        ("machines/m/fork", {"names": "x"}, "names"),
        ("machines/m/snapshots", {"memory": "perhaps"}, "memory"),
        ("machines/m/restore", {"to": "x"}, "to"),
        ("snapshots/m@warm/machines", {}, "name"),
        ("snapshots/m@warm/template", {"pool": -1}, "pool"),
    ],
)
async def test_invalid_bodies_name_the_field(http: Http, verbs: Memory, path: str, body: dict[str, Any], field: str) -> None:
    response = await http.post(f"/v1/{path}", json=body)
    assert (response.status_code, response.json()["error"]["details"]["fields"][0]["field"]) == (422, field)
    assert not verbs.seen


async def test_what_is_refused(http: Http, verbs: Memory) -> None:
    assert (await http.get("/v1/snapshots/m@nothing")).status_code == 404
    assert (await http.get("/v1/snapshots/")).status_code == 422
    assert (await http.post("/v1/snapshots/m@warm")).status_code == 405
    assert (await http.delete("/v1/snapshots/m@warm?force=1")).status_code == 422
    refused = await http.delete("/v1/snapshots/m@warm")
    assert (refused.status_code, refused.json()["error"]["details"]) == (409, {"dependents": ["m-1"]})
    assert (await http.delete("/v1/snapshots/m@warm?dry_run=1&cascade=1")).json() == ["m-1", "m@warm"]
    assert (await http.get("/v1/layers/m@warm/verify")).status_code == 404


async def test_exports_by_hand(http: Http, verbs: Memory) -> None:
    plain = await http.get(f"/v1/layers/{GOOD}/export")
    assert (plain.content, plain.headers["content-type"]) == (verbs.raw[GOOD], "application/octet-stream")
    assert (await http.get(f"/v1/layers/{GOOD}/export", headers={"accept": STREAM})).headers["content-type"] == STREAM


# the SDK


async def test_forks_as_objects(verbs: Memory) -> None:
    machine = await AsyncMachine.get("m", verbs=verbs)
    assert [each.name for each in await machine.fork(names=["a", "b"])] == ["a", "b"]
    with pytest.raises(ExistsError, match="2 of 3 forks of m failed; a: a exists") as caught:
        await machine.fork(names=["a", "unfit", "c"])
    assert [each.machine is not None for each in caught.value.details["outcomes"]] == [False, False, True]
    assert caught.value.hint == "Choose another name."
    assert "c" in verbs.machines
    with pytest.raises(IncompatibleError):
        await machine.fork(names=["unfit"])
    assert [each.machine is None for each in await machine.fork_outcomes(2)] == [True, False]


async def test_a_machine_object_s_life(verbs: Memory) -> None:
    machine = await AsyncMachine.get("m", verbs=verbs)
    await machine.pause()
    assert machine.state is State.PAUSED
    await machine.resume()
    await machine.hibernate()
    assert machine.state is State.HIBERNATED
    await machine.resume()
    kept = await machine.snapshot("x", memory=False, test=False)
    assert (kept.name, kept.memory) == ("m@x", False)
    assert (await machine.snapshots())[-1] == kept
    assert (await machine.restore("m@x")).snapshot == "m@x"
    other = await AsyncMachine.create_from("m@x", "other", disk_only=True, verbs=verbs)
    assert (other.name, other.record.parent) == ("other", "m")


async def test_the_host_object(verbs: Memory) -> None:
    host = AsyncHost(verbs)
    assert (await host.info()).limits == ("no cgroups",)
    assert (await host.template("m@bad", "shop:1", pool=2)).pool == 2
    assert "shop:1" in [each.name for each in await host.snapshots()]
    assert (await host.get_snapshot("shop:1")).template
    assert await host.delete_snapshot("shop:1", dry_run=True) == ["shop:1"]
    assert len(await host.tree()) == 12
    assert [each.id for each in await host.layers()] == [GOOD, TORN]
    assert (await host.get_layer(GOOD)).sealed
    assert len(await host.verify_layer(TORN)) == 1
    assert b"".join([part async for part in host.export_layer(GOOD)]) == verbs.raw[GOOD]


@pytest.fixture
def sync(verbs: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with beside(verbs, tmp_path / "s") as made:
        monkeypatch.setenv("RAMET_URL", made)
        monkeypatch.setenv("RAMET_TOKEN", TOKEN)
        yield ramet.Machine.get("m")
        sdk.close()


def test_without_an_event_loop(sync: Machine, verbs: Memory) -> None:
    children = sync.fork(names=["a", "b"])
    assert [(type(child), child.name, child.state) for child in children] == [(Machine, "a", State.RUNNING), (Machine, "b", State.RUNNING)]
    assert children[0].run(["cat"], stdin="hi").text == "hi"
    assert sync.pause().state is sync.state is State.PAUSED
    sync.resume()
    assert sync.snapshot("x").name == "m@x"
    assert Machine.create_from("m@x", "c").record.snapshot == "m@x"
    host = Host()
    assert host.template("acme/shop@4f2a", pool=1).pool == 1
    assert b"".join(host.export_layer(GOOD)) == verbs.raw[GOOD]
    with pytest.raises(LayerError):
        list(host.export_layer(TORN))


def test_both_hosts_have_the_same_methods() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(aio.AsyncHost) == public(sdk.Host)
