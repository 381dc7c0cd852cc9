"""Every file name on disk, written once.

STATE/                      $RAMET_HOME, else $XDG_DATA_HOME/ramet, else ~/.local/share/ramet
  daemon.lock               flock: one daemon for one state directory
  daemon.json               pid and address of the running daemon
  daemon.log
  token                     the bearer token (0600), made at the first start
  reserve                   a little of the disk, given up for the start of a daemon when it is full
  ramet.db                  SQLite, WAL
  kvm.json                  the cached result of the KVM probe
  pushes.json               which registry has which blobs and snapshots, and uploads that can go on
  images/DIGEST/            one directory an image: published by rename
    disk.raw                ext4
    image.json              env, user, workdir, entrypoint, where it came from
  images/.work-XXXX/        being made; removed when its maker's flock on it is free
  images/.lock-DIGEST       flock: one maker for one image
  blanks/NAME-BYTES.raw     the empty ext4 that a drive of that name and size begins with
  blanks/.new-XXXX          being made
  store/                    layers: what snapshots are made of
    layers/ID/              16 hex digits: published by rename
      layer.json            size, parent, the layers that its pages come from
      owners                which of those each page comes from
      spool runs            the pages as they were saved, and where each lies; until sealed
      index                 where each chunk lies in the blobs; once sealed
    layers/.new-ID/         being made
      trace                 which chunks a start touched, in order; trace.new: being recorded
    blobs/sha256-HEX        zstd seekable; of one that is fetched when needed, holes are what is not here
    remote/sha256-HEX       where such a blob is to be had
    mnt/                    the image file system
    imagefs.lock            flock held by the keeper: held = mounted
    imagefs.starting        flock: one who starts or stops it
    imagefs.pids imagefs.log
    fetch.sock              who wants a chunk that is not here asks the fetcher, which the keeper starts
    faults.log              what could not be served, and why; one line each
  snapshots/ID/             published by rename, before the database knows; the layers are in store/
    snapshot.json           its record as it was made
    state                   QEMU's devices, for those with memory
  machines/.before-ID/      what a machine was that is being rewound, with the record that it had in before.json
  machines/.deleting-*/     being removed
  machines/ID/
    disk.json               which overlay of each disk is the machine's own, and what it stands on
    disk-N.qcow2            overlays of the root disk: more than one only in the middle of a save
    disk-NAME-N.qcow2       the same of a drive
    lock                    flock held by the shim and QEMU: held = alive
    pids exit console.log qemu.log     written by the shim
    qmp.sock agent.sock     bound by us, handed to QEMU
CACHE/                      $RAMET_CACHE, else $XDG_CACHE_HOME/ramet, else ~/.cache/ramet: may be deleted at any time
  agent/HASH/               ramet-agent, ramet-shim
  kernels/HASH/
  initramfs/HASH
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


def _base(own: str, xdg: str, default: str) -> Path:
    if value := os.environ.get(own):
        return Path(value).absolute()
    base = os.environ.get(xdg)
    return (Path(base) if base else Path.home() / default).absolute() / "ramet"


def cache_dir() -> Path:
    """Where artifacts that can be made again live."""
    return _base("RAMET_CACHE", "XDG_CACHE_HOME", ".cache")


def share_dir(name: str) -> Path:
    """A directory of sources that Ramet ships (`agent`, `kernel`, `examples`): in the wheel, else in the checkout."""
    packaged = Path(__file__).parent / "share" / name
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / name


@dataclass(frozen=True, kw_only=True)
class MachineDir:
    """The files of one machine."""

    root: Path

    @property
    def disk(self) -> Path:
        return self.root / "disk.json"

    def overlay(self, number: int, drive: str = "") -> Path:
        """drive: its name; empty: the root disk."""
        return self.root / (f"disk-{drive}-{number}.qcow2" if drive else f"disk-{number}.qcow2")

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def pids(self) -> Path:
        return self.root / "pids"

    @property
    def exit(self) -> Path:
        return self.root / "exit"

    @property
    def console(self) -> Path:
        return self.root / "console.log"

    @property
    def qemu_log(self) -> Path:
        return self.root / "qemu.log"

    @property
    def qmp(self) -> Path:
        return self.root / "qmp.sock"

    @property
    def agent(self) -> Path:
        return self.root / "agent.sock"

    @property
    def before(self) -> Path:
        """The record that a machine which is being rewound had before."""
        return self.root / "before.json"


@dataclass(frozen=True, kw_only=True)
class ImageDir:
    """The files of one image."""

    root: Path

    @property
    def disk(self) -> Path:
        return self.root / "disk.raw"

    @property
    def record(self) -> Path:
        return self.root / "image.json"


@dataclass(frozen=True, kw_only=True)
class SnapshotDir:
    """The files of one snapshot that are not layers."""

    root: Path

    @property
    def record(self) -> Path:
        return self.root / "snapshot.json"

    @property
    def state(self) -> Path:
        return self.root / "state"


@dataclass(frozen=True, kw_only=True)
class LayerDir:
    """The files of one layer."""

    root: Path

    @property
    def record(self) -> Path:
        return self.root / "layer.json"

    @property
    def owners(self) -> Path:
        return self.root / "owners"

    @property
    def spool(self) -> Path:
        return self.root / "spool"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def index(self) -> Path:
        return self.root / "index"

    @property
    def trace(self) -> Path:
        return self.root / "trace"

    @property
    def tracing(self) -> Path:
        return self.root / "trace.new"


@dataclass(frozen=True, kw_only=True)
class StoreDir:
    """The files of a host's layers, and of the file system that serves them. state: what the paths of base images are relative to."""

    root: Path

    @property
    def state(self) -> Path:
        return self.root.parent

    @property
    def layers(self) -> Path:
        return self.root / "layers"

    @property
    def blobs(self) -> Path:
        return self.root / "blobs"

    @property
    def remotes(self) -> Path:
        return self.root / "remote"

    @property
    def fetch(self) -> Path:
        return self.root / "fetch.sock"

    @property
    def mount(self) -> Path:
        return self.root / "mnt"

    @property
    def lock(self) -> Path:
        return self.root / "imagefs.lock"

    @property
    def pids(self) -> Path:
        return self.root / "imagefs.pids"

    @property
    def log(self) -> Path:
        return self.root / "imagefs.log"

    @property
    def faults(self) -> Path:
        return self.root / "faults.log"

    def layer(self, layer_id: str) -> LayerDir:
        return LayerDir(root=self.layers / layer_id)

    def draft(self, layer_id: str) -> LayerDir:
        return LayerDir(root=self.layers / f".new-{layer_id}")

    def blob(self, digest: str) -> Path:
        """digest: `sha256:…`."""
        return self.blobs / digest.replace(":", "-")

    def remote(self, digest: str) -> Path:
        return self.remotes / digest.replace(":", "-")

    def served(self, layer_id: str) -> Path:
        """The layer, with all it stands on, as one raw file."""
        return self.mount / layer_id


