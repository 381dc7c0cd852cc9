"""The keeper of an image file system of real layers, with `fakefetcher.py` as its fetcher."""

from __future__ import annotations

import sys
from pathlib import Path

from ramet.store import imagefs, keeper

HERE = Path(__file__).parent

if __name__ == "__main__":
    if (Path(sys.argv[1]) / "no-clones").exists():
        keeper.DEVICE = "/dev/fuse-that-is-not-there"  # as where a program may not open what it was given
    sys.exit(imagefs.main(sys.argv[1:], fetcher=(sys.executable, "-P", str(HERE / "fakefetcher.py"))))
