"""The registry client against servers that fail, lie, lead elsewhere, or do less than they should."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from ramet.errors import HostError, ImageError, RametError
from ramet.reference import OCI_MANIFEST
from ramet.registry import line, upload
from ramet.registry.client import Registry
from ramet.registry.config import Config, Mirror, Rule

from .conftest import certified
from .oddregistry import Answer, Odd, Request, odd, part
from .test_registry import CONFIG, MEGA, data, digest_of, nobody, put
from .test_registry import part as read_part

__all__ = ["nobody"]

CONTENT = data(3 * MEGA)
DIGEST = digest_of(CONTENT)
SECRET = "Basic dXNlcjpzZWNyZXQ="  # user:secret


@pytest.fixture
def login(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Be `user:secret` at a registry."""

    def be(host: str) -> None:
        for name, value in (("", host), ("_USER", "user"), ("_PASSWORD", "secret")):
            monkeypatch.setenv(f"RAMET_REGISTRY{name}", value)

    return be


def blob(request: Request) -> Answer:
    """A registry that has one blob and does as it should."""
    return part(CONTENT, request) if "range" in request.headers else Answer(200, CONTENT)


async def failing(server: Odd, *, deadline: float = 0) -> RametError:
    """The error of reading a range in the blob's middle."""
    async with Registry.open(server.address, config=CONFIG, deadline=deadline) as client:
        with pytest.raises((ImageError, HostError)) as raised:
            await read_part(client, "x", DIGEST, 2 * MEGA, 1000)
    return raised.value


# what comes is not what was asked for


async def test_a_range_goes_on_where_the_connection_broke() -> None:
    def script(request: Request) -> Answer:
        answer = part(CONTENT, request)
        return Answer(206, answer.body, answer.headers, cut=len(answer.body) // 2 if len(answer.body) > 1000 else None)

    async with odd(script) as server, Registry.open(server.address, config=CONFIG) as client:
        assert await read_part(client, "x", DIGEST, 5, 6000) == CONTENT[5:6005]
    begins = [request.range[0] for request in server.asked]
    assert begins == sorted(set(begins)) and len(begins) == 4


async def test_a_range_that_breaks_is_an_error_once_the_time_is_over() -> None:
    async with odd(lambda request: Answer(206, b"", part(CONTENT, request).headers, cut=0, claim=1000)) as server:
        error = await failing(server, deadline=4)
        assert isinstance(error, HostError) and "connection broke" in error.message
        assert 2 <= len(server.asked) <= 8


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(206, bytes(1000)), "another part"),
        (Answer(206, bytes(1000), {"content-range": "bytes 0-999/3000"}), "another part"),
        (Answer(206, bytes(1000), {"content-range": f"bytes {2 * MEGA}-{2 * MEGA + 1000}/*"}), "another part"),
        (Answer(206, bytes(1000), {"content-range": f"bytes {2 * MEGA}-{2 * MEGA + 999}/*", "content-encoding": "gzip"}), "compresses"),
        (Answer(206, bytes(500), {"content-range": f"bytes {2 * MEGA}-{2 * MEGA + 999}/*"}), "cut short after 2097652"),
        (Answer(200, CONTENT), "gives no parts"),
        (Answer(416), "answers 416"),
        (Answer(302, headers={"location": "/v2/elsewhere"}), "without end"),
        (Answer(302, headers={"location": "file:///etc/passwd"}), "leads nowhere"),
        (Answer(302, headers={"location": "http://[::1"}), "leads nowhere"),
        (Answer(403, b'{"errors":[{"code":"DENIED","message":"no \\u001b[31m"}]}'), "refuses access: DENIED, no"),
        (Answer(401, headers={"www-authenticate": "Negotiate"}), "refuses access"),
        (Answer(401, headers={"www-authenticate": 'Bearer realm="file:///etc/passwd"'}), "leads nowhere"),
        (Answer(400, b"x" * 5000), "answers 400: xxx"),
        (Answer(302), "answers 302"),
    ],
)
async def test_an_answer_that_is_no_use_is_an_error_at_once(answer: Answer, said: str) -> None:
    async with odd(lambda request: answer) as server:
        error = await failing(server)
        assert said in error.message and "\x1b" not in error.message and len(error.message) < 600
        assert isinstance(error, ImageError) or "cut short" in said
        assert len(server.asked) <= 6


