"""Real programs for the tests of this tier: a registry on loopback, a user without privileges."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import pwd
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from ramet.paths import StateDir, StoreDir
from ramet.store import mounting

from .imaging import RICH, SETTINGS, working_in
from .layouts import Layout, make
from .tokens import Tokens
from .tokens import serving as tokens_served

DEADLINE = 60.0


def opened(pids: list[int], name: str) -> int:
    """How many files of this name processes have open, removed ones too."""
    found = 0
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found += name in str(fd.readlink())
    return found


@dataclass(frozen=True, kw_only=True)
class Registry:
    """A docker-registry that runs. address: host:port; data: where it keeps its blobs, for a test to damage them; certificate: of its own making."""

    address: str
    data: Path
    credentials: str = ""
    certificate: Path = Path()
    process: subprocess.Popen[str] | None = None

    def push(self, layout: Layout, name: str) -> str:
        """Copy an image into it (also every architecture of an index); returns the reference to it."""
        login = [f"--dest-creds={self.credentials}"] if self.credentials else []
        target = f"{self.address}/{name}"
        command = ["skopeo", "copy", "-q", "--all", "--dest-tls-verify=false", *login, layout.reference, f"docker://{target}"]
        subprocess.run(command, check=True, timeout=DEADLINE)
        return target

    def blob(self, digest: str) -> Path:
        hexed = digest.removeprefix("sha256:")
        return self.data / "docker/registry/v2/blobs/sha256" / hexed[:2] / hexed / "data"

    def login(self, directory: Path) -> Path:
        """Write a Docker `config.json` with its credentials into a directory."""
        directory.mkdir(exist_ok=True)
        token = base64.b64encode(self.credentials.encode()).decode()
        file = directory / "config.json"
        file.write_text(json.dumps({"auths": {self.address: {"auth": token}}}))
        return file


def need(*programs: str) -> None:
    """Skip, or in CI fail, where a program of the tier is missing."""
    if missing := [p for p in programs if not shutil.which(p, path=os.environ["PATH"] + ":/usr/sbin:/sbin")]:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"not installed: {', '.join(missing)}")


def _listening(process: subprocess.Popen[str]) -> str:
    """The address that a registry logs once it listens; a thread goes on reading its log, so that it never has to wait."""
    assert process.stderr is not None
    seen: list[str] = []
    address: queue.Queue[str] = queue.Queue()

    def read(log: IO[str]) -> None:
        for line in log:
            seen.append(line)
            if found := re.search(r"listening on (127\.0\.0\.1:\d+)", line):
                address.put(found[1])
        address.put("")
        log.close()

    threading.Thread(target=read, args=(process.stderr,), daemon=True).start()
    if found := address.get(timeout=DEADLINE):
        return found
    raise AssertionError("the registry does not listen: " + "".join(seen))


def certified(root: Path) -> tuple[Path, Path]:
    """A key, and a certificate for 127.0.0.1 that nobody trusts."""
    need("openssl")
    key, certificate = root / "key.pem", root / "cert.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True, timeout=DEADLINE)
    return key, certificate


@pytest.fixture
def tokens(tmp_path: Path) -> Iterator[Tokens]:
    """A token server, for registries that are to believe it."""
    place = tmp_path / "tokens"
    place.mkdir()
    key, certificate = certified(place)
    made = Tokens(credentials="user:secret", key=key, certificate=certificate)
    with tokens_served(made):
        yield made


@pytest.fixture
def registries(tmp_path: Path) -> Iterator[Callable[..., Registry]]:
    """Starts registries on free ports of loopback. credentials (`user:password`): ask for them. tls: with a certificate that nobody trusts.

    tokens: ask for tokens of that server. clients: a certificate that those who come must have.
    """
    need("docker-registry", "skopeo")
    started: list[subprocess.Popen[str]] = []

    def start(*, credentials: str = "", tls: bool = False, tokens: Tokens | None = None, clients: Path | None = None) -> Registry:
        root = tmp_path / f"registry{len(started)}"
        root.mkdir()
        config: dict[str, Any] = {
            "version": "0.1",
            "log": {"level": "info", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(root / "data")}, "delete": {"enabled": True}},
            "http": {"addr": "127.0.0.1:0", "secret": "test"},
        }
        if credentials:
            need("htpasswd")
            user, _, password = credentials.partition(":")
            file = root / "htpasswd"
            file.write_bytes(subprocess.run(["htpasswd", "-Bbn", user, password], check=True, capture_output=True, timeout=DEADLINE).stdout)
            config["auth"] = {"htpasswd": {"realm": "test", "path": str(file)}}
        if tokens:
            config["auth"] = tokens.settings()
        certificate = Path()
        if tls:
            key, certificate = certified(root)
            config["http"]["tls"] = {"key": str(key), "certificate": str(certificate)} | ({"clientcas": [str(clients)]} if clients else {})
        file = root / "config.yml"
        file.write_text(json.dumps(config))  # JSON is YAML
        process = subprocess.Popen(["docker-registry", "serve", str(file)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        started.append(process)
        return Registry(address=_listening(process), data=root / "data", credentials=credentials, certificate=certificate, process=process)

    yield start
    for process in started:
        process.kill()
        process.wait(DEADLINE)


@pytest.fixture
def registry(registries: Callable[..., Registry]) -> Registry:
    """A registry on loopback that lets everybody in."""
    return registries()


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    """A state directory of the test's own."""
    state = StateDir(root=tmp_path / "state")
    state.create()
    return state


