"""Images from registries and files, by skopeo, into a layout; layouts, by umoci, into a tree.

Both verify digests of what they read (tried with damaged blobs); we verify again what lies on our disk, since that is what the cache's name promises.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from ramet import oci, process, userns
from ramet.errors import CommandError, HostError, ImageError, NoSpaceError
from ramet.model import ImageConfig
from ramet.reference import OCI_MANIFEST, Local, Registry, sha256
from ramet.watch import Progress, watched, written

INSPECT_DEADLINE = 60.0
PULL_DEADLINE = 4 * 3600.0
STALL = 120.0  # seconds without a byte from a registry before we give up on it
UNPACK_DEADLINE = 3600.0
LAYOUT = "layout"  # below the work directory, in which the programs run: relative names, since a colon in a path means a tag to both
TREE = Path("jail/tree")  # not a direct child: umoci 0.4.7 obeys a whiteout of `..` and removes the tree's parent


_FAKED = re.compile(r"rootless\{(.*)\} creating empty file in place of device")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Found:
    """An image that exists. digest: of its manifest for this architecture; origin: of the index it was found through, else the same.

    manifest: None where only the index was read so far.
    """

    digest: str
    origin: str
    manifest: oci.Manifest | None = None


def _options(source: Registry | Local, prefix: str = "") -> list[str]:
    """What skopeo needs to know about a source."""
    options: list[str] = []
    if isinstance(source, Registry) and source.loopback:
        options.append(f"--{prefix}tls-verify=false")
    # skopeo of Debian 12 does not know DOCKER_CONFIG
    if (directory := os.environ.get("DOCKER_CONFIG")) and not os.environ.get("REGISTRY_AUTH_FILE"):
        file = Path(directory) / "config.json"
        if file.is_file():
            options.append(f"--{prefix}authfile={file}")
    return options


async def _raw(source: Registry | Local, transport: str) -> str:
    """A manifest or index as it is served. skopeo verifies it where the transport names a digest."""
    argv = ("skopeo", "inspect", "--raw", *_options(source), transport)
    try:
        result = await userns.run(argv, root=False, deadline=INSPECT_DEADLINE, apart=True)
    except HostError as error:
        raise _silent(source, error) from error
    if result.returncode:
        raise explain(source, process.failure(argv, result.returncode, result.errors, f"image {source.reference}"))
    return result.output


async def find(source: Registry | Local) -> Found:
    """Look an image up without fetching it. Raises ImageError, HostError."""
    userns.require("skopeo", "setpriv")
    what = f"image {source.reference}"
    if isinstance(source, Local):
        _exists(source)
    raw = await _raw(source, source.transport)
    origin = sha256(raw.encode())
    if isinstance(source, Registry) and source.digest and origin != source.digest:
        raise ImageError(f"{what}: digest mismatch: the registry answers with a manifest of digest {origin}")
    chosen = oci.choose(raw, what)
    if isinstance(chosen, oci.Manifest):
        return Found(digest=origin, origin=origin, manifest=chosen)
    return Found(digest=chosen.digest, origin=origin)


def _exists(source: Local) -> None:
    path = Path(source.transport.split(":")[1])
    if not path.exists():
        raise ImageError(f"image {source.reference}: {path} does not exist")


async def pull(source: Registry | Local, found: Found, work: Path, progress: Progress) -> Path:
    """Fetch an image into a layout below the work directory. Raises ImageError, NoSpaceError, HostError."""
    what, transport, manifest = f"image {source.reference}", source.transport, found.manifest
    if isinstance(source, Registry):
        transport = f"docker://{source.name}@{found.digest}"  # what was looked up, whatever the tag says by now
        if manifest is None:
            chosen = oci.choose(await _raw(source, transport), what)
            if not isinstance(chosen, oci.Manifest):
                raise ImageError(f"{what}: an index of indexes")
            manifest = chosen
    total = sum(layer.size for layer in manifest.layers) if manifest else 0
    _space(what, work, total)
    temporary = work / "tmp"  # skopeo unpacks archives there: by default in /var/tmp, where nobody would clean up after a kill
    temporary.mkdir()
    argv = (
        *(
            "skopeo",
            "--override-os=linux",
            f"--override-arch={oci.architecture()}",
            "copy",
            "--retry-times=2",
            "--dest-oci-accept-uncompressed-layers",
        ),
        *(*_options(source, "src-"), transport, f"oci:{LAYOUT}:image"),
    )
    progress("fetching the image", 0.0 if total else None)
    copy = userns.run(argv, root=False, deadline=PULL_DEADLINE, cwd=work, env={"TMPDIR": str(temporary)})
    try:
        result = await watched(copy, _Download(source, work, total, progress))
    except HostError as error:
        raise _silent(source, error) from error
    if result.returncode:
        raise explain(source, process.failure(argv, result.returncode, result.output, what))
    layout = work / LAYOUT
    await asyncio.to_thread(_verify, layout, found, manifest, what)
    return layout


class _Download:
    """Reports how much of an image has come, and notices when nothing comes any more."""

    def __init__(self, source: Registry | Local, work: Path, total: int, progress: Progress) -> None:
        self.source, self.work, self.total, self.progress = source, work, total, progress
        self.have, self.since = 0, time.monotonic()

    def __call__(self) -> None:
        now, have = time.monotonic(), written(self.work)
        if have != self.have:
            self.have, self.since = have, now
        self.progress("fetching the image", min(1.0, have / self.total) if self.total else None)
        if isinstance(self.source, Registry) and now - self.since > STALL:
            raise ImageError(
                f"image {self.source.reference}: {self.source.host} sent nothing for {STALL:.0f} s", hint="Try again; look at the network."
            )


def _space(what: str, work: Path, total: int) -> None:
    """Refuse what cannot fit before fetching it: the layers lie there compressed and unpacked at one time."""
    free = os.statvfs(work).f_bavail * os.statvfs(work).f_frsize
    if free < 2 * total:
        raise NoSpaceError(f"{what}: needs at least {2 * total >> 20} MiB in {work.parent}, {free >> 20} MiB are free")


def _verify(layout: Path, found: Found, expected: oci.Manifest | None, what: str) -> None:
    """Hold the layout on our disk to what was looked up. Docker's manifests are rewritten as OCI's on the way, with the same layers."""
    descriptor, manifest = oci.manifest(layout, what)
    got, wanted = [layer.digest for layer in manifest.layers], [layer.digest for layer in expected.layers] if expected else None
    if wanted is not None and got != wanted:
        raise ImageError(f"{what}: the layers that came are not those of its manifest")
    native = expected.mediaType == OCI_MANIFEST if expected else found.digest != found.origin
    if native and descriptor.digest != found.digest:
        raise ImageError(
            f"{what}: digest mismatch: {descriptor.digest} came instead of {found.digest}", hint="It may have changed meanwhile: try again."
        )
    for layer in manifest.layers:
        oci.verify(layout, layer, what)


async def _plain(layout: Path, manifest: oci.Manifest, what: str) -> None:
    """Make all layers ones that umoci 0.4.7 can read: it knows no zstd, and believes a docker-archive that says gzip of what is plain.

    umoci then holds each to the config's digest of the uncompressed layer, so nothing can be smuggled in here.
    """
    replaced: dict[str, oci.Descriptor] = {}
    for layer in manifest.layers:
        if layer.digest in replaced:
            continue
        kind = oci.layer_type(oci.blob(layout, layer))
        if kind != oci.ZSTD_LAYER:
            if kind != layer.mediaType:
                replaced[layer.digest] = layer.model_copy(update={"mediaType": kind})
            continue
        userns.require("zstd")
        plain = layout / "plain"
        command = ("zstd", "-dq", "-o", str(plain), str(oci.blob(layout, layer)))
        result = await userns.run(command, root=False, deadline=UNPACK_DEADLINE)
        result.check(f"{what}: decompressing a layer")
        digest = await asyncio.to_thread(oci.digest_of, plain)
        replaced[layer.digest] = oci.Descriptor(digest=digest, size=plain.stat().st_size, mediaType=oci.PLAIN_LAYER)
        oci.blob(layout, layer).unlink()
        plain.rename(oci.blob(layout, replaced[layer.digest]))
    if replaced:
        oci.replace_layers(layout, replaced)


async def unpack(source: Registry | Local, layout: Path, work: Path, progress: Progress) -> tuple[Path, ImageConfig]:
    """A verified layout as a tree below the work directory, and the image's config."""
    userns.require("umoci")
    what = f"image {source.reference}"
    _, manifest = oci.manifest(layout, what)
    config = oci.config(layout, manifest, what)
    progress("unpacking the image", 0.0)
    await _plain(layout, manifest, what)
    _, manifest = oci.manifest(layout, what)
    sizes = {layer.digest: layer.size for layer in manifest.layers}
    total, done = max(sum(sizes.values()), 1), 0

    def on_line(line: str) -> None:
        nonlocal done
        if layer := re.search(r"unpack layer: (sha256:[0-9a-f]{64})", line):
            progress("unpacking the image", done / total)
            done += sizes.get(layer[1], 0)
        elif (device := _FAKED.search(line)) and not device[1].startswith("dev/"):  # a machine's /dev is the kernel's own
            _log.warning("%s: the device node %s became an empty file: only root can make device nodes", what, device[1])

    (work / TREE.parent).mkdir()
    argv = ("umoci", "--log=info", "raw", "unpack", "--image", f"{layout.name}:image", str(TREE))
    result = await userns.run(argv, deadline=UNPACK_DEADLINE, cwd=work, on_line=on_line)
    if result.returncode:
        failed = process.failure(argv, result.returncode, result.output, what)
        if isinstance(failed, NoSpaceError):
            raise failed
        raise ImageError(
            f"{what}: a layer cannot be unpacked: {failed.details['log'].splitlines()[-1].strip(' ⨯')}", details=failed.details
        )
    return work / TREE, oci.settings(config)


