"""The two small C programs of agent/: the guest's agent and the shim beside each QEMU.

Built once for each version of their sources, in seconds, and cached by hash.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ramet import paths, process
from ramet.errors import HostError

_DEADLINE = 120.0
_NAMES = ("ramet-agent", "ramet-shim")


@dataclass(frozen=True, kw_only=True)
class Binaries:
    """agent: static, the `/init` of guests; shim: static, runs on the host. digest: of the sources."""

    agent: Path
    shim: Path
    digest: str


def _sources() -> list[Path]:
    root = paths.share_dir("agent")
    return sorted(path for path in root.iterdir() if path.suffix in (".c", ".h") or path.name == "Makefile")


async def ensure() -> Binaries:
    """The binaries of the sources as they are, built when they are not there. HostError when the compiler is missing or fails."""
    hashed = hashlib.sha256()
    for path in _sources():
        data = path.read_bytes()
        hashed.update(f"{path.name} {len(data)}\n".encode() + data)
    digest = hashed.hexdigest()[:16]
    target = paths.cache_dir() / "agent" / digest
    if not target.is_dir():
        await _build(target)
    return Binaries(agent=target / _NAMES[0], shim=target / _NAMES[1], digest=digest)


async def _build(target: Path) -> None:
    """Build aside and publish by rename; two at once are harmless, the second finds the first one's result."""
    if not process.find("musl-gcc"):
        raise HostError(
            "musl-gcc is not installed, which builds the guest's agent",
            hint="Run `ramet setup`, or as root: apt-get install musl-tools make.",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".work-", ignore_cleanup_errors=True) as work:
        out = Path(work) / "out"
        out.mkdir()
        argv = ["make", "-s", "-C", str(paths.share_dir("agent")), f"OUT={out}"]
        (await process.run(argv, deadline=_DEADLINE)).check("building the guest's agent")
        for name in _NAMES:
            with open(out / name, "rb") as file:
                os.fsync(file.fileno())
        try:
            out.rename(target)
        except OSError:
            if not target.is_dir():
                raise
