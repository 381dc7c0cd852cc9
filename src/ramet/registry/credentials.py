"""Who we are at a registry: what `skopeo login`, `podman login` and `docker login` left behind, and the environment.

Looked up anew each time, so that a login counts at once.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ramet import process
from ramet.errors import HostError
from ramet.reference import HUB

HELPER_DEADLINE = 60.0  # one may ask its user to unlock a keyring
_HELPER = re.compile(r"[A-Za-z0-9._-]+")
_FILE_LIMIT = 16 << 20
_TOKEN = "<token>"  # the user's name that stands for an identity token, github.com/docker/docker-credential-helpers
# What helpers need of the environment beyond what every program gets.
_HELPERS_OWN = re.compile(r"(AWS|AZURE|GOOGLE|CLOUDSDK|GNUPG|GPG|PASSWORD_STORE|DBUS)_?\w*")


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """identity: an OAuth2 refresh token, in place of a password; bearer: a token that is ready for use."""

    user: str = ""
    password: str = ""
    identity: str = ""
    bearer: str = ""

    @property
    def basic(self) -> str:
        """The Authorization header's value."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def _reads() -> list[Path]:
    """The files that may hold credentials, first the ones that count most."""
    if named := os.environ.get("REGISTRY_AUTH_FILE"):
        return [Path(named)]
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    config = os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()
    return [
        (Path(runtime) / "containers" if runtime else Path(f"/run/containers/{os.getuid()}")) / "auth.json",
        Path(config) / "containers/auth.json",
        Path(os.environ.get("DOCKER_CONFIG") or Path("~/.docker").expanduser()) / "config.json",
    ]


async def find(host: str, path: str) -> Credentials | None:
    """Those for a repository; None to be nobody. Raises HostError when a file or helper is broken."""
    if found := _environment(host):
        return found
    for file in _reads():
        document = _document(file)
        if found := await _helped(document, host) or _written(document, host, path, file):
            return found
    return None


def _environment(host: str) -> Credentials | None:
    """RAMET_REGISTRY_USER and RAMET_REGISTRY_PASSWORD, for the one registry that RAMET_REGISTRY names.

    Without that, any registry whatever that a reference names could ask for them.
    """
    user, password = os.environ.get("RAMET_REGISTRY_USER", ""), os.environ.get("RAMET_REGISTRY_PASSWORD", "")
    if not user and not password:
        return None
    meant = os.environ.get("RAMET_REGISTRY", "")
    if not meant:
        raise HostError(
            "RAMET_REGISTRY_USER and RAMET_REGISTRY_PASSWORD are set, but not which registry they are for",
            hint="Set RAMET_REGISTRY to its name, as ghcr.io or registry.example.com:5000.",
        )
    return Credentials(user=user, password=password) if meant == host else None


def _document(file: Path) -> dict[str, Any]:
    try:
        with open(file, "rb") as opened:
            found = json.loads(opened.read(_FILE_LIMIT))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return {}
    except (OSError, ValueError) as error:
        raise HostError(f"{file} cannot be read: {error}", hint="`skopeo login` or `docker login` writes it.") from error
    return found if isinstance(found, dict) else {}


def _keys(host: str, path: str) -> list[str]:
    """The keys that fit a repository, the most specific first."""
    parts = path.split("/")
    hosts = [host, "index.docker.io", "registry-1.docker.io"] if host == HUB else [host]
    return [f"{host}/{'/'.join(parts[:n])}" for n in range(len(parts), 0, -1)] + hosts


def _plain(key: str) -> str:
    """A key without what Docker puts around a host: `https://index.docker.io/v1/`."""
    scheme, found, rest = key.partition("://")
    return rest.partition("/")[0] if found and scheme in ("http", "https") else key.rstrip("/")


def _table(document: dict[str, Any], key: str) -> dict[str, Any]:
    found = document.get(key)
    return {_plain(str(name)): value for name, value in found.items()} if isinstance(found, dict) else {}


def _written(document: dict[str, Any], host: str, path: str, file: Path) -> Credentials | None:
    entries = _table(document, "auths")
    for key in _keys(host, path):
        if isinstance(entry := entries.get(key), dict) and entry:
            return _entry(entry, host, file)
    return None


def _entry(entry: dict[str, Any], host: str, file: Path) -> Credentials | None:
    def text(key: str) -> str:
        return str(entry.get(key) or "")

    user, password = text("username"), text("password")
    if encoded := text("auth"):
        try:
            user, _, password = base64.b64decode(encoded, validate=True).decode().strip("\0").partition(":")
        except (binascii.Error, UnicodeDecodeError) as error:
            raise HostError(f"{file}: the entry for {host} is damaged", hint=f"`skopeo login {host}` writes it anew.") from error
    found = Credentials(user=user, password=password, identity=text("identitytoken"), bearer=text("registrytoken"))
    return found if found != Credentials() else None


async def _helped(document: dict[str, Any], host: str) -> Credentials | None:
    """What a credential helper knows, by the protocol of github.com/docker/docker-credential-helpers."""
    helpers = _table(document, "credHelpers")
    names = [host, "index.docker.io"] if host == HUB else [host]
    name = next((helpers[key] for key in names if key in helpers), document.get("credsStore"))
    if not name:
        return None
    if not isinstance(name, str) or not _HELPER.fullmatch(name):
        raise HostError(f"{name!r} is not a credential helper's name", hint="Look at credHelpers and credsStore of config.json.")
    argv = (f"docker-credential-{name}", "get")
    asked = "https://index.docker.io/v1/" if host == HUB else host
    extra = {key: value for key, value in os.environ.items() if _HELPERS_OWN.fullmatch(key)}
    done = await process.run(argv, deadline=HELPER_DEADLINE, env=extra, input=asked.encode(), apart=True)
    if done.returncode:
        if "not found" in (done.output + done.errors).lower():  # "credentials not found in native keychain"
            return None
        raise HostError(f"{argv[0]} does not say who we are at {host}: {(done.errors or done.output).strip()[-200:]}")
    try:
        answer = json.loads(done.output)
        user, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError) as error:
        raise HostError(f"{argv[0]} answered with what is not to be read") from error
    return Credentials(identity=secret) if user == _TOKEN else Credentials(user=user, password=secret)
