"""An image of two gigabytes for benches: real packages of Debian, so that it compresses like what people use. Made once, into Ramet's cache."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ramet import debian, locks, oci, process, userns
from ramet.errors import HostError
from ramet.paths import cache_dir
from ramet.reference import OCI_MANIFEST, sha256

SUITE = "bookworm"
PACKAGES = ("build-essential", "default-jdk-headless", "ghc", "golang-go", "rustc")  # the fewest that take so much
_PIECE = 1 << 20
_TAG = "latest"

Say = Callable[[str], None]


def place() -> Path:
    """What benches keep: images, and the disks made of them."""
    return cache_dir() / "bench"


async def image(say: Say) -> str:
    """The image's reference. HostError: it cannot be made here."""
    key = hashlib.sha256(json.dumps([SUITE, debian.PACKAGES, PACKAGES]).encode()).hexdigest()[:12]
    final = place() / f"bulk-{key}"
    place().mkdir(parents=True, exist_ok=True)
    async with locks.exclusive(place() / ".lock", lambda: say("waiting for another that makes the image")):
        if not final.exists():
            with tempfile.TemporaryDirectory(prefix=".work-", dir=place()) as work:
                await _make(Path(work), say)
                (Path(work) / "layout").rename(final)
    return f"oci:{final}:{_TAG}"


async def _make(work: Path, say: Say) -> None:
    userns.require("mmdebstrap")
    await userns.check()
    say(f"installing {', '.join(PACKAGES)} and what they need")
    tar = work / "tree.tar"
    mirror = os.environ.get("RAMET_DEBIAN_MIRROR", "")
    # of an option that is given twice the last one counts, and lists are joined
    command = [*debian.mmdebstrap(SUITE, tar, mirror), "--format=tar", f"--include={','.join(PACKAGES)}"]
    env = {"TMPDIR": str(work), "DEBIAN_FRONTEND": "noninteractive"}
    finished = await userns.run(command, deadline=debian.DEADLINE, mounts=True, env=env)
    if finished.returncode:
        failed = process.failure(finished.argv, finished.returncode, finished.output, "the image of the bench")
        raise HostError(failed.message, hint="Packages come from Debian's mirror, or RAMET_DEBIAN_MIRROR.", details=failed.details)
    say("writing the image")
    await asyncio.to_thread(_layout, tar, work / "layout")


def _layout(tar: Path, root: Path) -> None:
    """A layout with an image of one layer, the file, which is moved there."""
    blobs = root / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    with open(tar, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = tar.stat().st_size
    tar.rename(blobs / digest)
    layer = {"mediaType": oci.PLAIN_LAYER, "digest": f"sha256:{digest}", "size": size}

    def put(kind: str, document: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(document).encode()
        (blobs / hashlib.sha256(data).hexdigest()).write_bytes(data)
        return {"mediaType": kind, "digest": sha256(data), "size": len(data)}

    env = [f"{name}={value}" for name, value in debian.CONFIG.env.items()]
    config = put(
        "application/vnd.oci.image.config.v1+json",
        {
            "architecture": oci.architecture(),
            "os": "linux",
            "config": {"Env": env, "Cmd": list(debian.CONFIG.cmd)},
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
        },
    )
    manifest = put(OCI_MANIFEST, {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": [layer]})
    named = manifest | {"annotations": {"org.opencontainers.image.ref.name": _TAG}}
    (root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [named]}))
    (root / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
