"""What a guest kernel is, and how one is kept in the cache.

CACHE/kernels/
  KEY/                    one directory a kernel: published by rename
    kernel.json           kind, version, digest, recipe
    vmlinux               what QEMU boots (Debian's: vmlinuz)
    config                own kernel only
    modules/              Debian's only: the module files, and `order`, their names in load order
  .own-work .debian-work  being made; stale, and removed, when the lock beside it is free
  .own-lock .debian-lock  flock held by who makes one, and by the programs it started
  .own-log .own-failed    the last build's output; the key and the error of a build that failed
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ramet import locks
from ramet.errors import BusyError
from ramet.paths import cache_dir

MODULE_ORDER = "order"


class KernelKind(StrEnum):
    """Where a kernel comes from: built from Debian's source with our configuration, or Debian's own for clouds."""

    OWN = "own"
    DEBIAN = "debian"


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A guest kernel that is ready to boot.

    image: what `-kernel` takes. modules: the directory of modules to load first, None when everything is built in.
    digest: SHA-256 of the image and the modules: equal digests are the same kernel, whatever path they came by.
    """

    kind: KernelKind
    version: str
    image: Path
    modules: Path | None
    digest: str


def kernels_dir() -> Path:
    """Where kernels are cached."""
    path = cache_dir() / "kernels"
    path.mkdir(parents=True, exist_ok=True)
    return path


def work_dir(kind: KernelKind) -> Path:
    return kernels_dir() / f".{kind}-work"


def key(*parts: str) -> str:
    """The name of an artifact made from these parts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def module_names(modules: Path) -> list[str]:
    """The file names of a kernel's modules, in load order."""
    return (modules / MODULE_ORDER).read_text().split()


def _digest(image: Path, modules: Path | None) -> str:
    total = hashlib.sha256(image.read_bytes())
    for name in module_names(modules) if modules else []:
        total.update(name.encode() + b"\0" + (modules / name).read_bytes())  # type: ignore[operator]
    return total.hexdigest()


def load(directory: Path) -> Kernel | None:
    """The kernel in a cache directory; None when there is none."""
    try:
        record = json.loads((directory / "kernel.json").read_text())
        modules = directory / "modules"
        return Kernel(
            kind=KernelKind(record["kind"]),
            version=record["version"],
            image=directory / record["image"],
            modules=modules if modules.is_dir() else None,
            digest=record["digest"],
        )
    except (OSError, ValueError, KeyError):
        return None


def cached(kind: KernelKind, recipe: str = "") -> list[Kernel]:
    """The kernels of a kind in the cache, newest first; with a recipe, only those made by it."""
    found: list[tuple[float, Kernel]] = []
    for path in kernels_dir().glob("[0-9a-f]*/kernel.json"):
        kernel = load(path.parent)
        with contextlib.suppress(OSError, ValueError):
            if kernel and kernel.kind is kind and recipe in ("", json.loads(path.read_text()).get("recipe")):
                found.append((path.stat().st_mtime, kernel))
    return [kernel for _, kernel in sorted(found, key=lambda pair: pair[0], reverse=True)]


def find(digest: str) -> Kernel | None:
    """The cached kernel with this digest: a machine that was saved under it can only go on with the same."""
    return next((kernel for kind in KernelKind for kernel in cached(kind) if kernel.digest == digest), None)


def publish(staged: Path, name: str, *, kind: KernelKind, version: str, image: str, recipe: str) -> Kernel:
    """Finish a staged directory (image and perhaps modules are in it) and make it `kernels/NAME`, all or nothing."""
    modules = staged / "modules"
    digest = _digest(staged / image, modules if modules.is_dir() else None)
    record = {"kind": kind, "version": version, "image": image, "digest": digest, "recipe": recipe}
    (staged / "kernel.json").write_text(json.dumps(record, indent=1))
    final = kernels_dir() / name
    publish_path(staged, final)
    kernel = load(final)
    assert kernel is not None
    return kernel


def publish_path(staged: Path, final: Path) -> None:
    """Rename a file or directory into place once all of it is on the disk. Another one's that came first stays: the name says what is in it."""
    for path in [*(staged.rglob("*") if staged.is_dir() else []), staged]:
        _fsync(path)
    try:
        staged.rename(final)
    except OSError:
        if not final.exists():
            raise
        shutil.rmtree(staged)
    _fsync(final.parent)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def try_lock(kind: KernelKind) -> int | None:
    """A descriptor that holds the lock on making kernels of a kind; None when somebody else does. Programs that inherit it hold it too."""
    return locks.take(kernels_dir() / f".{kind}-lock")


@contextlib.contextmanager
def workshop(kind: KernelKind, lock: int | None = None) -> Iterator[tuple[Path, int]]:
    """An empty work directory and the lock's descriptor, `lock` if the caller has it already. Raises BusyError when the lock is held elsewhere."""
    fd = try_lock(kind) if lock is None else lock
    if fd is None:
        raise BusyError(f"another process is making the {kind} kernel", hint="Wait for it: `ramet info` shows how far it is.")
    work = work_dir(kind)
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        yield work, fd
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(fd)


def clean() -> list[Path]:
    """Remove what killed builds left behind (about 2 GB each); return what was removed."""
    removed = []
    for kind in KernelKind:
        work = work_dir(kind)
        if work.exists() and (fd := try_lock(kind)) is not None:
            shutil.rmtree(work, ignore_errors=True)
            os.close(fd)
            removed.append(work)
    return removed
