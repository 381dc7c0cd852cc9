"""Debian's cloud kernel: there in seconds while ours is being built, at the price of a slower boot and no DAMON or VMGENID."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

from ramet import process
from ramet.errors import HostError
from ramet.kernels import modules
from ramet.kernels.record import MODULE_ORDER, Kernel, KernelKind, cached, key, publish, workshop

META_PACKAGE = "linux-image-cloud-amd64"
DOWNLOAD_DEADLINE = 600.0  # seconds, for 30 MB

DEVICES = "virtio_pci virtio_blk virtio_net virtio_console virtio_balloon virtio_rng button loop tun"
FILESYSTEMS = "ext4 erofs overlay fuse virtiofs"
# Loaded at boot, so that Docker works inside: images have no modules for this kernel, and nothing would load them.
DOCKER = (
    "veth bridge br_netfilter nf_tables nf_conntrack nft_compat nft_ct nft_masq nft_nat nft_chain_nat nft_fib_inet xt_addrtype xt_conntrack "
    "xt_MASQUERADE xt_nat xt_tcpudp xt_comment xt_mark ip_tables iptable_nat iptable_filter ip6_tables ip6table_nat ip6table_filter"
)

WANTED = f"{DEVICES} {FILESYSTEMS} {DOCKER}"
RECIPE = key("debian-1", WANTED)  # the number counts changes of how we unpack

_NO_PACKAGE = "Debian's cloud kernel is not in this host's package lists"


async def ensure() -> Kernel:
    """The newest cached Debian kernel; fetched when there is none. Raises HostError."""
    found = cached(KernelKind.DEBIAN, RECIPE)
    return found[0] if found else await fetch()


async def fetch() -> Kernel:
    """Download the current package (as any user; nothing is installed) and keep its kernel and the modules we load. Raises HostError, BusyError."""
    package, version = await _current_package()
    name = key(RECIPE, package, version)
    existing = [kernel for kernel in cached(KernelKind.DEBIAN, RECIPE) if kernel.image.parent.name == name]
    if existing:
        return existing[0]
    with workshop(KernelKind.DEBIAN) as (work, _):
        tree = await download(package, version, work)
        staged = work / "staged"
        staged.mkdir()
        await asyncio.to_thread(_collect, tree, staged)
        return publish(
            staged,
            name,
            kind=KernelKind.DEBIAN,
            version=f"{package.removeprefix('linux-image-')} {version}",
            image="vmlinuz",
            recipe=RECIPE,
        )


async def download(package: str, version: str, work: Path) -> Path:
    """Download a Debian package and unpack it under `work`; return the tree. Raises HostError."""
    into, tree = work / "download", work / "tree"
    into.mkdir()
    user = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    argv = ["apt-get", "-q", *user, "download", f"{package}={version}" if version else package]
    ended = await process.run(argv, cwd=into, deadline=DOWNLOAD_DEADLINE)
    ended.check(f"downloading {package}")
    deb = next(into.glob("*.deb"))
    (await process.run(["dpkg-deb", "-x", str(deb), str(tree)], deadline=DOWNLOAD_DEADLINE)).check(f"unpacking {package}")
    shutil.rmtree(into)
    return tree


async def _current_package() -> tuple[str, str]:
    """Name and version of the package behind the meta package, from the host's package lists."""
    ended = await process.run(["apt-cache", "show", "--no-all-versions", META_PACKAGE], deadline=60)
    fields = dict(line.split(": ", 1) for line in ended.output.splitlines() if ": " in line and not line.startswith(" "))
    for dependency in fields.get("Depends", "").split(", "):
        name, _, version = dependency.partition(" ")
        if name.startswith("linux-image-"):
            return name, version.strip("(= )")
    raise HostError(_NO_PACKAGE, hint="Run `apt-get update` as root; on another distribution, build the own kernel with `ramet setup`.")


def _collect(tree: Path, staged: Path) -> None:
    """Copy the kernel, and the modules we want with all they need."""
    shutil.copyfile(next((tree / "boot").glob("vmlinuz-*")), staged / "vmlinuz")
    root = next(path for path in (tree / "lib/modules", tree / "usr/lib/modules") if path.is_dir())
    builtin = frozenset(modules.canonical(line) for listing in root.glob("*/modules.builtin") for line in listing.read_text().split())
    files = {modules.canonical(path.name): path for path in root.rglob("*.ko*")}
    contents = {name: modules.content(path.name, path.read_bytes()) for name, path in files.items()}
    order = modules.load_order(
        f"{DEVICES} {FILESYSTEMS} {DOCKER}".split(), {name: modules.describe(data) for name, data in contents.items()}, builtin
    )
    (staged / "modules").mkdir()
    for name in order:
        (staged / "modules" / f"{name}.ko").write_bytes(contents[name])
    (staged / "modules" / MODULE_ORDER).write_text("".join(f"{name}.ko\n" for name in order))
