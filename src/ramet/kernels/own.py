"""Our own kernel: Debian's source, our configuration and a few lines of patches, everything built in. Built once on the host, in the background."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ramet import process
from ramet.errors import HostError, RametError
from ramet.kernels import config
from ramet.kernels.debian import download
from ramet.kernels.record import Kernel, KernelKind, cached, kernels_dir, key, load, publish, try_lock, work_dir, workshop
from ramet.paths import share_dir

SOURCE_PACKAGE = "linux-source-6.1"
SOURCE_ARCHIVE = Path("usr/src/linux-source-6.1.tar.xz")
RECIPE = "own-1"  # counts changes of how we build that are not in the fragment
STEPS = 2448  # lines of make that report a step of the build; progress is counted against it
UNPACKED = 0.06  # share of the time that unpacking takes
NICE = 15
BUILD_DEADLINE = 6 * 3600.0  # seconds; 20 CPU-minutes are usual
TAIL = 30  # lines

# What the build needs, and the Debian package that has it.
PROGRAMS = {
    "make": "make",
    "gcc": "gcc",
    "ld": "binutils",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "xz": "xz-utils",
    "tar": "tar",
    "patch": "patch",
}
HEADERS = {"/usr/include/gelf.h": "libelf-dev"}

# The same sources give the same kernel, and no line of it names the host it was built on.
_ENV = {"KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 1970", "KBUILD_BUILD_USER": "ramet", "KBUILD_BUILD_HOST": "ramet"}
_STEP = re.compile(r" {2}[A-Z][A-Z0-9_]* +\S")

Progress = Callable[[float], None]


class BuildState(StrEnum):
    NONE = "none"
    RUNNING = "running"
    FAILED = "failed"
    READY = "ready"


@dataclass(frozen=True, kw_only=True)
class BuildStatus:
    """How the own kernel's build stands. fraction: 0 to 1. message, log (its tail): why it failed."""

    state: BuildState
    fraction: float = 0.0
    message: str = ""
    log: str = ""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The kernel's source: Debian's version of the package, and the archive where it is installed."""

    version: str
    archive: Path | None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What makes our kernel out of Debian's source. patches: their texts, in order."""

    fragment: str
    patches: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Equal for kernels that differ in the source's version only. Comments in the fragment do not count: a build costs a quarter of an hour."""
        symbols = [f"{name}={value}" for name, value in sorted(config.parse(self.fragment).items())]
        return key(RECIPE, *symbols, *self.patches)

    def cache_key(self, source_version: str) -> str:
        """The cache directory's name."""
        return key(self.key, source_version)


def shipped() -> Recipe:
    """Today's recipe."""
    root = share_dir("kernel")
    patches = tuple(path.read_text() for path in sorted((root / "patches").glob("*.patch")))
    return Recipe(fragment=(root / "ramet.config").read_text(), patches=patches)


def newest() -> Kernel | None:
    """The newest own kernel of today's recipe; else of another; None without any."""
    found = cached(KernelKind.OWN, shipped().key) or cached(KernelKind.OWN)
    return found[0] if found else None


def missing_tools() -> dict[str, str]:
    """What the build lacks on this host: program or header → Debian package."""
    programs = {program: package for program, package in PROGRAMS.items() if process.find(program) is None}
    return programs | {header: package for header, package in HEADERS.items() if not Path(header).exists()}


async def source() -> Source:
    """The installed source package, else the one that the package lists offer. Raises HostError."""
    archive = Path("/") / SOURCE_ARCHIVE
    if archive.exists():
        query = ["dpkg-query", "--show", "--showformat=${Version}", SOURCE_PACKAGE]
        return Source(version=await process.output(query, deadline=30, what="finding the kernel source's version"), archive=archive)
    listing = await process.run(["apt-cache", "show", "--no-all-versions", SOURCE_PACKAGE], deadline=60)
    if version := re.search(r"^Version: (\S+)", listing.output, re.MULTILINE):
        return Source(version=version[1], archive=None)
    raise HostError(f"the kernel's source is not available: no package {SOURCE_PACKAGE}", hint="On Debian 12: `apt-get update` as root.")


async def build_status() -> BuildStatus:
    """How the build of today's recipe stands; reads files only, so any process may ask. Raises HostError without a source."""
    name = shipped().cache_key((await source()).version)
    if load(kernels_dir() / name):
        return BuildStatus(state=BuildState.READY, fraction=1.0)
    lock = try_lock(KernelKind.OWN)
    if lock is None:
        return BuildStatus(state=BuildState.RUNNING, fraction=_fraction())
    os.close(lock)
    with contextlib.suppress(OSError, ValueError, KeyError):
        failed = json.loads(_failed().read_text())
        if failed["key"] == name:
            return BuildStatus(state=BuildState.FAILED, message=failed["message"], log=failed["log"])
    if work_dir(KernelKind.OWN).exists():
        return BuildStatus(state=BuildState.FAILED, message="the build was killed before it was done", log=_log_tail())
    return BuildStatus(state=BuildState.NONE)


async def start_background_build() -> BuildStatus:
    """Build in a process of its own, unless it is ready or running. The child inherits the lock, so the status is `running` from here on."""
    status = await build_status()
    if status.state in (BuildState.READY, BuildState.RUNNING):
        return status
    lock = try_lock(KernelKind.OWN)
    if lock is None:
        return BuildStatus(state=BuildState.RUNNING)
    try:
        argv = [sys.executable, "-m", "ramet.kernels", "build", "--lock-fd", str(lock)]
        env = {"PYTHONPATH": str(Path(__file__).parents[2])}
        process.spawn_detached(argv, log=_log(), env=env, pass_fds=(lock,))
    finally:
        os.close(lock)
    return BuildStatus(state=BuildState.RUNNING)