# Marks in skopeo's output (lower case), what they mean, and what to do. The first that fits counts.
_MEANINGS = (
    (
        ("loading tar component", "open index.json", "index.json: not a directory"),
        "cannot be read",
        "Look whether it is what the part before the path says.",
    ),
    (
        ("digest did not match", "does not match provided manifest digest", "does not match expected sha256"),
        "digest mismatch: what came is not what its digest names",
        "Fetch it again; if it stays, push it again.",
    ),
    (("unexpected eof", "happened during read"), "a blob is truncated", "Fetch it again; if it stays, push it again."),
    (
        ("blob unknown", "error fetching blob: invalid status code from registry 404"),
        "the registry has lost one of its blobs",
        "Push the image again.",
    ),
    (("toomanyrequests", "rate limit"), "the registry refuses: too many requests", "Wait, or log in: `skopeo login {host}`."),
    (
        ("manifest unknown", "manifest_unknown"),
        "the registry has no such tag or digest",
        "`skopeo list-tags docker://{name}` lists the tags.",
    ),
    (("name unknown", "name_unknown", "repository name not known"), "the registry has no such image", "Look at the name."),
    (
        ("unauthorized", "authentication required", "denied", "invalid username/password", "no basic auth credentials"),
        "the registry refuses access: wrong name, or a login is needed",
        "Look at the name; log in with `skopeo login {host}`.",
    ),
    (("server gave http response to https client",), "the registry speaks no TLS", "Only registries on this host may do without."),
    (
        ("x509:", "tls:", "certificate"),
        "the registry's certificate does not verify",
        "Put its authority's certificate into /etc/containers/certs.d/{host}/ca.crt.",
    ),
    (
        (
            "connection refused",
            "no such host",
            "i/o timeout",
            "network is unreachable",
            "no route to host",
            "server misbehaving",
            "pinging container registry",
        ),
        "the registry cannot be reached",
        "Look at the name, the network and https_proxy.",
    ),
    (("invalid reference format", "repository name must"), "not a name that a registry can have", "Look at the name."),
    (("no descriptor found for reference", "not found in"), "no image of that tag in it", "`skopeo inspect --raw` may tell what is in it."),
    (("no such file or directory",), "a part of it is missing", "Fetch or write it again."),
)


def explain(source: Registry | Local, failed: HostError) -> HostError | ImageError:
    """What skopeo's failure means to a user."""
    what, log = f"image {source.reference}", str(failed.details.get("log", ""))
    if not isinstance(failed, CommandError):
        return failed
    low = log.lower()
    names = {"host": source.host, "name": source.name} if isinstance(source, Registry) else {"host": "", "name": ""}
    for marks, meaning, hint in _MEANINGS:
        if any(mark in low for mark in marks):
            return ImageError(f"{what}: {meaning}", hint=hint.format(**names), details=failed.details)
    lines = log.strip().splitlines() or [failed.message]
    return ImageError(f"{what}: skopeo failed: {lines[-1]}", hint="The end of its output is in the details.", details=failed.details)


def _silent(source: Registry | Local, error: HostError) -> HostError | ImageError:
    """The error for a deadline that passed: for a registry that is its fault, not the host's."""
    if isinstance(error, CommandError | NoSpaceError) or "did not end within" not in error.message or isinstance(source, Local):
        return error
    return ImageError(
        f"image {source.reference}: {source.host} did not answer in time", hint="Try again; look at the network.", details=error.details
    )