@pytest.fixture
def files(state: StateDir) -> StoreDir:
    """Its store, where an image file system can serve it."""
    if reason := mounting.usable():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return state.store


@dataclass(kw_only=True)
class User:
    """A user without privileges, with a home that is a state directory's parent too."""

    name: str
    uid: int
    gid: int
    home: Path

    def python(self, script: str, *arguments: str, timeout: float = DEADLINE) -> subprocess.CompletedProcess[str]:
        """Run a Python script as this user, with the packages that this process has."""
        command = [*self._become, self.interpreter, "-c", script, *arguments]
        return subprocess.run(command, env=self._env, cwd=self.home, capture_output=True, text=True, timeout=timeout)

    @property
    def _become(self) -> list[str]:
        return ["setpriv", f"--reuid={self.uid}", f"--regid={self.gid}", "--init-groups", "--inh-caps=-all"]

    @property
    def _env(self) -> dict[str, str]:
        path = ":".join(filter(None, sys.path))
        return {"HOME": str(self.home), "PATH": os.environ["PATH"], "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}

    @functools.cached_property
    def interpreter(self) -> str:
        """A Python that this user may run: ours is sometimes in root's home."""
        for candidate in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
            command = [*self._become, candidate, "-c", "import asyncio, ramet.images"]
            if Path(candidate).exists() and subprocess.run(command, env=self._env, cwd=self.home, timeout=DEADLINE).returncode == 0:
                return candidate
        pytest.skip(
            f"{sys.executable} or its packages cannot be read by other users, and there is no /usr/bin/python3.{sys.version_info.minor}"
        )


@pytest.fixture
def user() -> Iterator[User]:
    """A temporary user with subordinate ids; needs root."""
    if os.geteuid() != 0:
        pytest.skip("making a temporary user needs root")
    need("useradd", "userdel", "usermod", "setpriv", "newuidmap")
    name = f"ramet-t{os.getpid()}"
    home = Path(tempfile.mkdtemp(prefix="ramet-test-", dir="/tmp"))  # not below tmp_path, which is root's alone
    subprocess.run(["useradd", "--no-create-home", "--home-dir", str(home), name], check=True, timeout=DEADLINE)
    try:
        entry = pwd.getpwnam(name)
        if not any(line.startswith(f"{name}:") for line in Path("/etc/subuid").read_text().splitlines()):
            subprocess.run(
                ["usermod", "--add-subuids", "900000-965535", "--add-subgids", "900000-965535", name], check=True, timeout=DEADLINE
            )
        os.chown(home, entry.pw_uid, entry.pw_gid)
        yield User(name=name, uid=entry.pw_uid, gid=entry.pw_gid, home=home)
    finally:
        deadline = time.monotonic() + DEADLINE
        while (ended := subprocess.run(["userdel", name], timeout=DEADLINE)).returncode == 8 and time.monotonic() < deadline:
            time.sleep(0.1)  # a process of the user's is still ending
        ended.check_returncode()
        shutil.rmtree(home)


@pytest.fixture
def image_programs() -> None:
    need("skopeo", "umoci", "mke2fs", "debugfs", "setpriv")


@pytest.fixture
def only_images_left(state: StateDir) -> Iterator[None]:
    """After every test, whatever it did: only published images, no lock, no process that works in the state directory."""
    yield
    left = [p.name for p in state.images.iterdir() if not re.fullmatch(r"sha256-[0-9a-f]{64}", p.name)]
    assert left == []
    for place in state.images.iterdir():
        assert sorted(p.name for p in place.iterdir()) == ["disk.raw", "image.json"]
    assert working_in(state.root) == []


@pytest.fixture
def rich(tmp_path: Path) -> Layout:
    return make(tmp_path / "rich", *RICH, config=SETTINGS)


@pytest.fixture
def tiny(state: StateDir) -> Iterator[Callable[[int], None]]:
    """Puts the images on a file system of so many KiB."""
    mounted = []

    def mount(kib: int) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", state.images], check=True)
        mounted.append(state.images)

    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)