async def build(progress: Progress, *, lock: int | None = None) -> Kernel:
    """Build today's kernel, or return it when it is there. progress: called with 0 to 1.

    lock: a descriptor that already holds the lock, which is taken over. Raises BusyError when another build runs, HostError
    (with the log's tail in the details) when something fails; then the failure is also on record for `build_status`.
    """
    with workshop(KernelKind.OWN, lock) as (work, fd):
        recipe, name = shipped(), ""
        try:
            found = await source()
            name = recipe.cache_key(found.version)
            if kernel := load(kernels_dir() / name):
                return kernel
            _failed().unlink(missing_ok=True)
            return await _build(work, fd, recipe, found, progress)
        except RametError as error:
            record = {"key": name, "message": error.message, "log": error.details.get("log", "")}
            _failed().write_text(json.dumps(record))
            raise


async def configure(tree: Path, recipe: Recipe, *, pass_fds: tuple[int, ...] = ()) -> str:
    """Patch the tree, write its .config, and check that every line of the fragment took effect; return it. Raises HostError with the names."""
    for patch in recipe.patches:
        argv = ["patch", "-p1", "--batch", "--forward", "--directory", str(tree)]
        (await process.run(argv, deadline=60, input=patch.encode(), pass_fds=pass_fds)).check("patching the kernel's source")
    (tree / "ramet.config").write_text(recipe.fragment)
    argv = [*_tied(), "make", "-C", str(tree), "-s", "allnoconfig", "KCONFIG_ALLCONFIG=ramet.config"]
    (await process.run(argv, deadline=600, env=_ENV, nice=NICE, pass_fds=pass_fds)).check("configuring the kernel")
    text = (tree / ".config").read_text()
    if dropped := config.dropped(recipe.fragment, text):
        raise HostError(f"Kconfig dropped {len(dropped)} lines of the configuration: {dropped[0]}", details={"log": "\n".join(dropped)})
    return text


async def unpack(found: Source, work: Path, *, pass_fds: tuple[int, ...] = ()) -> Path:
    """Unpack the source (downloaded first when it is not installed) under `work`; return the tree."""
    archive = found.archive or await download(SOURCE_PACKAGE, found.version, work) / SOURCE_ARCHIVE
    tree = work / "source"
    tree.mkdir()
    argv = [*_tied(), "tar", "-xJf", str(archive), "-C", str(tree), "--strip-components=1"]
    (await process.run(argv, deadline=1800, nice=NICE, pass_fds=pass_fds)).check("unpacking the kernel's source")
    return tree


async def _build(work: Path, lock: int, recipe: Recipe, found: Source, progress: Progress) -> Kernel:
    """Unpack, patch, configure, make, strip, publish."""
    if lacking := missing_tools():
        packages = " ".join(sorted(set(lacking.values())))
        raise HostError(f"building the kernel needs {', '.join(sorted(lacking))}", hint=f"As root: apt-get install {packages}")
    report = _reporter(work / "progress", progress)
    report(0.0)
    tree = await unpack(found, work, pass_fds=(lock,))
    configured = await configure(tree, recipe, pass_fds=(lock,))
    report(UNPACKED)
    await _make(tree, lock, lambda done: report(UNPACKED + (0.99 - UNPACKED) * done))
    staged = work / "staged"
    staged.mkdir()
    (staged / "config").write_text(configured)
    await process.output(["strip", "-o", str(staged / "vmlinux"), str(tree / "vmlinux")], deadline=120, what="stripping the kernel")
    version = f"{(tree / 'include/config/kernel.release').read_text().strip()} ({found.version})"
    kernel = await asyncio.to_thread(
        publish, staged, recipe.cache_key(found.version), kind=KernelKind.OWN, version=version, image="vmlinux", recipe=recipe.key
    )
    report(1.0)
    return kernel


async def _make(tree: Path, lock: int, progress: Progress) -> None:
    """Run make, niced, with its output in the log. It holds the lock too."""
    argv = [*_tied(), "make", "-C", str(tree), f"-j{os.cpu_count() or 1}", "vmlinux"]
    steps = 0
    with open(_log(), "a") as log:

        def line(text: str) -> None:
            nonlocal steps
            log.write(text + "\n")
            log.flush()
            if _STEP.match(text):
                steps += 1
                progress(min(1.0, steps / STEPS))

        log.truncate(0)
        ended = await process.run(argv, deadline=BUILD_DEADLINE, env=_ENV, nice=NICE, pass_fds=(lock,), on_line=line)
    ended.check("the kernel's build")


def _tied() -> list[str]:
    """Before a program that takes long: it is told to end when we are killed."""
    return ["setpriv", "--pdeathsig", "TERM"] if process.find("setpriv") else []


def _reporter(file: Path, progress: Progress) -> Progress:
    """Progress for the caller, and in a file for other processes, whenever it grew by a hundredth."""
    last = -1.0

    def report(fraction: float) -> None:
        nonlocal last
        if fraction - last >= 0.01 or fraction >= 1.0:
            last = fraction
            aside = file.with_suffix(".new")
            aside.write_text(f"{fraction:.3f}")
            aside.rename(file)
            progress(fraction)

    return report


def _fraction() -> float:
    try:
        return float((work_dir(KernelKind.OWN) / "progress").read_text())
    except (OSError, ValueError):
        return 0.0


def _log() -> Path:
    return kernels_dir() / ".own-log"


def _failed() -> Path:
    return kernels_dir() / ".own-failed"


def _log_tail() -> str:
    try:
        return "\n".join(_log().read_text(errors="replace").splitlines()[-TAIL:])
    except OSError:
        return ""
