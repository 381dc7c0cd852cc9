"""STORE_ROOT LISTEN_FD: a fetcher that copies frames from a directory, and does to them what a test writes into `STORE/control`.

`hold`: answers nothing until that is gone. `refuse`: an error. `wrong`: says that all is here, and nothing is. `crash`: ends with the first want.
`slow SECONDS`: before each answer. What was wanted is in `STORE/wanted`, a line each.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ramet.errors import AbsentError

NAP = 0.005
written = threading.Lock()


def word(root: Path) -> tuple[str, str]:
    try:
        first, _, rest = (root / "control").read_text().partition(" ")
    except FileNotFoundError:
        return "", ""
    return first, rest


def bring(root: Path, frames: list[tuple[str, int, int, str]]) -> None:
    for digest, offset, length, mark in frames:
        name = digest.replace(":", "-")
        with open(root.parent / "elsewhere" / name, "rb") as source:
            data = os.pread(source.fileno(), length, offset)
        assert hashlib.sha256(data).hexdigest()[: len(mark)] == mark
        fd = os.open(root / "blobs" / name, os.O_WRONLY)
        os.pwrite(fd, data, offset)
        os.close(fd)


def answer(root: Path, line: socket.socket, asked: dict[str, Any]) -> None:
    with written, open(root / "wanted", "a") as log:
        log.write(f"{os.getpid()} {asked['head']} {asked['memory']} {len(asked['frames'])}\n")
    while (now := word(root))[0] == "hold":
        time.sleep(NAP)
    said: dict[str, Any] = {"ok": True}
    if now[0] == "crash":
        os._exit(3)
    if now[0] == "slow":
        time.sleep(float(now[1]))
    if now[0] == "refuse":
        said = {"error": AbsentError(f"blob {asked['frames'][0][0]} is not to be had: the registry is closed").wire()}
    elif now[0] != "wrong":
        bring(root, asked["frames"])
    with written:
        line.sendall(json.dumps({"id": asked["id"], **said}).encode() + b"\n")


def serve(root: Path, line: socket.socket) -> None:
    with line, line.makefile("rb") as asked:
        for text in asked:
            threading.Thread(target=answer, args=(root, line, json.loads(text)), daemon=True).start()


if __name__ == "__main__":
    store = Path(sys.argv[1])
    listener = socket.socket(fileno=int(sys.argv[2]))
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(store, connection), daemon=True).start()
