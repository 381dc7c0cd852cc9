"""Which pages of a process are its own, and their contents: asked of a child process that writes some."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ramet.vm import memory
from ramet.vm.memory import PAGE

PAGES = 512
WRITTEN = [(3, 2), (100, 1), (511, 1)]


class Child:
    """A stopped process with a private mapping of a file, and one of nothing, in both of which the same pages were written."""

    def __init__(self, file: Path) -> None:
        with open(file, "r+b") as opened:
            self.of_file = mmap.mmap(opened.fileno(), PAGES * PAGE, flags=mmap.MAP_PRIVATE)
        self.of_nothing = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE)
        ready, done = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            for mapping in (self.of_file, self.of_nothing):
                for page in range(PAGES):
                    mapping[page * PAGE]  # read all of it
                for first, count in WRITTEN:
                    for page in range(first, first + count):
                        mapping[page * PAGE : page * PAGE + 8] = page.to_bytes(8, "little")
            os.write(done, b"x")
            signal.pause()
            os._exit(0)
        os.close(done)
        assert os.read(ready, 1) == b"x"
        os.close(ready)

    def address(self, mapping: mmap.mmap) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(mapping))

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.of_file.close()
        self.of_nothing.close()


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    file = tmp_path / "file"
    file.write_bytes(b"\1" * PAGES * PAGE)
    made = Child(file)
    yield made
    made.end()


@pytest.mark.parametrize("of_file", [True, False])
def test_only_what_was_written_is_private(child: Child, of_file: bool) -> None:
    base = child.address(child.of_file if of_file else child.of_nothing)
    assert memory.private(child.pid, base, PAGES * PAGE) == WRITTEN
    assert memory.private(child.pid, base + 3 * PAGE, PAGE) == [(0, 1)]


def test_the_old_way_finds_the_same(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 6.7 every page's word is read; there the zero page cannot be told apart without being root."""
    base = child.address(child.of_file)
    fd = os.open(f"/proc/{child.pid}/pagemap", os.O_RDONLY)
    try:
        found = list(memory._merged(list(memory._walk(fd, base, base + PAGES * PAGE))))
    finally:
        os.close(fd)
    assert [((start - base) // PAGE, (end - start) // PAGE) for start, end in found] == WRITTEN


@pytest.mark.parametrize("of_file", [True, False])
def test_copies_are_packed(child: Child, tmp_path: Path, of_file: bool) -> None:
    base = child.address(child.of_file if of_file else child.of_nothing)
    rest = b"\1" if of_file else b"\0"
    fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    try:
        assert memory.copy(child.pid, base, [*WRITTEN, (0, 1)], fd) == 5 * PAGE
    finally:
        os.close(fd)
    pages = [page for first, count in WRITTEN for page in range(first, first + count)]
    wanted = b"".join(page.to_bytes(8, "little") + rest * (PAGE - 8) for page in pages) + (rest * PAGE if of_file else bytes(PAGE))
    if of_file:
        wanted = wanted[:-PAGE] + rest * PAGE
    assert (tmp_path / "out").read_bytes() == wanted


def test_many_scattered_pages() -> None:
    """The kernel's list is longer than one call returns, and was seen to tell its last region twice."""
    size, step = 1 << 30, 28
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE) as mapping:
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
        wanted = list(range(0, size // PAGE, step))
        for page in wanted:
            mapping[page * PAGE] = 1
        first = ctypes.c_char.from_buffer(mapping)
        found = memory.private(os.getpid(), ctypes.addressof(first), size)
        del first
    assert found == [(page, 1) for page in wanted]


def test_a_process_that_is_gone(child: Child) -> None:
    base = child.address(child.of_nothing)
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    with open(os.devnull, "wb") as nowhere, pytest.raises(OSError):
        memory.copy(child.pid, base, [(0, 1)], nowhere.fileno())