async def test_a_server_without_ranges_will_do_for_small_blobs() -> None:
    async with odd(lambda request: Answer(200, CONTENT)) as server, Registry.open(server.address, config=CONFIG) as client:
        assert await read_part(client, "x", DIGEST, 1000, 70000) == CONTENT[1000:71000]
        assert await read_part(client, "x", DIGEST, 0, len(CONTENT)) == CONTENT


async def test_documents_that_are_too_large_are_not_read_to_their_end() -> None:
    async with (
        odd(lambda request: Answer(200, bytes(5 * MEGA), claim=1 << 50)) as server,
        Registry.open(server.address, config=CONFIG) as client,
    ):
        with pytest.raises(ImageError, match="more than 4194304 bytes"):
            await client.manifest("x", "v1")
        with pytest.raises(ImageError, match="more than 10 bytes"):
            await client.blob("x", DIGEST, 10)


async def test_a_manifest_is_what_its_digest_says() -> None:
    said = {"docker-content-digest": DIGEST}
    async with odd(lambda request: Answer(200, b"{}", said)) as server, Registry.open(server.address, config=CONFIG) as client:
        for reference in ("v1", DIGEST):
            with pytest.raises(ImageError, match="digest mismatch"):
                await client.manifest("x", reference)
        said.clear()
        assert await client.manifest("x", "v1") == (digest_of(b"{}"), b"{}")
        with pytest.raises(ImageError, match="digest mismatch"):
            await client.manifest("x", DIGEST)
        said["docker-content-digest"] = DIGEST
        with pytest.raises(ImageError, match="digest mismatch"):
            await client.put_manifest("x", "v1", b"{}", OCI_MANIFEST)


async def test_a_size_that_is_none() -> None:
    async with odd(lambda request: Answer(200)) as server, Registry.open(server.address, config=CONFIG, deadline=0) as client:
        assert await client.has("x", DIGEST) == 0
        server.script = lambda request: Answer(204)
        with pytest.raises(ImageError, match="answers 204"):
            await client.has("x", DIGEST)


# what fails for a while


async def test_too_many_requests() -> None:
    answers = [Answer(429, headers={"retry-after": "1"}), Answer(503), None, Answer(200, CONTENT)]
    async with odd(lambda request: answers.pop(0)) as server, Registry.open(server.address, config=CONFIG) as client:
        assert await client.blob("x", DIGEST, len(CONTENT)) == CONTENT
    assert not answers


@pytest.mark.parametrize(("status", "said"), [(429, "too many requests"), (500, "answers 500"), (503, "answers 503")])
async def test_what_may_pass_is_told_apart(status: int, said: str) -> None:
    async with odd(lambda request: Answer(status, b"{}", {"retry-after": "7"})) as server:
        error = await failing(server)
        assert isinstance(error, HostError) and said in error.message
        assert error.details == {"registry": server.address, "status": status, "retry_after": 7.0}


async def test_a_connection_that_was_closed_while_it_was_kept() -> None:
    asked = 0

    def script(request: Request) -> Answer | None:
        nonlocal asked
        asked += 1
        return None if asked == 2 else Answer(200, CONTENT)

    async with odd(script) as server, Registry.open(server.address, config=CONFIG, deadline=0) as client:
        for _ in range(2):
            assert await client.blob("x", DIGEST, len(CONTENT)) == CONTENT
    assert asked == 3


async def test_silence_and_dripping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "SILENCE", 0.5)
    head = {"content-range": f"bytes {2 * MEGA}-{2 * MEGA + 999}/*"}
    async with odd(lambda request: Answer(206, bytes(1000), head, drip=0.05)) as server:
        error = await failing(server)
        assert isinstance(error, HostError) and ("too slow" in error.message or "in time" in error.message)
        server.script = lambda request: Answer(206, b"", head, claim=1000)
        error = await failing(server)
        assert isinstance(error, HostError) and "does not answer in time" in error.message


async def test_a_mirror_that_fails_is_left_out_for_a_while() -> None:
    async with odd(lambda request: Answer(503)) as mirror, odd(blob) as own:
        rule = Rule(prefix=own.address, location=own.address, mirrors=(Mirror(location=mirror.address),))
        async with Registry.open(own.address, config=Config(rules=(rule,)), deadline=0) as client:
            for _ in range(3):
                assert await read_part(client, "x", DIGEST, 7, 9) == CONTENT[7:16]
        assert (len(mirror.asked), len(own.asked)) == (1, 3)
        mirror.script = lambda request: Answer(206, part(CONTENT, request).body, part(CONTENT, request).headers, cut=5)
        async with Registry.open(own.address, config=Config(rules=(rule,)), deadline=10) as client:
            assert await read_part(client, "x", DIGEST, 7, 9) == CONTENT[7:16]
        assert own.asked[-1].range == (12, 16)


