"""Locks that say whether their holder lives."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from ramet import locks


def test_held_as_long_as_any_copy_is_open(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not locks.is_held(path)  # there is no file
    fd = locks.take(path)
    assert fd is not None
    copy = os.dup(fd)
    assert locks.is_held(path)
    assert locks.take(path) is None
    os.close(fd)
    assert locks.is_held(path)  # a program that inherited it
    os.close(copy)
    assert not locks.is_held(path)


def test_looking_keeps_nobody_from_taking(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.0005):
            locks.is_held(path)

    looker = threading.Thread(target=look)
    looker.start()
    try:
        for _ in range(200):
            fd = locks.take(path)
            assert fd is not None
            os.close(fd)
    finally:
        ended.set()
        looker.join()
