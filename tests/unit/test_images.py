"""What names, manifests, configs and sizes mean; nothing is started."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet import debian, locks, oci, skopeo, tree, userns
from ramet.errors import CommandError, HostError, ImageError, NoSpaceError
from ramet.model import ImageConfig
from ramet.reference import Debian, Local, Registry, parse, sha256

SHA = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "transport"),
    [
        ("alpine:3", "docker://docker.io/library/alpine:3"),
        ("alpine", "docker://docker.io/library/alpine:latest"),
        ("acme/shop:1.2", "docker://docker.io/acme/shop:1.2"),
        ("docker.io/library/debian:bookworm", "docker://docker.io/library/debian:bookworm"),
        ("docker.io/debian:bookworm", "docker://docker.io/library/debian:bookworm"),
        ("docker://debian:bookworm", "docker://docker.io/library/debian:bookworm"),
        (f"debian@{SHA}", f"docker://docker.io/library/debian@{SHA}"),
        ("ghcr.io/acme/shop", "docker://ghcr.io/acme/shop:latest"),
        (f"ghcr.io/acme/shop:v1@{SHA}", f"docker://ghcr.io/acme/shop@{SHA}"),
        ("localhost/x", "docker://localhost/x:latest"),
        ("localhost:5000/x/y/z:t", "docker://localhost:5000/x/y/z:t"),
        ("127.0.0.1:5000/x", "docker://127.0.0.1:5000/x:latest"),
        ("[::1]:5000/x", "docker://[::1]:5000/x:latest"),
        ("myhost:5000/debian:bookworm", "docker://myhost:5000/debian:bookworm"),
    ],
)
def test_registry_references(text: str, transport: str) -> None:
    source = parse(text)
    assert isinstance(source, Registry)
    assert (source.transport, source.reference) == (transport, text)


@pytest.mark.parametrize(
    ("text", "suite"),
    [
        ("debian:bookworm", "bookworm"),
        ("debian:12", "bookworm"),
        ("debian:13", "trixie"),
        ("debian:unstable", "sid"),
        ("debian:stable", "stable"),
        ("debian", "bookworm"),
    ],
)
def test_debian_without_a_registry_is_ours(text: str, suite: str) -> None:
    assert parse(text) == Debian(reference=text, suite=suite)


def test_an_unknown_suite_points_at_the_hub() -> None:
    with pytest.raises(ImageError) as caught:
        parse("debian:bookworm-slim")
    assert "docker.io/library/debian:bookworm-slim" in caught.value.hint


@pytest.mark.parametrize("text", ["oci:/srv/x:latest", "oci-archive:/x.tar", "docker-archive:/x.tar:a/b:1"])
def test_local_references(text: str) -> None:
    assert parse(text) == Local(reference=text, transport=text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Alpine",
        "alpine:",
        "a//b",
        "alpine:3 ",
        "-x",
        "--help",
        "docker://",
        "x@sha256:abc",
        "x@md5:" + "a" * 32,
        "oci:relative",
        "a:b:c",
        "al\npine",
        "../etc",
        "x" + chr(0),
    ],
)
def test_bad_references(text: str) -> None:
    with pytest.raises(ImageError) as caught:
        parse(text)
    assert caught.value.hint


@given(st.text(max_size=60))
def test_any_text_parses_or_is_an_image_error(text: str) -> None:
    try:
        source = parse(text)
    except ImageError:
        return
    if isinstance(source, Registry):
        assert not any(c.isspace() or c in "\0'\"`$;|&" for c in source.transport)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("localhost:5000", True),
        ("127.0.0.1:1", True),
        ("127.9.9.9", True),
        ("[::1]:5000", True),
        ("ghcr.io", False),
        ("10.0.0.1:5000", False),
        ("localhost.evil.org", False),
        ("127.0.0.1.evil.org", False),
    ],
)
def test_only_this_host_may_do_without_tls(host: str, loopback: bool) -> None:
    source = parse(f"{host}/x")
    assert isinstance(source, Registry)
    assert source.loopback is loopback
    assert ("--tls-verify=false" in skopeo._options(source)) is loopback


def test_credentials_of_docker_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = parse("ghcr.io/x")
    assert isinstance(source, Registry)
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    assert skopeo._options(source) == []
    (tmp_path / "config.json").write_text("{}")
    assert skopeo._options(source, "src-") == [f"--src-authfile={tmp_path}/config.json"]
    monkeypatch.setenv("REGISTRY_AUTH_FILE", "/elsewhere")
    assert skopeo._options(source) == []


def test_settings_of_a_config() -> None:
    runtime = {
        "Env": ["A=1", "B=x=y", "C=", "bad", "=bad"],
        "User": "app:staff",
        "WorkingDir": "/srv",
        "Entrypoint": ["/run"],
        "Cmd": None,
        "Labels": {"a": "b"},
    }
    config = oci.read(oci.Config, json.dumps({"architecture": "amd64", "os": "linux", "config": runtime, "rootfs": {}}), "x")
    assert oci.settings(config) == ImageConfig(
        env={"A": "1", "B": "x=y", "C": ""}, user="app:staff", workdir="/srv", entrypoint=("/run",), cmd=()
    )
    assert oci.settings(oci.Config()) == ImageConfig()
    with pytest.raises(ImageError, match=r"config\.Env"):
        oci.read(oci.Config, '{"config": {"Env": "A=1"}}', "x")


def _index(*platforms: tuple[str, str]) -> str:
    entries = [
        {"digest": "sha256:" + f"{n}" * 64, "size": 1, "platform": {"os": o, "architecture": a}} for n, (o, a) in enumerate(platforms)
    ]
    return json.dumps({"schemaVersion": 2, "manifests": entries})


def test_choosing_from_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oci, "architecture", lambda: "amd64")
    chosen = oci.choose(_index(("linux", "arm64"), ("windows", "amd64"), ("linux", "amd64")), "x")
    assert chosen.digest == "sha256:" + "2" * 64  # type: ignore[union-attr]
    with pytest.raises(ImageError, match=r"linux/amd64; it offers linux/arm64, linux/s390x"):
        oci.choose(_index(("linux", "s390x"), ("linux", "arm64"), ("unknown", "unknown")), "image x")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("nonsense", "not JSON"),
        ("[]", "not an object"),
        ('{"schemaVersion": 1}', "schema 1"),
        ("{}", "config: Field required"),
        (json.dumps({"config": {"digest": "sha256:../../../etc/passwd", "size": 1}, "layers": []}), "config.digest"),
        (json.dumps({"config": {"digest": SHA, "size": -1}, "layers": []}), "config.size"),
        (json.dumps({"config": {"digest": SHA, "size": 1}, "layers": [{"digest": "md5:aa", "size": 1}]}), r"layers\.0\.digest"),
        (json.dumps({"manifests": 7}), "manifests"),
    ],
)
def test_bad_manifests_name_what_is_wrong(data: str, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        oci.choose(data, "image x")


KEYS = st.sampled_from(["manifests", "config", "layers", "digest", "size", "mediaType", "platform", "os"])
json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda s: st.lists(s, max_size=3) | st.dictionaries(KEYS, s, max_size=4),
)


@given(json_values)
def test_hostile_manifests_are_image_errors(value: Any) -> None:
    data = json.dumps(value)
    for kind in (oci.Config, oci.Manifest, oci.Index):
        with contextlib.suppress(ImageError):
            oci.read(kind, data, "x")
    with contextlib.suppress(ImageError):
        oci.choose(data, "x")


def test_verify_finds_every_damage(tmp_path: Path) -> None:
    good = oci.Descriptor(digest=sha256(b"hello"), size=5)
    path = oci.blob(tmp_path, good)
    path.parent.mkdir(parents=True)
    with pytest.raises(ImageError, match="missing"):
        oci.verify(tmp_path, good, "x")
    path.write_bytes(b"hell")
    with pytest.raises(ImageError, match="4 bytes instead of 5"):
        oci.verify(tmp_path, good, "x")
    path.write_bytes(b"jello")
    with pytest.raises(ImageError, match="digest mismatch"):
        oci.verify(tmp_path, good, "x")
    path.write_bytes(b"hello")
    assert oci.verify(tmp_path, good, "x") == path


@pytest.mark.parametrize(
    ("log", "says"),
    [
        ("reading manifest nope in localhost:1/x: manifest unknown: manifest unknown", "no such tag"),
        ("name unknown: repository name not known to registry", "no such image"),
        ("unauthorized: authentication required", "login"),
        ("pinging container registry x: Get https://x/v2/: x509: certificate signed by unknown authority", "certificate"),
        ("pinging container registry x: http: server gave HTTP response to HTTPS client", "no TLS"),
        ("pinging container registry x: dial tcp: lookup x: no such host", "cannot be reached"),
        ("writing blob: happened during read: Digest did not match, expected a, got b", "digest mismatch"),
        ("writing blob: happened during read: unexpected EOF", "truncated"),
        ("toomanyrequests: You have reached your pull rate limit", "too many requests"),
        ("something never seen", "something never seen"),
    ],
)
def test_what_skopeo_says(log: str, says: str) -> None:
    source = parse("ghcr.io/acme/x:1")
    assert isinstance(source, Registry)
    failed = CommandError("skopeo failed: " + log, details={"log": log}, hint="see")
    error = skopeo.explain(source, failed)
    assert isinstance(error, ImageError)
    assert says in error.message
    assert "ghcr.io/acme/x:1" in error.message
    assert error.hint
    assert "{" not in error.hint


def test_usage_counts_hard_links_once_and_holes_not_at_all() -> None:
    listing = [
        "d 4096 8 2 1:1",
        "f 5000 16 2 1:2",
        "f 5000 16 2 1:2",
        "f 1000000000 8 1 1:3",
        "l 5 0 1 1:4",
        "l 100 8 1 1:5",
        "c 0 0 1 1:6",
        "d 40 0 2 1:7",
    ]
    assert tree.sum_up(listing) == tree.Usage(data=4096 + 8192 + 4096 + 4096 + 4096, inodes=7)
    assert tree.sum_up([]) == tree.Usage(data=0, inodes=0)


@given(st.integers(0, 1 << 40), st.integers(0, 10_000_000))
def test_a_disk_has_room_for_its_tree(data: int, inodes: int) -> None:
    size = tree.disk_size(tree.Usage(data=data, inodes=inodes))
    assert size % tree.GROUP == 0
    assert size // tree.INODE_RATIO > inodes
    assert size > data * 1.05 + tree.JOURNAL
    assert size < max(data * 1.1, inodes * 1.1 * tree.INODE_RATIO) + inodes * 100 + (256 << 20)


def test_debian_digest_depends_on_what_goes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    twelve = debian.digest(Debian(reference="debian:12", suite="bookworm"), "amd64")
    codename = debian.digest(Debian(reference="debian:bookworm", suite="bookworm"), "amd64")
    assert twelve == codename
    others = {
        debian.digest(Debian(reference="x", suite="trixie"), "amd64"),
        debian.digest(Debian(reference="x", suite="bookworm"), "arm64"),
    }
    monkeypatch.setattr(debian, "PACKAGES", (*debian.PACKAGES, "git"))
    others.add(debian.digest(Debian(reference="x", suite="bookworm"), "amd64"))
    assert len(others | {twelve}) == 4


def test_debian_mirrors() -> None:
    assert debian.sources("bookworm", "") == []
    assert debian.sources("sid", "http://m/debian/") == ["deb http://m/debian sid main"]
    assert debian.sources("trixie", "http://m/debian")[2] == "deb http://m/debian-security trixie-security main"


@pytest.mark.parametrize(
    ("log", "kind", "says"),
    [
        ("dpkg: error: cannot copy: No space left on device\nE: apt failed", NoSpaceError, "no space"),
        ("Err: Temporary failure resolving 'mirror.example'\nE: x", ImageError, "cannot be reached"),
        ("E: The repository 'http://x bookwurm Release' does not have a Release file.", ImageError, "no suite"),
        ("W: GPG error: NO_PUBKEY 0E98", ImageError, "signature"),
        ("E: something else", CommandError, "failed"),
    ],
)
def test_what_mmdebstrap_says(log: str, kind: type[Exception], says: str) -> None:
    error = debian.explain(Debian(reference="debian:12", suite="bookworm"), log, CommandError("failed"))
    assert type(error) is kind
    assert says in error.message


def test_subordinate_ids() -> None:
    text = "# x\nalice:100000:65536\n1001:200000:1000\nbob:300000:65536\nalice:400000:1\n"
    assert userns.subordinate(text, "alice", 1000) == 65536
    assert userns.subordinate(text, "carol", 1001) == 1000
    assert userns.subordinate(text, "dave", 1002) == 0
    assert userns.subordinate("alice\nalice:x:y\n", "alice", 1000) == 0


def test_missing_programs_name_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userns.process, "find", lambda name: None if name in ("mke2fs", "newuidmap", "newgidmap") else "/bin/x")
    with pytest.raises(HostError) as caught:
        userns.require("skopeo", "mke2fs", "newuidmap", "newgidmap")
    assert "apt-get install e2fsprogs uidmap`" in caught.value.hint


async def test_an_exclusive_lock_excludes_and_cleans_up(tmp_path: Path) -> None:
    path, inside, most, waited = tmp_path / "lock", 0, 0, 0

    def on_wait() -> None:
        nonlocal waited
        waited += 1

    async def work() -> None:
        nonlocal inside, most
        async with locks.exclusive(path, on_wait):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.wait_for(asyncio.gather(*(work() for _ in range(20))), 30)
    assert (most, waited > 0, path.exists()) == (1, True, False)


async def test_a_cancelled_waiter_does_not_keep_the_lock(tmp_path: Path) -> None:
    path, waiting = tmp_path / "lock", asyncio.Event()

    async def wait() -> None:
        async with locks.exclusive(path, waiting.set):
            raise AssertionError("not reached")

    async with locks.exclusive(path):
        task = asyncio.create_task(wait())
        await asyncio.wait_for(waiting.wait(), 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    for thread in [t for t in threading.enumerate() if t.name == "flock"]:
        await asyncio.to_thread(thread.join, 30)
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)


def test_try_lock(tmp_path: Path) -> None:
    place = tmp_path / "place"
    assert locks.try_lock(place) is None
    place.mkdir()
    fd = locks.try_lock(place)
    assert fd is not None
    assert locks.try_lock(place) is None
    os.close(fd)
    fd = locks.try_lock(place)
    assert fd is not None
    shutil.rmtree(place)
    os.close(fd)
