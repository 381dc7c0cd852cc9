"""The API as any HTTP client sees it: who may ask, shapes of errors, streams that end and hold back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from ramet.model import Spec
from ramet.rest import Decoder, Kind
from ramet.server.app import create_app
from tests.unit.memory import TOKEN, Memory, serving, until

Http = httpx2.AsyncClient


@pytest.fixture
def verbs() -> Memory:
    return Memory()


@pytest.fixture
async def url(verbs: Memory, tmp_path: Path) -> AsyncIterator[str]:
    async with serving(verbs, tmp_path / "s", heartbeat=0.05) as made:
        await verbs.create(Spec(name="m"))
        yield made


@pytest.fixture
async def http(url: str) -> AsyncIterator[Http]:
    transport = httpx2.AsyncHTTPTransport(uds=url.removeprefix("unix://"))
    async with Http(transport=transport, base_url="http://localhost", headers={"authorization": f"Bearer {TOKEN}"}) as client:
        yield client


def problem(response: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"code", "message", "hint", "details"}
    assert body["error"]["code"] == code
    error: dict[str, Any] = body["error"]
    return error


# who may ask


async def test_health_needs_no_token(http: Http) -> None:
    response = await http.get("/health", headers={"authorization": ""})
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("path", ["/v1/machines", "/openapi.json", "/nowhere", "/v1/events", "/docs", "/health/"])
@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN, "Bearer \xe9"])
async def test_everything_else_needs_the_token(http: Http, path: str, header: str) -> None:
    response = await http.get(path, headers=[(b"authorization", header.encode("latin-1"))])
    problem(response, 401, "unauthorized")
    assert response.headers["www-authenticate"].startswith("Bearer")


async def test_the_scheme_in_any_case(http: Http) -> None:
    assert (await http.get("/v1/machines", headers={"authorization": f"bearer {TOKEN}"})).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1", "127.0.0.1:9", "[::1]", "[::1]:80", "LOCALHOST"])
async def test_loopback_names(http: Http, host: str) -> None:
    assert (await http.get("/health", headers={"host": host})).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example:1", ""])
async def test_names_of_other_sites_are_refused(http: Http, host: str) -> None:
    problem(await http.get("/health", headers={"host": host}), 401, "unauthorized")


# shapes of errors


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": "x", "prots": []}, "prots"),
        ({"name": "x", "cpus": "many"}, "cpus"),
        ({"name": "x", "ports": [{"guest": 1}, {"guest": "http"}]}, "ports[1].guest"),
        ({"name": "x", "ports": [{"guest": 1, "proto": "udp"}]}, "ports[0].proto"),
        ({"name": "x", "lifecycle": {"begin": ""}}, "lifecycle.begin"),
        ({"name": "x", "init": "systemd"}, "init"),
        ({}, "name"),
        ([], ""),
    ],
)
async def test_invalid_bodies_name_the_field(http: Http, body: object, field: str) -> None:
    error = problem(await http.post("/v1/machines", json=body), 422, "invalid")
    assert error["details"]["fields"][0]["field"] == field
    assert error["message"].startswith(field)


async def test_bodies_that_are_not_json(http: Http) -> None:
    error = problem(await http.post("/v1/machines", content=b'{"name": }', headers={"content-type": "application/json"}), 422, "invalid")
    assert "not JSON" in error["message"]
    problem(await http.post("/v1/machines", content=b"name=x"), 422, "invalid")
    problem(await http.post("/v1/machines", content=b"\xff", headers={"content-type": "application/json"}), 400, "invalid")


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/machines/m/logs?lines=0", "lines"),
        ("/v1/machines/m/logs?source=kernel", "source"),
        ("/v1/machines/m/logs?linse=3", "linse"),
        ("/v1/machines?all=1", "all"),
        ("/v1/machines/m/files", "path"),
        ("/v1/machines/m/files?path=/x&offset=-1", "offset"),
        ("/v1/machines/m/files?path=", "path"),
    ],
)
async def test_invalid_queries_name_the_parameter(http: Http, path: str, field: str) -> None:
    error = problem(await http.get(path), 422, "invalid")
    assert error["message"].startswith(field)
    assert error["details"]["fields"][0]["field"] == field


@pytest.mark.parametrize("mode", ["8", "rw", "10000", "-1", "0o"])
async def test_modes_are_octal(http: Http, mode: str) -> None:
    problem(await http.put("/v1/machines/m/files", params={"path": "/x", "mode": mode}, content=b""), 422, "invalid")


async def test_routes_that_are_not_there(http: Http) -> None:
    assert "/nowhere" in problem(await http.get("/nowhere"), 404, "not_found")["message"]
    problem(await http.patch("/v1/machines"), 405, "invalid")
    problem(await http.get("/v1/machines/"), 404, "not_found")
    problem(await http.get("/v1/machines/nobody"), 404, "not_found")


async def test_bodies_too_large_to_hold(http: Http) -> None:
    response = await http.post("/v1/machines", content=b'"' + b"x" * (33 << 20) + b'"', headers={"content-type": "application/json"})
    problem(response, 413, "invalid")


async def test_bugs_are_told_to_the_log(http: Http, caplog: pytest.LogCaptureFixture) -> None:
    error = problem(await http.post("/v1/machines/m/run", json={"argv": ["broken"]}), 500, "internal")
    assert "a bug" not in json.dumps(error)
    assert "RuntimeError: a bug" in caplog.text


async def test_openapi(http: Http) -> None:
    document = (await http.get("/openapi.json")).json()
    assert document["components"]["securitySchemes"] == {"token": {"type": "http", "scheme": "bearer"}}
    assert document["security"] == [{"token": []}]
    for path, item in document["paths"].items():
        for operation in item.values():
            assert operation["summary"], path
            assert operation["tags"], path
            assert "default" in operation["responses"], path
            assert "422" not in operation["responses"], path
    assert document["components"]["schemas"]["Spec"]["additionalProperties"] is False


# by hand, as with curl


async def test_run_by_hand(http: Http) -> None:
    reply = (await http.post("/v1/machines/m/run", json={"argv": ["cat"], "input": "hé"})).json()
    assert (reply["stdout"], reply["encoding"]) == ("hé", "utf-8")
    reply = (await http.post("/v1/machines/m/run", json={"argv": ["cat"], "input": "/w==", "encoding": "base64"})).json()
    assert (reply["stdout"], reply["encoding"]) == ("/w==", "base64")
    problem(await http.post("/v1/machines/m/run", json={"argv": ["cat"], "input": "*", "encoding": "base64"}), 422, "invalid")


async def test_files_by_hand(http: Http, verbs: Memory) -> None:
    assert (await http.put("/v1/machines/m/files?path=/x", content=b"data")).status_code == 204
    response = await http.get("/v1/machines/m/files?path=/x")
    assert (response.content, response.headers["content-type"]) == (b"data", "application/octet-stream")
    verbs.files["/torn"] = (b"half", 0)
    with pytest.raises(httpx2.RemoteProtocolError):
        await http.get("/v1/machines/m/files?path=/torn")


async def test_streams_by_hand(http: Http) -> None:
    response = await http.post("/v1/machines/m/exec", json={"argv": ["echo", "hi"]})
    assert response.headers["content-type"] == "application/vnd.docker.multiplexed-stream"
    frames = list(Decoder().feed(response.content))
    assert frames[1:3] == [(Kind.STDOUT, b"hi\n"), (Kind.STDERR, b"done\n")]
    assert json.loads(frames[3][1]) == {"ending": "exited", "code": 0}
    assert response.content[len(frames[0][1]) + 8 :].startswith(b"\x01\0\0\0\0\0\0\x03hi\n")


async def test_events_by_hand(http: Http) -> None:
    async with http.stream("GET", "/v1/events") as response:
        assert response.headers["content-type"] == "application/x-ndjson"
        lines = response.aiter_lines()
        kinds = [json.loads(await anext(lines))["kind"] for _ in range(3)]
    assert kinds == ["heartbeat"] * 3


async def test_input_in_a_streamed_body(http: Http, verbs: Memory) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"x" * 100_000

    async with http.stream("POST", "/v1/machines/m/exec", json={"argv": ["cat"], "stdin": True}) as response:
        await until(lambda: verbs.live)
        feeding = asyncio.ensure_future(http.post("/v1/machines/m/processes/1/stdin?eof=1", content=parts()))
        frames = [frame for data in [chunk async for chunk in response.aiter_raw()] for frame in [data]]
        assert (await feeding).status_code == 204
    decoded = list(Decoder().feed(b"".join(frames)))
    assert sum(len(data) for kind, data in decoded if kind is Kind.STDOUT) == 300_000
    assert decoded[-1][0] is Kind.EXIT


# clients that leave, clients that are slow


async def raw(url: str, request: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_unix_connection(url.removeprefix("unix://"), limit=1024)
    method_and_path, _, body = request.partition("\n")
    head = f"{method_and_path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {TOKEN}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n" if body else "\r\n"
    writer.write((head + body).encode())
    await writer.drain()
    return reader, writer


async def test_leaving_kills_a_silent_process(url: str, verbs: Memory) -> None:
    reader, writer = await raw(url, 'POST /v1/machines/m/exec\n{"argv": ["sleep"]}')
    await reader.readuntil(b'"pid":101}')
    writer.close()
    await until(lambda: verbs.killed == {1})


async def test_leaving_kills_a_process_that_writes_to_a_full_line(url: str, verbs: Memory) -> None:
    reader, writer = await raw(url, 'POST /v1/machines/m/exec\n{"argv": ["yes"]}')
    await reader.readuntil(b'"pid":101}')
    await asyncio.sleep(0.2)
    writer.close()
    await until(lambda: verbs.killed == {1})


async def test_leaving_cancels_run(url: str, verbs: Memory) -> None:
    _, writer = await raw(url, 'POST /v1/machines/m/run\n{"argv": ["hang"]}')
    await until(lambda: verbs.seen)
    writer.close()
    await until(lambda: ("cancelled",) in verbs.seen)


async def test_leaving_ends_the_events(url: str, verbs: Memory) -> None:
    _, writer = await raw(url, "GET /v1/events")
    await until(lambda: verbs.listeners)
    writer.close()
    await until(lambda: not verbs.listeners)


async def still(count: Callable[[], int]) -> int:
    """Where it has come to a stand."""
    async with asyncio.timeout(60):
        while True:
            before = count()
            await asyncio.sleep(0.3)
            if count() == before:
                return before


@pytest.mark.parametrize("request_", ['POST /v1/machines/m/exec\n{"argv": ["yes"]}', "GET /v1/machines/m/files?path=/endless"])
async def test_a_slow_reader_holds_the_source(url: str, verbs: Memory, request_: str) -> None:
    reader, writer = await raw(url, request_)
    await reader.readuntil(b"\r\n\r\n")
    before = await still(lambda: verbs.advanced)
    assert before < 40  # what the sockets and uvicorn hold: some hundred KiB of pieces of 32 or 64 KiB
    for _ in range(200):
        await reader.read(1 << 20)
    assert verbs.advanced > before
    writer.close()
    await writer.wait_closed()


async def test_a_slow_guest_holds_the_uploader(http: Http, verbs: Memory) -> None:
    sent = 0

    async def parts() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(400):
            sent += 1
            yield bytes(65536)

    upload = asyncio.ensure_future(http.put("/v1/machines/m/files?path=/slow", content=parts(), timeout=None))
    await until(lambda: verbs.advanced)
    assert await still(lambda: sent) < 60
    verbs.stalled.set()
    assert (await upload).status_code == 204
    assert sent == 400


async def test_an_upload_that_breaks_off_is_not_a_file(url: str, verbs: Memory) -> None:
    _, writer = await raw(url, "GET /health")
    writer.write(
        f"PUT /v1/machines/m/files?path=/half HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {TOKEN}\r\n"
        "content-length: 100\r\n\r\nhalf".encode()
    )
    await until(lambda: verbs.advanced)
    writer.close()
    await writer.wait_closed()
    await asyncio.sleep(0.05)
    assert verbs.files == {}


async def test_waiting_input_ends_with_its_sender(url: str, verbs: Memory) -> None:
    _, running = await raw(url, 'POST /v1/machines/m/exec\n{"argv": ["deaf"]}')
    await until(lambda: verbs.live)
    verbs.live[1].put_nowait(b"the queue is full")
    _, writer = await raw(url, 'POST /v1/machines/m/processes/1/stdin\n"x"')
    await until(lambda: any(call[0] == "input" for call in verbs.seen))
    tasks = len(asyncio.all_tasks())
    writer.close()
    await until(lambda: len(asyncio.all_tasks()) < tasks)
    running.close()
    await until(lambda: verbs.killed)


def test_an_application_is_only_built(verbs: Memory) -> None:
    assert create_app(verbs, TOKEN).state.verbs is verbs