# who hears our secrets


async def test_a_redirect_elsewhere_hears_no_password_and_is_remembered(login: Callable[[str], None]) -> None:
    signed = 0

    def script(request: Request) -> Answer:
        nonlocal signed
        if request.headers.get("authorization") != SECRET:
            return Answer(401, headers={"www-authenticate": 'Basic realm="x"'})
        signed += 1
        return Answer(307, headers={"location": f"http://{elsewhere.address}/store?signed={signed}"})

    def store(request: Request) -> Answer:
        return blob(request) if request.query["signed"] == str(signed) else Answer(403)

    async with odd(store) as elsewhere, odd(script) as server, Registry.open(server.address, config=CONFIG) as client:
        login(server.address)
        for offset in (0, 1000, 2 * MEGA):
            assert await read_part(client, "x", DIGEST, offset, 100) == CONTENT[offset : offset + 100]
        assert (len(server.asked), len(elsewhere.asked)) == (2, 3)
        signed += 1  # what was signed before is not good any more
        assert await read_part(client, "x", DIGEST, 5, 100) == CONTENT[5:105]
        assert (len(server.asked), len(elsewhere.asked)) == (3, 5)
        assert all("authorization" not in request.headers for request in elsewhere.asked)
        assert await client.blob("x", DIGEST, len(CONTENT)) == CONTENT


