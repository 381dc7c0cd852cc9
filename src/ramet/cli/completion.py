"""Completion in bash, where `@` and `:` end words: names of snapshots come in pieces, and only the last piece is replaced."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable

_BREAKS = "@:"  # of COMP_WORDBREAKS (bash(1)), those that our names hold


def joined(words: list[str], at: int) -> tuple[list[str], int, str]:
    """The words with names put together again, the number of the one under the cursor, and how much of that bash will leave alone."""
    found: list[str] = []
    place = len(words)
    for number, word in enumerate(words):
        if number > 1 and found[-1] and (set(word) <= set(_BREAKS) or found[-1][-1] in _BREAKS):
            found[-1] += word
        else:
            found.append(word)
        if number == at:
            place = len(found) - 1
    if place >= len(found):
        return found, len(found), ""
    cut = max(found[place].rfind(mark) for mark in _BREAKS) + 1
    return found, place, found[place][:cut]


def in_bash(complete: Callable[[], None]) -> None:
    """Run the library's completion on the words as people wrote them, and print what bash can use."""
    words, at, kept = joined(os.environ.get("COMP_WORDS", "").split(), int(os.environ.get("COMP_CWORD", "0")))
    os.environ.update(COMP_WORDS=" ".join(words), COMP_CWORD=str(at))
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            complete()
    finally:
        sys.stdout.write("".join(f"{line.removeprefix(kept)}\n" for line in said.getvalue().splitlines() if line))
