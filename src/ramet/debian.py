"""Debian's base system as an image of our own, straight from the mirror: the default needs no registry."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from ramet import process, userns
from ramet.errors import HostError, ImageError, NoSpaceError
from ramet.model import ImageConfig
from ramet.reference import Debian
from ramet.watch import Progress

RECIPE = 1  # raise when what is made from the same suite and packages changes
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DEADLINE = 3600.0

# On top of apt and what is essential. Everything else is one `apt-get install` away; each of these is needed before or for that.
PACKAGES = (
    "ca-certificates",  # TLS
    "curl",  # the first line of most set-up scripts
    "iproute2",  # to see one's addresses and listening ports
    "netbase",  # names of services and protocols, which getaddrinfo(3) looks up
    "procps",  # ps, top, pkill, sysctl; editors' remote servers call ps
)
CONFIG = ImageConfig(env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, cmd=("bash",))

# What mmdebstrap copied from this host, and what must not be the same on two machines. dpkg's options were for the build only.
_TIDY = (
    'rm -f "$1/etc/hostname" "$1/etc/resolv.conf" "$1/etc/dpkg/dpkg.cfg.d/99mmdebstrap" "$1/var/cache/ldconfig/aux-cache"; '
    ': > "$1/etc/machine-id"; find "$1/var/log" -type f -size +0 -delete'
)
_LINES = 2 * 127  # "Unpacking" and "Setting up" lines that bookworm's packages print; only the progress depends on it


def digest(source: Debian, architecture: str) -> str:
    """The cache's key: what goes in, since what comes out differs with the day."""
    parts = [source.suite, architecture, sorted(PACKAGES), RECIPE]
    return "sha256:" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def sources(suite: str, mirror: str) -> list[str]:
    """apt's lines for a mirror of the user's; none, for mmdebstrap's default, when there is no such mirror.

    Security updates come from beside it (`…/debian` has `…/debian-security`), as on every full mirror.
    """
    if not mirror:
        return []
    mirror = mirror.rstrip("/")
    lines = [f"deb {mirror} {suite} main"]
    if suite not in ("sid", "unstable"):
        lines += [f"deb {mirror} {suite}-updates main", f"deb {mirror}-security {suite}-security main"]
    return lines


def mmdebstrap(suite: str, tree: Path, mirror: str = "") -> list[str]:
    """The command line, for the root of a namespace with mounts of its own."""
    return [
        *("mmdebstrap", "--mode=root", "--format=directory", "--variant=minbase", f"--include={','.join(PACKAGES)}", "--verbose"),
        '--aptopt=Acquire::Languages "none"',
        "--dpkgopt=force-unsafe-io",  # a half-made tree is thrown away: no need to sync each file
        "--dpkgopt=path-exclude=/usr/share/locale/*",  # 35 of 203 MB; the locale is C.UTF-8
        "--dpkgopt=path-include=/usr/share/locale/locale.alias",
        "--skip=chroot/mount/sys",  # not allowed in a user namespace, not needed by any of these packages
        f"--customize-hook={_TIDY}",
        *(suite, str(tree), *sources(suite, mirror)),
    ]


async def build(source: Debian, tree: Path, progress: Progress) -> ImageConfig:
    """Make the base system in a new directory. Raises ImageError, NoSpaceError, HostError."""
    userns.require("mmdebstrap")
    if not KEYRING.exists():
        raise HostError(
            f"{KEYRING} is not there, and without it Debian's packages cannot be verified",
            hint="Run `sudo apt-get install debian-archive-keyring`.",
        )
    log: list[str] = []
    seen = 0

    def on_line(line: str) -> None:
        nonlocal seen
        log.append(line)
        if line.startswith(("Unpacking ", "Setting up ")):
            seen += 1
        progress(f"installing Debian {source.suite}", min(0.05 + 0.95 * seen / _LINES, 0.99))

    progress(f"installing Debian {source.suite}", 0.0)
    command = mmdebstrap(source.suite, tree, os.environ.get("RAMET_DEBIAN_MIRROR", ""))
    env = {"TMPDIR": str(tree.parent), "DEBIAN_FRONTEND": "noninteractive"}
    result = await userns.run(command, deadline=DEADLINE, mounts=True, env=env, on_line=on_line)
    if result.returncode:
        raise explain(source, "\n".join(log), process.failure(result.argv, result.returncode, result.output, f"image {source.reference}"))
    return CONFIG


def explain(source: Debian, log: str, failed: HostError) -> HostError | ImageError:
    """What mmdebstrap's output means to a user."""
    low, what = log.lower(), f"image {source.reference}"
    if "no space left on device" in low:
        return NoSpaceError(
            f"{what}: no space left on the disk", hint="Free some space (`df -h`): about 800 MB are needed.", details=failed.details
        )
    if "does not have a release file" in low or "404  not found" in low:
        return ImageError(
            f"{what}: the mirror has no suite {source.suite}", hint="Look at RAMET_DEBIAN_MIRROR, if it is set.", details=failed.details
        )
    if any(
        mark in low
        for mark in ("temporary failure resolving", "could not resolve", "could not connect", "connection failed", "connection timed out")
    ):
        return ImageError(
            f"{what}: Debian's mirror cannot be reached",
            hint="Look at the network, at http_proxy, or name a mirror in RAMET_DEBIAN_MIRROR.",
            details=failed.details,
        )
    if "no_pubkey" in low or "is not signed" in low or "signatures were invalid" in low:
        return ImageError(
            f"{what}: the mirror's signature does not verify",
            hint="Upgrade the package debian-archive-keyring; or the mirror is not Debian's.",
            details=failed.details,
        )
    return failed
