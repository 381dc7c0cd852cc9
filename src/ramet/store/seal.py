"""`python -m ramet.store.seal STORE_ROOT ID...`: the process that seals layers in the background, one after the other.

Prints `ID FRACTION` as it goes. Exits 0; or, at the first layer that fails, prints the error as the API sends it, as one line of JSON
on stderr, and exits with the error's code.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ramet.errors import RametError
from ramet.paths import StoreDir
from ramet.store.store import Store

_NICE = 10
_EVERY = 0.2  # seconds between two lines


def main(argv: Sequence[str]) -> int:
    """Seal the layers named; the exit code."""
    os.nice(_NICE)
    store = Store(StoreDir(root=Path(argv[0])))
    try:
        for layer_id in argv[1:]:
            store.seal(layer_id, _Printer(layer_id))
            _say(layer_id, 1.0)
    except RametError as error:
        sys.stderr.write(json.dumps(error.wire()) + "\n")
        return error.exit
    return 0


class _Printer:
    """Says how far a layer is, not too often."""

    def __init__(self, layer_id: str) -> None:
        self._id = layer_id
        self._next = 0.0

    def __call__(self, fraction: float) -> None:
        now = time.monotonic()
        if fraction < 1 and now >= self._next:
            self._next = now + _EVERY
            _say(self._id, fraction)


def _say(layer_id: str, fraction: float) -> None:
    sys.stdout.write(f"{layer_id} {fraction:.3f}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