@dataclass(frozen=True, kw_only=True)
class StateDir:
    """The files of one daemon."""

    root: Path

    @classmethod
    def default(cls) -> StateDir:
        return cls(root=_base("RAMET_HOME", "XDG_DATA_HOME", ".local/share"))

    @property
    def lock(self) -> Path:
        return self.root / "daemon.lock"

    @property
    def reserve(self) -> Path:
        return self.root / "reserve"

    @property
    def daemon(self) -> Path:
        return self.root / "daemon.json"

    @property
    def log(self) -> Path:
        return self.root / "daemon.log"

    @property
    def token(self) -> Path:
        return self.root / "token"

    @property
    def database(self) -> Path:
        return self.root / "ramet.db"

    @property
    def kvm(self) -> Path:
        return self.root / "kvm.json"

    @property
    def pushes(self) -> Path:
        return self.root / "pushes.json"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def blanks(self) -> Path:
        return self.root / "blanks"

    def blank(self, drive: str, size: int) -> Path:
        return self.blanks / f"{drive}-{size}.raw"

    @property
    def machines(self) -> Path:
        return self.root / "machines"

    @property
    def snapshots(self) -> Path:
        return self.root / "snapshots"

    def snapshot(self, snapshot_id: str) -> SnapshotDir:
        return SnapshotDir(root=self.snapshots / snapshot_id)

    @property
    def store(self) -> StoreDir:
        return StoreDir(root=self.root / "store")

    def image(self, digest: str) -> ImageDir:
        """digest: `sha256:…`; the directory's name has a dash, for QEMU and skopeo read meaning into colons."""
        return ImageDir(root=self.images / digest.replace(":", "-"))

    def machine(self, machine_id: str) -> MachineDir:
        return MachineDir(root=self.machines / machine_id)

    def create(self) -> None:
        """Make the directories, for the owner only: disks and memories hold secrets."""
        places = (
            self.images,
            self.blanks,
            self.machines,
            self.snapshots,
            self.store.root,
            self.store.layers,
            self.store.blobs,
            self.store.remotes,
        )
        for path in (self.root, *places):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
