"""Kernel configurations: did every line of the fragment take effect?"""

from __future__ import annotations

import re

_UNSET = re.compile(r"# (CONFIG_\w+) is not set")


def parse(text: str) -> dict[str, str]:
    """The symbols that a configuration or fragment sets; `n` for those it says are not set."""
    found: dict[str, str] = {}
    for line in map(str.strip, text.splitlines()):
        if unset := _UNSET.fullmatch(line):
            found[unset[1]] = "n"
        elif line.startswith("CONFIG_"):
            name, _, value = line.partition("=")
            found[name] = value
    return found


def dropped(fragment: str, config: str) -> list[str]:
    """The fragment's lines that Kconfig did not honour, as `NAME=wanted, got VALUE`: it drops a symbol with an unmet dependency without a word."""
    have = parse(config)
    wanted = parse(fragment).items()
    return [f"{name}={value}, got {have.get(name, 'n')}" for name, value in wanted if have.get(name, "n") != value]
