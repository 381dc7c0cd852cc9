"""What an image's name means. Pure: parses, touches nothing.

debian:bookworm  debian:12  debian          ours: made from Debian's mirror, no registry involved
alpine:3  acme/shop:1                       docker.io/library/alpine:3, docker.io/acme/shop:1
docker.io/library/debian:bookworm           Docker Hub's debian: naming the registry is what tells it from ours
ghcr.io/acme/shop@sha256:…  docker://…      by registry; a digest pins the content
oci:/path[:tag]  oci-archive:/path[:tag]    on this host
docker-archive:/path[:name:tag]             on this host, as `docker save` writes it
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from dataclasses import dataclass

from ramet.errors import ImageError

HUB = "docker.io"
LOCAL = ("oci", "oci-archive", "docker-archive")
SUITES = {
    "bullseye": "bullseye",
    "bookworm": "bookworm",
    "trixie": "trixie",
    "forky": "forky",
    "sid": "sid",
    "unstable": "sid",
    "11": "bullseye",
    "12": "bookworm",
    "13": "trixie",
    "14": "forky",
    # these move when Debian releases, so they are the mirror's to resolve
    "stable": "stable",
    "oldstable": "oldstable",
    "testing": "testing",
    "latest": "bookworm",
}

# Only sha256: a digest becomes a file name, so what it may consist of is a matter of safety.
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# What kinds of manifests are called. Here, and not with what is in them: the fetcher needs no more, and starts in two thirds of the time.
INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
# the grammar of github.com/distribution/reference
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
PATH = re.compile(rf"{_PART}(?:/{_PART})*")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?"
_NAME = re.compile(rf"(?:(?P<host>{_HOST})/)?(?P<path>{PATH.pattern})(?::(?P<tag>{TAG.pattern}))?(?:@(?P<digest>{DIGEST.pattern}))?")


@dataclass(frozen=True, kw_only=True)
class Debian:
    """An image that we make ourselves."""

    reference: str
    suite: str


@dataclass(frozen=True, kw_only=True)
class Registry:
    """An image in a registry, by tag or by digest."""

    reference: str
    host: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        return f"{self.host}/{self.path}"

    @property
    def transport(self) -> str:
        """As skopeo names it. A digest wins over a tag, for skopeo refuses both at once."""
        return f"docker://{self.name}@{self.digest}" if self.digest else f"docker://{self.name}:{self.tag}"

    @property
    def loopback(self) -> bool:
        """Whether the registry is on this host: such ones may do without TLS, for nobody listens on that line."""
        host = self.host.rpartition(":")[0] if re.search(r":\d+$", self.host) else self.host
        if host == "localhost":
            return True
        try:
            return ipaddress.ip_address(host.strip("[]")).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True, kw_only=True)
class Local:
    """An image in files of this host. transport: as skopeo names it."""

    reference: str
    transport: str


Source = Debian | Registry | Local


def parse(reference: str) -> Source:
    """What a reference means. Raises ImageError."""
    scheme, colon, rest = reference.partition(":")
    if colon and scheme in LOCAL:
        if not rest.startswith("/"):
            raise ImageError(f"image {reference}: the path must be absolute", hint=f"Write it as {scheme}:/path.")
        return Local(reference=reference, transport=reference)
    explicit = reference.startswith("docker://")
    found = _NAME.fullmatch(reference.removeprefix("docker://"))
    if not found:
        raise ImageError(
            f"image {reference!r}: not an image reference",
            hint="Write debian:bookworm, alpine:3, registry.example.com/name:tag, name@sha256:…, oci:/path:tag or docker-archive:/path.tar.",
        )
    host, path, tag, digest = found["host"] or "", found["path"], found["tag"] or "", found["digest"] or ""
    if host and not re.search(r"[.:\[]|^localhost$|[A-Z]", host):  # acme/shop: the first part is no host
        host, path = "", f"{host}/{path}"
    if path == "debian" and not (host or digest or explicit):
        return _debian(reference, tag or "latest")
    if host in ("", HUB, "index.docker.io"):
        host, path = HUB, path if "/" in path else f"library/{path}"
    return Registry(reference=reference, host=host, path=path, tag="" if digest else tag or "latest", digest=digest)


def _debian(reference: str, tag: str) -> Debian:
    if tag not in SUITES:
        raise ImageError(
            f"image {reference}: Debian has no suite {tag!r} that Ramet knows",
            hint=f"One of {', '.join(SUITES)}; or, for Docker Hub's image, {HUB}/library/debian:{tag}.",
        )
    return Debian(reference=reference, suite=SUITES[tag])


def sha256(data: bytes) -> str:
    """The digest of a blob or a document."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
