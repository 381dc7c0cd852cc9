"""A source of files for the image file system: layers that are plain raw files. Run as a program it is the keeper, with what a test asks for in `control`."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

from ramet.errors import LayerError
from ramet.paths import StoreDir
from ramet.store import fuse, imagefs, keeper
from ramet.store.imagefs import Part

PIECE = 65536


class Raw:
    """One file `layers/ID/raw`.

    Words in `STORE/control`: `damage OFFSET` (that piece cannot be read), `stall` (reads take a while), `hold` (they take for ever, and say so in
    `STORE/held`), `crash` (they end the process).
    """

    memory = False

    def __init__(self, files: StoreDir, layer_id: str) -> None:
        self._files = files
        self._id = layer_id
        try:
            self._fd = os.open(files.layer(layer_id).root / "raw", os.O_RDONLY)
        except FileNotFoundError:
            raise LayerError(f"the layer {layer_id} is missing") from None
        self.size = os.fstat(self._fd).st_size

    def read(self, offset: int, length: int) -> list[Part]:
        control = self._files.root / "control"
        word, _, number = (control.read_text() if control.exists() else "").partition(" ")
        if word == "crash":
            os._exit(7)
        if word == "stall":
            time.sleep(0.003)
        if word == "hold":
            (draft := self._files.root / f"held.{os.getpid()}").write_text(str(os.getpid()))
            draft.rename(self._files.root / "held")  # whole, though other workers say the same
            time.sleep(3600)
        if word == "damage" and offset <= int(number) < offset + length:
            raise LayerError(f"the layer {self._id} is damaged: blob sha256-abc, chunk {int(number) // PIECE}")
        return [os.pread(self._fd, min(PIECE, offset + length - at), at) for at in range(offset, min(offset + length, self.size), PIECE)]

    def close(self) -> None:
        os.close(self._fd)


def publish(files: StoreDir, layer_id: str, content: bytes) -> bytes:
    """Make a layer; returns its content."""
    draft = files.draft(layer_id)
    save(files, layer_id, len(content))
    (draft.root / "raw").write_bytes(content)
    draft.root.rename(files.layer(layer_id).root)
    return content


def save(files: StoreDir, layer_id: str, size: int) -> None:
    """Begin one: its draft."""
    draft = files.draft(layer_id)
    draft.root.mkdir(parents=True)
    draft.record.write_text(json.dumps({"size": size}))


def content(seed: int, size: int) -> bytes:
    """Bytes that differ everywhere, and can be made again."""
    rng = random.Random(seed)
    return b"".join(rng.randbytes(min(1 << 20, size - at)) for at in range(0, size, 1 << 20))


if __name__ == "__main__":
    root = Path(sys.argv[1])
    if (root / "old-kernel").exists():
        fuse.NOTIFY_RESEND = 99  # a code that this kernel refuses as older ones refuse the real one
    if (root / "no-clones").exists():
        keeper.DEVICE = "/dev/fuse-that-is-not-there"  # as where a program may not open what it was given
    sys.exit(imagefs.main(sys.argv[1:], Raw))
