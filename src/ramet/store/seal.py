"""`python -m ramet.store.seal STORE_ROOT ID... [--adopt ID]... [--thorough]`: the process that seals layers in the background, one after the other.

--adopt: a layer whose pages each of them takes over if it has it in its chain; --thorough: also a large one; see `Store.seal`.

Prints `ID FRACTION` as it goes. Exits 0; or, at the first layer that fails, prints the error as the API sends it, as one line of JSON
on stderr, and exits with the error's code.
"""

from __future__ import annotations

import argparse
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
    words = _arguments(argv)
    store = Store(StoreDir(root=words.root))
    try:
        for layer_id in words.layers:
            store.seal(layer_id, _Printer(layer_id), adopt=words.adopt, thorough=words.thorough)
            _say(layer_id, 1.0)
    except RametError as error:
        sys.stderr.write(json.dumps(error.wire()) + "\n")
        return error.exit
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ramet.store.seal")
    parser.add_argument("root", type=Path)
    parser.add_argument("layers", nargs="+", metavar="ID")
    parser.add_argument("--adopt", action="append", default=[], metavar="ID")
    parser.add_argument("--thorough", action="store_true")
    return parser.parse_args(argv)


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
