"""Real programs for the tests of this tier: a registry on loopback, a user without privileges."""

from __future__ import annotations

import base64
import json
import os
import pwd
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ramet.paths import StateDir

from .layouts import Layout

DEADLINE = 60.0


@dataclass(frozen=True, kw_only=True)
class Registry:
    """A docker-registry that runs. address: host:port; data: where it keeps its blobs, for a test to damage them."""

    address: str
    data: Path
    credentials: str = ""

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
    """The address that a registry logs once it listens; afterwards its log is for nobody."""
    assert process.stderr is not None
    seen: list[str] = []
    end = time.monotonic() + DEADLINE
    while select.select([process.stderr], [], [], max(0.0, end - time.monotonic()))[0] and (line := process.stderr.readline()):
        seen.append(line)
        if found := re.search(r"listening on (127\.0\.0\.1:\d+)", line):
            return found[1]
    raise AssertionError("the registry does not listen: " + "".join(seen))


@pytest.fixture
def registries(tmp_path: Path) -> Iterator[Callable[..., Registry]]:
    """Starts registries on free ports of loopback. credentials (`user:password`): ask for them. tls: with a certificate that nobody trusts."""
    need("docker-registry", "skopeo")
    started: list[subprocess.Popen[str]] = []

    def start(*, credentials: str = "", tls: bool = False) -> Registry:
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
        if tls:
            need("openssl")
            make = [
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-subj",
                "/CN=localhost",
                "-addext",
                "subjectAltName=IP:127.0.0.1",
                "-days",
                "2",
            ]
            paths = {"key": str(root / "key.pem"), "certificate": str(root / "cert.pem")}
            command = [*make, "-keyout", paths["key"], "-out", paths["certificate"]]
            subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE)
            config["http"]["tls"] = paths
        file = root / "config.yml"
        file.write_text(json.dumps(config))  # JSON is YAML
        process = subprocess.Popen(["docker-registry", "serve", str(file)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        started.append(process)
        return Registry(address=_listening(process), data=root / "data", credentials=credentials)

    yield start
    for process in started:
        process.kill()
        process.wait(DEADLINE)
        assert process.stderr is not None
        process.stderr.close()


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


@dataclass(frozen=True, kw_only=True)
class User:
    """A user without privileges, with a home that is a state directory's parent too."""

    name: str
    uid: int
    gid: int
    home: Path

    def python(self, script: str, *arguments: str, timeout: float = DEADLINE) -> subprocess.CompletedProcess[str]:
        """Run a Python script as this user, with the packages that this process has."""
        become = ["setpriv", f"--reuid={self.uid}", f"--regid={self.gid}", "--init-groups", "--inh-caps=-all"]
        env = {
            "HOME": str(self.home),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": ":".join(filter(None, sys.path)),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [*become, sys.executable, "-c", script, *arguments]
        return subprocess.run(command, env=env, cwd=self.home, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def user() -> Iterator[User]:
    """A temporary user with subordinate ids; needs root."""
    if os.geteuid() != 0:
        pytest.skip("making a temporary user needs root")
    need("useradd", "userdel", "usermod", "setpriv", "newuidmap")
    name = f"ramet-t{os.getpid()}"
    home = Path(tempfile.mkdtemp(prefix="ramet-test-"))  # not below tmp_path, which is root's alone
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
        subprocess.run(["userdel", name], check=True, timeout=DEADLINE)
        shutil.rmtree(home)
