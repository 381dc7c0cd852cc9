"""The Debian packages that Ramet uses: what each is for, which of them this host lacks, and installing those (the only thing here that needs root)."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ramet import process
from ramet.errors import HostError

DEADLINE = 3600.0  # seconds for one run of apt-get: 150 MB over a slow line
LOCK_TIMEOUT = 300  # seconds that apt-get waits for another package manager
Progress = Callable[[str, float | None], None]


class Need(StrEnum):
    """What goes without."""

    MACHINES = "machines"
    REGISTRIES = "registries"
    KERNEL = "kernel"
    TESTS = "tests"


WORDS = {
    Need.MACHINES: "no machine runs",
    Need.REGISTRIES: "no image but `debian:SUITE` can be used",
    Need.KERNEL: "Ramet's own kernel cannot be built, and machines stay on Debian's",
    Need.TESTS: "some tests cannot run",
}


@dataclass(frozen=True, kw_only=True)
class Package:
    """shows: programs and files (absolute names) that are there when it is installed, by whatever means. rootless: needed only without root."""

    name: str
    reason: str
    need: Need
    shows: tuple[str, ...]
    rootless: bool = False


def _package(need: Need, name: str, reason: str, *shows: str, rootless: bool = False) -> Package:
    return Package(name=name, reason=reason, need=need, shows=shows or (name,), rootless=rootless)


PACKAGES = (
    _package(Need.MACHINES, "qemu-system-x86", "runs the machines", "qemu-system-x86_64"),
    _package(Need.MACHINES, "qemu-utils", "makes their disks", "qemu-img"),
    _package(Need.MACHINES, "e2fsprogs", "writes images as ext4 file systems", "mke2fs"),
    _package(Need.MACHINES, "mmdebstrap", "makes the image `debian:bookworm` from Debian's packages"),
    _package(
        Need.MACHINES, "debian-archive-keyring", "verifies those packages' signatures", "/usr/share/keyrings/debian-archive-keyring.gpg"
    ),
    _package(Need.MACHINES, "fuse3", "mounts what snapshots are served from, without root", "fusermount3", rootless=True),
    _package(Need.MACHINES, "uidmap", "keeps the owners of an image's files without root", "newuidmap", "newgidmap", rootless=True),
    _package(Need.MACHINES, "util-linux", "runs programs in namespaces", "unshare", "setpriv"),
    _package(Need.MACHINES, "musl-tools", "compiles the agent that is in every machine (a static C program)", "musl-gcc"),
    _package(Need.MACHINES, "make", "runs that compilation"),
    _package(Need.REGISTRIES, "skopeo", "fetches images from OCI registries"),
    _package(Need.REGISTRIES, "umoci", "unpacks them"),
    _package(Need.REGISTRIES, "ca-certificates", "verifies registries", "/etc/ssl/certs/ca-certificates.crt"),
    _package(Need.KERNEL, "gcc", "compiles the kernel"),
    _package(Need.KERNEL, "libc6-dev", "has what its build tools are compiled against", "/usr/include/stdio.h"),
    _package(Need.KERNEL, "libelf-dev", "as above, for its object files", "/usr/include/gelf.h"),
    _package(Need.KERNEL, "binutils", "links it", "ld", "strip"),
    _package(Need.KERNEL, "flex", "generates code in its build"),
    _package(Need.KERNEL, "bison", "generates code in its build"),
    _package(Need.KERNEL, "bc", "computes constants in its build"),
    _package(Need.KERNEL, "patch", "applies our changes to its source"),
    _package(Need.KERNEL, "xz-utils", "unpacks its source", "xz"),
    _package(Need.KERNEL, "tar", "unpacks its source"),
    _package(Need.TESTS, "apache2-utils", "writes a registry's password file", "htpasswd"),
    _package(Need.TESTS, "openssl", "makes a registry's certificate"),
    _package(Need.TESTS, "cpio", "reads an initramfs as somebody else wrote it"),
    _package(Need.TESTS, "shellcheck", "checks the shell scripts"),
    _package(Need.TESTS, "zstd", "compresses layers as other tools do"),
)

USERS = (Need.MACHINES, Need.REGISTRIES, Need.KERNEL)


def present(package: Package) -> bool:
    """Whether what the package brings is there; quick, and true on any distribution."""
    return all(Path(name).exists() if name.startswith("/") else process.find(name) for name in package.shows)


def missing(needs: Iterable[Need] = USERS, *, root: bool | None = None) -> list[Package]:
    """What this host lacks. root: whether Ramet will run as root; None: as now."""
    root = os.geteuid() == 0 if root is None else root
    wanted = set(needs)
    return [package for package in PACKAGES if package.need in wanted and not (root and package.rootless) and not present(package)]


def command(packages: Iterable[Package]) -> str:
    """What an administrator types to install them."""
    return f"sudo apt-get install --no-install-recommends {' '.join(sorted(package.name for package in packages))}"


def explain(packages: Sequence[Package]) -> str:
    """Which packages are missing and what does not work without them, a line for each consequence."""
    lines = []
    for need, words in WORDS.items():
        if names := [package.name for package in packages if package.need is need]:
            lines.append(f"without {', '.join(names)}: {words}")
    return "\n".join(lines)


async def update(progress: Progress) -> None:
    """Fetch the package lists. Needs root; raises HostError."""
    await _apt_get(["update"], "fetching Debian's package lists", progress)


async def install(packages: Sequence[Package], progress: Progress) -> None:
    """Update the lists and install. Needs root; raises HostError, NoSpaceError."""
    await update(progress)
    names = sorted(package.name for package in packages)
    await _apt_get(["--yes", "--no-install-recommends", "install", *names], f"installing {len(names)} Debian packages", progress)
    if still := [package.name for package in packages if not present(package)]:
        raise HostError(f"installed, but what they should bring is not there: {', '.join(still)}", hint="Look at PATH.")


def fraction(line: str) -> tuple[float, str] | None:
    """How far a line of APT::Status-Fd says that apt-get is, 0 to 1, and with what. Downloading counts as the first half, installing as the second."""
    kind, _, rest = line.partition(":")
    match = re.match(r".*?:(\d+(?:\.\d+)?):(.*)", rest)
    if kind not in ("dlstatus", "pmstatus") or not match:
        return None
    return (0.0 if kind == "dlstatus" else 0.5) + float(match[1]) / 200, match[2].strip()


async def _apt_get(words: Sequence[str], what: str, progress: Progress) -> None:
    """Run apt-get without questions, its progress read from a pipe."""
    if not process.find("apt-get"):
        raise HostError(
            "apt-get is not here: this is not Debian", hint="Install what `ramet setup --check` lists by your distribution's means."
        )
    reader, writer = os.pipe()
    argv = ["apt-get", "-q", "-o", f"APT::Status-Fd={writer}", "-o", "Dpkg::Use-Pty=0", "-o", f"DPkg::Lock::Timeout={LOCK_TIMEOUT}", *words]
    env = {"DEBIAN_FRONTEND": "noninteractive", "NEEDRESTART_SUSPEND": "1"}
    progress(what, 0.0)
    stream = asyncio.StreamReader()
    pipe = open(reader, "rb")  # noqa: SIM115  (the transport closes it)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), pipe)

    async def follow() -> None:
        async for raw in stream:
            if found := fraction(raw.decode(errors="replace")):
                progress(what, found[0])

    following = asyncio.create_task(follow())
    try:
        ended = await process.run(argv, deadline=DEADLINE, env=env, pass_fds=[writer])
    finally:
        os.close(writer)
        await asyncio.wait({following}, timeout=1)
        following.cancel()
        transport.close()
    if ended.returncode:
        raise failure(ended.argv, ended.returncode, ended.output, what)


# What apt-get says, and what to do about it.
_HINTS = (
    (
        r"temporary failure resolving|could not (connect|resolve)|connection (failed|timed out)|unreachable",
        "Look at the network and http_proxy.",
    ),
    (
        r"unable to locate package|no installation candidate",
        "Ramet is made for Debian 12 (bookworm); `main` must be in the sources of apt.",
    ),
    (r"dpkg was interrupted", "Run `sudo dpkg --configure -a`, then the same command again."),
    (r"could not get lock|unable to acquire", f"Another package manager has run for {LOCK_TIMEOUT // 60} minutes: wait for it."),
    (r"404 +not found", "The mirror has changed meanwhile: run the same command again."),
)


def failure(argv: Sequence[str], returncode: int, output: str, what: str) -> HostError:
    """The error for an apt-get that failed: the first thing it complained about, and the remedy."""
    error = process.failure(argv, returncode, output, what)
    first = next((line.strip() for line in output.splitlines() if line.startswith("E: ")), "")
    hint = next((hint for pattern, hint in _HINTS if re.search(pattern, output, re.IGNORECASE)), "")
    if first and error.code == "command":
        error.message = f"{what} failed: {first.removeprefix('E: ')}"
        error.args = (error.message,)
    error.hint = hint or error.hint
    return error
