"""The registry client against docker-registry: documents, ranges, uploads, logins, tokens, certificates, mirrors."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ramet.errors import HostError, ImageError
from ramet.reference import OCI_MANIFEST
from ramet.registry import credentials, upload
from ramet.registry.client import Registry
from ramet.registry.config import Config, Mirror, Rule
from ramet.registry.credentials import Credentials

from .conftest import DEADLINE, Tokens
from .conftest import Registry as Server
from .tokens import REFRESH

MEGA = 1 << 20
CONFIG = Config()  # nothing of this host's


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No logins but those that a test makes, in the directory returned."""
    for name in ("REGISTRY_AUTH_FILE", "RAMET_REGISTRY", "RAMET_REGISTRY_USER", "RAMET_REGISTRY_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    for name in ("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "DOCKER_CONFIG"):
        monkeypatch.setenv(name, str(tmp_path / "logins"))
    return tmp_path / "logins"


def data(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def digest_of(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


async def put(registry: Registry, path: str, content: bytes) -> str:
    digest = digest_of(content)
    await registry.upload(path, digest, len(content), lambda offset, length: content[offset : offset + length], lambda done: None)
    return digest


async def part(registry: Registry, path: str, digest: str, offset: int, length: int) -> bytes:
    async with contextlib.aclosing(registry.stream(path, digest, offset, length)) as pieces:
        return b"".join([piece async for piece in pieces])


def manifest(config: bytes, *layers: bytes) -> bytes:
    def named(content: bytes) -> dict[str, object]:
        return {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest_of(content), "size": len(content)}

    return json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": named(config), "layers": [*map(named, layers)]}).encode()


async def test_what_is_written_can_be_read(registry: Server) -> None:
    config, layer = b"{}", data(3 * MEGA)
    async with Registry.open(registry.address, config=CONFIG) as client:
        for content in (config, layer, b""):
            digest = await put(client, "acme/shop", content)
            assert await client.has("acme/shop", digest) == len(content)
            assert await client.blob("acme/shop", digest, len(content)) == content
            assert registry.blob(digest).read_bytes() == content
        document = manifest(config, layer)
        digest = await client.put_manifest("acme/shop", "v1.0", document, OCI_MANIFEST)
        assert await client.put_manifest("acme/shop", digest, document, OCI_MANIFEST) == digest
        assert await client.manifest("acme/shop", "v1.0") == await client.manifest("acme/shop", digest) == (digest, document)
    inspect = ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{registry.address}/acme/shop:v1.0"]
    read = await asyncio.to_thread(subprocess.run, inspect, check=True, capture_output=True, timeout=DEADLINE)
    assert read.stdout == document


async def test_any_range(registry: Server) -> None:
    content = data(5 * MEGA)
    chosen = random.Random(1)
    ranges = [(0, len(content)), (0, 1), (len(content) - 1, 1), (17, 0)]
    ranges += [(offset := chosen.randrange(len(content)), chosen.randrange(len(content) - offset)) for _ in range(20)]
    async with Registry.open(registry.address, config=CONFIG) as client:
        digest = await put(client, "x", content)
        found = await asyncio.gather(*(part(client, "x", digest, *each) for each in ranges))
        assert found == [content[offset : offset + length] for offset, length in ranges]
        with pytest.raises(ImageError):
            await part(client, "x", digest, len(content), 1)


async def test_a_range_that_goes_beyond_the_end_is_an_error(registry: Server) -> None:
    content = data(1000)
    async with Registry.open(registry.address, config=CONFIG, deadline=0) as client:
        digest = await put(client, "x", content)
        with pytest.raises((ImageError, HostError)):
            await part(client, "x", digest, 900, 101)


async def test_a_reader_that_leaves_early_leaves_nothing_behind(registry: Server) -> None:
    async with Registry.open(registry.address, config=CONFIG) as client:
        digest = await put(client, "x", data(8 * MEGA))
        for _ in range(3):
            async with contextlib.aclosing(client.stream("x", digest, 5, 7 * MEGA)) as pieces:
                assert await anext(pieces)
        reading = [asyncio.ensure_future(part(client, "x", digest, 0, 8 * MEGA)) for _ in range(8)]
        await asyncio.wait(reading, timeout=0.01)
        for each in reading:
            each.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        assert len(await part(client, "x", digest, 0, 8 * MEGA)) == 8 * MEGA


async def test_what_is_not_there_is_named(registry: Server) -> None:
    none = digest_of(b"none")
    async with Registry.open(registry.address, config=CONFIG) as client:
        assert await client.has("acme/none", none) is None
        for ask in (
            client.manifest("acme/none", "v1"),
            client.manifest("acme/none", none),
            client.blob("acme/none", none, 10),
            part(client, "acme/none", none, 0, 10),
        ):
            with pytest.raises(ImageError, match=rf"{registry.address}/acme/none.*not there"):
                await ask
        with pytest.raises(ImageError, match="cannot be written"):
            await client.put_manifest("acme/none", "v1", manifest(b"not uploaded"), OCI_MANIFEST)


@pytest.mark.parametrize("path", ["", "..", "a/../b", "A", "a//b", "/a", "a?x=", "a%2f", "a" * 256])
async def test_what_is_no_name_is_not_asked_for(path: str) -> None:
    async with Registry.open("127.0.0.1:1", config=CONFIG) as client:
        for ask in (client.manifest(path, "v1"), client.has(path, digest_of(b"")), client.blob(path, digest_of(b""), 1)):
            with pytest.raises(ImageError, match="not a repository's name"):
                await ask
        with pytest.raises(ImageError, match="neither a tag nor a digest"):
            await client.manifest("x", "../v1")
        with pytest.raises(ImageError, match="not a sha256 digest"):
            await client.has("x", "sha256:../../x")


@pytest.mark.parametrize("host", ["", "..", "a/b", "a@b", "a b", "https://a", "a:b"])
async def test_what_is_no_registry(host: str) -> None:
    with pytest.raises(ImageError, match="not a registry's name"):
        async with Registry.open(host, config=CONFIG):
            pass


async def test_a_registry_that_is_not_there(registry: Server) -> None:
    assert registry.process
    registry.process.kill()
    registry.process.wait(DEADLINE)
    async with Registry.open(registry.address, config=CONFIG, deadline=1.5) as client:
        with pytest.raises(HostError, match="cannot be reached") as raised:
            await client.manifest("x", "v1")
    assert raised.value.details == {"registry": registry.address, "status": 0, "retry_after": 0.0}


async def test_wrong_bytes_are_refused(registry: Server) -> None:
    content = data(1000)
    async with Registry.open(registry.address, config=CONFIG) as client:
        digest = await put(client, "x", content)
        registry.blob(digest).write_bytes(bytes(1000))
        with pytest.raises(ImageError, match="digest mismatch"):
            await client.blob("x", digest, 1000)
        with pytest.raises(ImageError, match="more than 999 bytes"):
            await client.blob("x", digest, 999)


async def test_a_blob_is_mounted_from_another_repository(registry: Server) -> None:
    content = data(1000)
    async with Registry.open(registry.address, config=CONFIG) as client:
        digest = await put(client, "acme/one", content)
        assert await client.has("acme/two", digest) is None
        assert await client.mount("acme/two", digest, "acme/one")
        assert await client.has("acme/two", digest) == 1000
        assert not await client.mount("acme/two", digest_of(b"none"), "acme/one")
    assert list(registry.data.glob("**/_uploads/*/data")) == []  # what was begun in its place is given up


# uploads


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    """Uploads in small pieces; how large one is."""
    monkeypatch.setattr(upload, "PIECE", MEGA)
    monkeypatch.setattr(upload, "_READ", MEGA // 4)
    return MEGA


async def test_an_upload_in_pieces(registry: Server, pieces: int) -> None:
    content, told, places = data(3 * pieces + 5), [], []
    async with Registry.open(registry.address, config=CONFIG) as client:

        def read(offset: int, length: int) -> bytes:
            return content[offset : offset + length]

        await client.upload("x", digest_of(content), len(content), read, told.append, at=places.append)
        assert await client.has("x", digest_of(content)) == len(content)
    assert told == sorted(told) and told[-1] == len(content)
    assert len(set(places)) == 6 and places[-1] == ""  # begun, four pieces, done


async def test_a_cancelled_upload_goes_on_where_it_was(registry: Server, pieces: int) -> None:
    content, places, asked = data(4 * pieces), [], []
    reached = asyncio.Event()
    loop = asyncio.get_running_loop()

    def read(offset: int, length: int) -> bytes:
        asked.append(offset)
        if offset >= pieces:
            loop.call_soon_threadsafe(reached.set)
        return content[offset : offset + length]

    async with Registry.open(registry.address, config=CONFIG) as client:
        sending = asyncio.ensure_future(client.upload("x", digest_of(content), len(content), read, lambda done: None, at=places.append))
        await reached.wait()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
    sent, asked[:] = max(asked), []
    assert pieces <= sent < len(content) and places[-1]
    async with Registry.open(registry.address, config=CONFIG) as client:
        await client.upload("x", digest_of(content), len(content), read, lambda done: None, resume=places[-1], at=places.append)
        assert await client.has("x", digest_of(content)) == len(content)
    assert min(asked) > sent


@pytest.mark.parametrize("location", ["/v2/x/blobs/uploads/none?_state=x", "http://127.0.0.1:1/v2/x", "::::", "file:///x", "cut", "gone"])
async def test_an_upload_that_is_forgotten_begins_anew(registry: Server, pieces: int, location: str) -> None:
    content = data(2 * pieces)

    def read(offset: int, length: int) -> bytes:
        return content[offset : offset + length]

    def broken(offset: int, length: int) -> bytes:
        return read(offset, length) if offset < pieces // 2 else os.read(-1, 1)

    if location in ("cut", "gone"):
        async with Registry.open(registry.address, config=CONFIG) as client:
            places: list[str] = []
            with pytest.raises(OSError):
                await client.upload("x", digest_of(content), len(content), broken, lambda done: None, at=places.append)
        if location == "gone":
            next(registry.data.glob("**/_uploads")).rename(registry.data / "away")
        location = places[-1]
    async with Registry.open(registry.address, config=CONFIG, deadline=0 if ":1/" not in location else 5) as client:
        await client.upload("x", digest_of(content), len(content), read, lambda done: None, resume=location)
        assert await client.has("x", digest_of(content)) == len(content)


@pytest.mark.parametrize("size", [1000, 3 * MEGA])
async def test_a_blob_that_is_not_what_its_digest_says_is_not_uploaded(registry: Server, pieces: int, size: int) -> None:
    content = data(size)
    async with Registry.open(registry.address, config=CONFIG) as client:
        with pytest.raises(ImageError, match=r"cannot be uploaded.*[dD]igest"):
            await client.upload("x", digest_of(b"other"), size, lambda offset, length: content[offset : offset + length], lambda done: None)
        with pytest.raises(ImageError, match="shorter"):
            await client.upload("x", digest_of(b"other"), size, lambda offset, length: b"", lambda done: None)


# who we are


async def test_a_login_by_password(registries: Callable[..., Server], nobody: Path) -> None:
    server = registries(credentials="user:secret")
    async with Registry.open(server.address, config=CONFIG) as client:
        with pytest.raises(ImageError, match="refuses access") as raised:
            await client.manifest("x", "v1")
        assert f"skopeo login {server.address}" in raised.value.hint
        server.login(nobody)  # counts at once
        digest = await put(client, "x", b"content")
        assert await client.blob("x", digest, 10) == b"content"
        shutil.rmtree(nobody)  # and as long as it is known
        assert await client.has("x", digest) == 7


async def test_a_wrong_password(registries: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    server = registries(credentials="user:secret")
    monkeypatch.setenv("RAMET_REGISTRY", server.address)
    monkeypatch.setenv("RAMET_REGISTRY_USER", "user")
    monkeypatch.setenv("RAMET_REGISTRY_PASSWORD", "wrong")
    async with Registry.open(server.address, config=CONFIG) as client:
        with pytest.raises(ImageError, match="refuses access"):
            await client.has("x", digest_of(b""))
        monkeypatch.setenv("RAMET_REGISTRY_PASSWORD", "secret")
        assert await client.has("x", digest_of(b"")) is None


def known(server: Server, tokens: Tokens, place: Path, entry: dict[str, str] | None = None) -> None:
    if entry is None:
        Server(address=server.address, data=server.data, credentials=tokens.credentials).login(place)
    else:
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text(json.dumps({"auths": {server.address: entry}}))


async def test_tokens_are_asked_for_once(registries: Callable[..., Server], tokens: Tokens, nobody: Path) -> None:
    server = registries(tokens=tokens)
    known(server, tokens, nobody)
    async with Registry.open(server.address, config=CONFIG) as client:
        digest = await put(client, "acme/shop", b"content")
        assert await client.mount("acme/other", digest, "acme/shop")
        assert tokens.asked[:2] == [["repository:acme/shop:pull,push"], ["repository:acme/other:pull,push", "repository:acme/shop:pull"]]
        asked = len(tokens.asked)
        found = await asyncio.gather(*(part(client, "acme/other", digest, 0, 7) for _ in range(10)))
        assert set(found) == {b"content"}
        assert tokens.asked[asked:] == [["repository:acme/other:pull"]]


async def test_nobody_may_read_what_is_public(registries: Callable[..., Server], tokens: Tokens, nobody: Path) -> None:
    server = registries(tokens=tokens)
    known(server, tokens, nobody)
    async with Registry.open(server.address, config=CONFIG) as client:
        digest = await put(client, "public/x", b"content")
        await put(client, "private/x", b"content")
    (nobody / "config.json").unlink()
    async with Registry.open(server.address, config=CONFIG) as client:
        assert await client.blob("public/x", digest, 10) == b"content"
        for ask in (client.blob("private/x", digest, 10), put(client, "public/x", b"other")):
            with pytest.raises(ImageError, match="refuses access"):
                await ask
        assert not await client.mount("public/y", digest, "private/x")
    known(server, Tokens(credentials="user:wrong", key=tokens.key, certificate=tokens.certificate), nobody)
    async with Registry.open(server.address, config=CONFIG) as client:
        with pytest.raises(ImageError, match=r"token server.*refuses.*wrong password"):
            await client.blob("public/x", digest, 10)


async def test_a_token_that_has_expired_is_replaced(registries: Callable[..., Server], tokens: Tokens, nobody: Path) -> None:
    server = registries(tokens=tokens)
    known(server, tokens, nobody)
    tokens.lasts = 0
    async with Registry.open(server.address, config=CONFIG) as client:
        digest = await put(client, "x", b"content")
        asked = len(tokens.asked)
        for _ in range(3):
            assert await client.blob("x", digest, 10) == b"content"
        assert len(tokens.asked) == asked + 3


async def test_an_identity_token_is_exchanged(registries: Callable[..., Server], tokens: Tokens, nobody: Path) -> None:
    server = registries(tokens=tokens)
    known(server, tokens, nobody, {"identitytoken": REFRESH})
    async with Registry.open(server.address, config=CONFIG) as client:
        digest = await put(client, "x", b"content")
    known(server, tokens, nobody, {"identitytoken": "expired"})
    async with Registry.open(server.address, config=CONFIG) as client:
        with pytest.raises(ImageError, match="no such refresh token"):
            await client.blob("x", digest, 10)
    known(server, tokens, nobody, {"registrytoken": tokens.token("me", ["repository:x:pull"])})
    async with Registry.open(server.address, config=CONFIG) as client:
        assert await client.blob("x", digest, 10) == b"content"


def helper(directory: Path, name: str, body: str) -> None:
    directory.mkdir(exist_ok=True)
    file = directory / f"docker-credential-{name}"
    file.write_text(f'#!/bin/sh\nread -r host\necho "$1 $host" >> {directory}/asked\n{body}\n')
    file.chmod(0o755)


async def test_credential_helpers(tmp_path: Path, nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("AWS_PROFILE", "work")
    helper(programs, "cloud", 'echo "{\\"ServerURL\\":\\"$host\\",\\"Username\\":\\"$AWS_PROFILE\\",\\"Secret\\":\\"s3\\"}"')
    helper(programs, "store", 'echo "{\\"Username\\":\\"<token>\\",\\"Secret\\":\\"refresh\\"}"')
    helper(programs, "empty", "echo credentials not found in native keychain; exit 1")
    helper(programs, "broken", "echo locked >&2; exit 1")
    nobody.mkdir()
    config = nobody / "config.json"
    config.write_text(json.dumps({"credHelpers": {"cloud.example": "cloud"}, "credsStore": "store", "auths": {"cloud.example": {}}}))
    assert await credentials.find("cloud.example", "x") == Credentials(user="work", password="s3")
    assert await credentials.find("docker.io", "x") == Credentials(identity="refresh")
    assert (programs / "asked").read_text().splitlines() == ["get cloud.example", "get https://index.docker.io/v1/"]
    config.write_text(json.dumps({"credsStore": "empty", "auths": {"a.example": {"username": "u", "password": "p"}}}))
    assert await credentials.find("a.example", "x") == Credentials(user="u", password="p")
    for name, said in (("broken", "locked"), ("missing", "not installed"), ("../x", "not a credential helper's name")):
        config.write_text(json.dumps({"credsStore": name}))
        with pytest.raises(HostError, match=said):
            await credentials.find("a.example", "x")


# certificates, mirrors


async def test_certificates_of_certs_d(registries: Callable[..., Server], tmp_path: Path) -> None:
    server = registries(tls=True)
    trusted = Config(certs=(tmp_path / "certs.d",))
    place = tmp_path / "certs.d" / server.address
    place.mkdir(parents=True)
    async with Registry.open(server.address, config=trusted) as client:
        with pytest.raises(ImageError, match="certificate does not verify") as raised:
            await client.has("x", digest_of(b""))
        assert f"certs.d/{server.address}/ca.crt" in raised.value.hint
        shutil.copy(server.certificate, place / "ca.crt")  # counts at once
        content = data(3 * MEGA)
        digest = await put(client, "x", content)
        assert await part(client, "x", digest, 5, 2 * MEGA) == content[5 : 5 + 2 * MEGA]
    (place / "ca.crt").write_text("no certificate")
    async with Registry.open(server.address, config=trusted) as client:
        with pytest.raises(HostError, match=r"certificates for .* cannot be read"):
            await client.has("x", digest)
    async with Registry.open(server.address, config=CONFIG) as client:
        with pytest.raises(ImageError, match="HTTPS server"):
            await client.blob("x", digest, 10)


async def test_a_registry_without_tls_where_tls_is_wanted(registry: Server, tmp_path: Path) -> None:
    (tmp_path / "certs.d" / registry.address).mkdir(parents=True)
    async with Registry.open(registry.address, config=Config(certs=(tmp_path / "certs.d",))) as client:
        with pytest.raises(ImageError, match="speaks no TLS"):
            await client.has("x", digest_of(b""))


async def test_mirrors_are_read_from_and_the_registry_itself_is_written_to(registries: Callable[..., Server]) -> None:
    mirror, empty, own = registries(), registries(), registries()
    async with Registry.open(mirror.address, config=CONFIG) as client:
        digest = await put(client, "copies/acme/shop", b"content")
        await put(client, "copies/acme/shop", b"{}")
        named = await client.put_manifest("copies/acme/shop", "v1", manifest(b"{}"), OCI_MANIFEST)
    mirrors = tuple(Mirror(location=place) for place in ("127.0.0.1:1", f"{empty.address}/nothing", f"{mirror.address}/copies"))
    config = Config(rules=(Rule(prefix=own.address, location=own.address, mirrors=mirrors),))
    async with Registry.open(own.address, config=config) as client:
        assert await client.blob("acme/shop", digest, 10) == b"content"
        assert await part(client, "acme/shop", digest, 2, 3) == b"nte"
        assert await client.manifest("acme/shop", "v1") == (named, manifest(b"{}"))
        assert await client.has("acme/shop", digest) is None
        other = await put(client, "acme/shop", b"other")
        assert await client.blob("acme/shop", other, 10) == b"other"
        assert own.blob(other).exists() and not mirror.blob(other).exists()
        mirror.blob(digest).write_bytes(b"tampered")
        with pytest.raises(ImageError, match=rf"{own.address}/acme/shop@{digest}: not there"):
            await client.blob("acme/shop", digest, 10)
