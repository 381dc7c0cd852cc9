"""How registries are reached from this host: what registries.conf(5) and certs.d(5) say, as skopeo and podman read them."""

from __future__ import annotations

import os
import re
import ssl
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from ramet.errors import HostError, ImageError
from ramet.reference import HUB, Registry

_HUB_SERVER = "registry-1.docker.io"  # the API of docker.io is there
HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]{1,5})?|\[[0-9a-fA-F:]+\](:[0-9]{1,5})?")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a repository is asked for. host: HOST[:PORT] as in an image's name; path: the repository as this server names it; plain: without TLS."""

    host: str
    path: str
    plain: bool

    @property
    def base(self) -> str:
        """The URL of the server."""
        return f"{'http' if self.plain else 'https'}://{_HUB_SERVER if self.host == HUB else self.host}"


@dataclass(frozen=True, kw_only=True)
class Mirror:
    """location: HOST[:PORT][/PATH]; use: all, digest-only or tag-only."""

    location: str
    insecure: bool = False
    use: str = "all"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A [[registry]] of registries.conf. prefix: what names it is for; location: what takes the prefix's place."""

    prefix: str
    location: str
    insecure: bool = False
    blocked: bool = False
    mirrors: tuple[Mirror, ...] = ()

    def suits(self, name: str) -> bool:
        """name: HOST[:PORT]/PATH."""
        if self.prefix.startswith("*."):
            host = name.partition("/")[0]
            return host.endswith(self.prefix[1:]) or host.partition(":")[0].endswith(self.prefix[1:])
        return name == self.prefix or name.startswith(self.prefix + "/")


@dataclass(frozen=True, kw_only=True)
class Config:
    """rules: of registries.conf; certs: directories that have one for each HOST[:PORT] with *.crt, *.cert and *.key."""

    rules: tuple[Rule, ...] = ()
    certs: tuple[Path, ...] = ()

    @classmethod
    def load(cls) -> Config:
        """$CONTAINERS_REGISTRIES_CONF alone, else the user's registries.conf or the system's, and what lies in registries.conf.d. Raises HostError."""
        own = Path(os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()) / "containers"
        system = Path("/etc/containers")
        certs = (own / "certs.d", system / "certs.d", Path("/etc/docker/certs.d"))
        if named := os.environ.get("CONTAINERS_REGISTRIES_CONF"):
            return cls(rules=_merged([Path(named)]), certs=certs)
        main = next((p for p in (own / "registries.conf", system / "registries.conf") if p.is_file()), None)
        dropped = {p.name: p for place in (system, own) for p in sorted((place / "registries.conf.d").glob("*.conf"))}
        return cls(rules=_merged([*([main] if main else []), *(dropped[name] for name in sorted(dropped))]), certs=certs)

    def endpoints(self, host: str, path: str, *, digest: bool = True, write: bool = False) -> list[Endpoint]:
        """Where to ask for a repository, the registry itself last; for writes only that. digest: whether by digest or by tag.

        Raises ImageError where the configuration blocks it.
        """
        name = f"{host}/{path}"
        rule = max((r for r in self.rules if r.suits(name)), key=lambda r: len(r.prefix), default=None)
        if rule is None:
            return [self._endpoint(host, path, insecure=False)]
        if rule.blocked:
            raise ImageError(f"{name}: registries.conf blocks {rule.prefix}", hint="That is its administrator's to change.")
        mirrors = [m for m in rule.mirrors if m.use == "all" or digest == (m.use == "digest-only")]
        places = [*((m.location, m.insecure) for m in mirrors if not write), (rule.location, rule.insecure)]
        return [self._endpoint(*_placed(rule, location, name), insecure=insecure) for location, insecure in places]

    def _endpoint(self, host: str, path: str, *, insecure: bool) -> Endpoint:
        """Registries of this host do without TLS, unless there are certificates for them."""
        local = Registry(reference=host, host=host, path=path).loopback
        return Endpoint(host=host, path=path, plain=insecure or (local and not any((each / host).is_dir() for each in self.certs)))

    def trust(self, host: str) -> ssl.SSLContext:
        """The certificates for a registry: the system's ($SSL_CERT_FILE, $SSL_CERT_DIR) and those of certs.d. Raises HostError."""
        try:
            context = httpx2.create_ssl_context()
            for place in (certs / host for certs in self.certs):
                for file in sorted(place.glob("*.crt")):
                    context.load_verify_locations(file)
                for file in sorted(place.glob("*.cert")):
                    context.load_cert_chain(file, file.with_suffix(".key"))
        except (OSError, ssl.SSLError) as error:
            raise HostError(f"the certificates for {host} cannot be read: {error}", hint="Look at certs.d and SSL_CERT_FILE.") from error
        return context


def _placed(rule: Rule, location: str, name: str) -> tuple[str, str]:
    """The host and the path of a repository, with the rule's prefix replaced by a location."""
    prefix = name.partition("/")[0] if rule.prefix.startswith("*.") else rule.prefix
    host, _, path = ((location or prefix) + name[len(prefix) :]).partition("/")  # a wildcard without a location leaves names as they are
    return host, path


def _merged(files: Iterable[Path]) -> tuple[Rule, ...]:
    """The rules of all files; of those with the same prefix the last one's."""
    found: dict[str, Rule] = {}
    for file in files:
        found |= {rule.prefix: rule for rule in _read(file)}
    return tuple(found.values())


def _read(file: Path) -> list[Rule]:
    try:
        document = tomllib.loads(file.read_text())
        return [_rule(table) for table in _tables(document, "registry")]
    except (OSError, ValueError) as error:
        raise HostError(f"{file} cannot be read: {error}", hint="containers-registries.conf(5) says what belongs there.") from error


def _rule(table: dict[str, Any]) -> Rule:
    location = _text(table, "location").rstrip("/")
    prefix = _text(table, "prefix").rstrip("/") or location
    mirrors = [
        Mirror(location=_text(each, "location").rstrip("/"), insecure=_flag(each, "insecure"), use=_text(each, "pull-from-mirror") or "all")
        for each in _tables(table, "mirror")
    ]
    if not prefix or (not location and not prefix.startswith("*.")):
        raise ValueError("a [[registry]] needs a location")
    if _flag(table, "mirror-by-digest-only"):
        mirrors = [Mirror(location=m.location, insecure=m.insecure, use="digest-only") for m in mirrors]
    for place in (location, *(m.location for m in mirrors)):
        if place and not HOST.fullmatch(place.partition("/")[0]):
            raise ValueError(f"{place!r} is no place of a registry")
    return Rule(
        prefix=prefix, location=location, insecure=_flag(table, "insecure"), blocked=_flag(table, "blocked"), mirrors=tuple(mirrors)
    )


def _tables(table: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = table.get(key, [])
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ValueError(f"{key} must be a list of tables")
    return found


def _text(table: dict[str, Any], key: str) -> str:
    found = table.get(key, "")
    if not isinstance(found, str):
        raise ValueError(f"{key} must be text")
    return found


def _flag(table: dict[str, Any], key: str) -> bool:
    found = table.get(key, False)
    if not isinstance(found, bool):
        raise ValueError(f"{key} must be true or false")
    return found