async def test_an_encrypted_line_is_never_left_for_an_open_one(tmp_path: Path, login: Callable[[str], None]) -> None:
    key, certificate = certified(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    async with odd(lambda request: Answer(200, b"{}")) as elsewhere, odd(lambda request: answer, context) as server:
        login(server.address)
        place = tmp_path / "certs.d" / server.address
        place.mkdir(parents=True)
        (place / "ca.crt").write_bytes(certificate.read_bytes())
        config = Config(certs=(tmp_path / "certs.d",))
        there = f"http://{elsewhere.address}/x"
        for leads in ({"location": there}, {"www-authenticate": f'Bearer realm="{there}"'}):
            answer = Answer(307 if "location" in leads else 401, headers=leads)
            async with Registry.open(server.address, config=config) as client:
                with pytest.raises(ImageError, match="not encrypted"):
                    await client.manifest("x", "v1")
        answer = Answer(307, headers={"location": f"http://{server.address}/v2/x/manifests/v1"})
        async with Registry.open(server.address, config=config) as client:  # a proxy that does not know itself: never followed in the clear
            with pytest.raises(ImageError, match="without end"):
                await client.manifest("x", "v1")
        assert not elsewhere.asked


async def test_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    async with odd(blob) as proxy:
        monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
        monkeypatch.setenv("no_proxy", "")
        config = Config(rules=(Rule(prefix="registry.example:5000", location="registry.example:5000", insecure=True),))
        async with Registry.open("registry.example:5000", config=config) as client:
            assert await read_part(client, "x", DIGEST, 3, 100) == CONTENT[3:103]
        assert [request.target for request in proxy.asked] == [f"http://registry.example:5000/v2/x/blobs/{DIGEST}"]
        async with odd(blob) as own, Registry.open(own.address, config=CONFIG) as client:  # what is on this host needs none
            assert await read_part(client, "x", DIGEST, 3, 100) == CONTENT[3:103]
        assert len(proxy.asked) == 1


# uploads


class Careful:
    """A registry that does with uploads what the specification says: it keeps what came of a piece that broke."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.begun: dict[str, bytearray] = {}
        self.quiet = False  # finishes the next upload without an answer

    def __call__(self, request: Request) -> Answer | None:
        where = request.path
        if request.method == "HEAD":
            found = self.blobs.get(where.rpartition("/")[2])
            return Answer(404) if found is None else Answer(200, found)
        if request.method == "POST":
            where = f"/up/{len(self.begun)}"
            self.begun[where] = bytearray()
            return Answer(202, headers={"location": where + "?state=x"})
        if where not in self.begun:
            return Answer(404, b'{"errors":[{"code":"BLOB_UPLOAD_UNKNOWN"}]}')
        held = self.begun[where]
        if request.method in ("PATCH", "PUT") and request.body:
            assert request.query["state"] == "x"
            if "content-range" in request.headers and int(request.headers["content-range"].partition("-")[0]) != len(held):
                return Answer(416)
            held += request.body
            if len(request.body) < int(request.headers["content-length"]):
                return None
        if request.method == "PUT":
            self.blobs[request.query["digest"]] = bytes(self.begun.pop(where))
            if self.quiet:
                self.quiet = False
                return None
            return Answer(201)
        return Answer(202 if request.method == "PATCH" else 204, headers={"range": f"0-{len(held) - 1}", "location": where + "?state=x"})


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(upload, "PIECE", MEGA)
    return MEGA


async def test_an_upload_goes_on_where_the_line_broke(pieces: int) -> None:
    script = Careful()
    async with odd(script) as server, Registry.open(server.address, config=CONFIG) as client:
        server.swallow = [MEGA, 300_000, 200_000]
        await put(client, "x", CONTENT)
    assert script.blobs == {DIGEST: CONTENT}
    sent = [request.headers["content-range"] for request in server.asked if request.method == "PATCH"]
    assert sent[:3] == ["0-1048575", "1048576-2097151", "1348576-2397151"] and len(script.begun) == 0
    assert sum(len(request.body) for request in server.asked) == len(CONTENT)


async def test_an_answer_that_is_lost_does_not_cost_the_upload(pieces: int) -> None:
    script = Careful()
    script.quiet = True
    async with odd(script) as server, Registry.open(server.address, config=CONFIG) as client:
        await put(client, "x", CONTENT)
    assert [request.method for request in server.asked] == ["POST", "PATCH", "PATCH", "PATCH", "PUT", "HEAD"]


@pytest.mark.parametrize("refusal", [Answer(405), Answer(413), Answer(400, b'{"errors":[{"code":"BLOB_UPLOAD_INVALID"}]}')])
async def test_a_registry_that_takes_no_pieces_gets_the_whole(pieces: int, refusal: Answer) -> None:
    script = Careful()
    async with (
        odd(lambda request: refusal if request.method == "PATCH" else script(request)) as server,
        Registry.open(server.address, config=CONFIG) as client,
    ):
        await put(client, "x", CONTENT)
    assert script.blobs == {DIGEST: CONTENT}
    assert [request.method for request in server.asked] == ["POST", "PATCH", "POST", "PUT"]


async def test_a_registry_that_wants_large_pieces(pieces: int) -> None:
    script = Careful()

    def wants(request: Request) -> Answer | None:
        answer = script(request)
        if answer and request.method == "POST":
            answer.headers["oci-chunk-min-length"] = str(2 * MEGA)
        return answer

    async with odd(wants) as server, Registry.open(server.address, config=CONFIG) as client:
        await put(client, "x", CONTENT)
    assert [request.headers["content-range"] for request in server.asked if request.method == "PATCH"] == ["0-2097151", "2097152-3145727"]


@pytest.mark.parametrize(
    ("method", "answer", "kind", "said"),
    [
        ("POST", Answer(403), ImageError, "refuses access"),
        ("POST", Answer(202), ImageError, "does not say where to"),
        ("POST", Answer(405), ImageError, "answers 405"),
        ("PATCH", Answer(507), HostError, "answers 507"),
        ("PATCH", Answer(202, headers={"range": "0-5000000"}), ImageError, "counts 5000001 bytes"),
        ("PATCH", Answer(401), ImageError, "refuses access"),
        ("PUT", Answer(400, b'{"errors":[{"code":"DIGEST_INVALID"}]}'), ImageError, "DIGEST_INVALID"),
    ],
)
async def test_an_upload_that_is_refused_ends(pieces: int, method: str, answer: Answer, kind: type[RametError], said: str) -> None:
    script = Careful()
    async with (
        odd(lambda request: answer if request.method == method else script(request)) as server,
        Registry.open(server.address, config=CONFIG, deadline=0) as client,
    ):
        with pytest.raises(kind, match=said):
            await put(client, "x", CONTENT)
        assert len(server.asked) < 30


async def test_a_second_cancel_does_not_wait(pieces: int) -> None:
    script, stuck = Careful(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def read(offset: int, length: int) -> bytes:
        loop.call_soon_threadsafe(stuck.set)
        return CONTENT[offset : offset + length]

    async with odd(script) as server, Registry.open(server.address, config=CONFIG) as client:
        server.script = lambda request: script(request) if request.method == "POST" else Answer(202, b"", claim=1)  # its body never comes
        sending = asyncio.ensure_future(client.upload("x", DIGEST, len(CONTENT), read, lambda done: None))
        await stuck.wait()
        for _ in range(2):
            await asyncio.sleep(0)
            sending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            async with asyncio.timeout(upload.GRACE - 2):
                await sending
        assert sending.cancelled()
