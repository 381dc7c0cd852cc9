"""Kernel modules: what a module file says of itself, and the order to load a set of them in. Pure."""

from __future__ import annotations

import lzma
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ramet.errors import HostError


@dataclass(frozen=True, kw_only=True)
class Module:
    """What decides a module's place: depends are module names, before are module names or aliases of things to load first if there are any."""

    depends: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


def canonical(name: str) -> str:
    """The kernel's spelling of a module's name, given that or a file name."""
    return name.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def content(name: str, data: bytes) -> bytes:
    """A module file's content, decompressed by its name (Debian compresses with xz since 13)."""
    if name.endswith(".ko"):
        return data
    if name.endswith(".ko.xz"):
        return lzma.decompress(data)
    raise HostError(f"the kernel module {name} is compressed in a way that Ramet cannot read")


def describe(data: bytes) -> Module:
    """Read the .modinfo section of a module (ELF64, little-endian)."""
    offset, size, count, names = *struct.unpack_from("<Q", data, 0x28), *struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, offset + size * index) for index in range(count)]
    strings = data[headers[names][4] :]
    section = next((h for h in headers if strings[h[0] : strings.index(b"\0", h[0])] == b".modinfo"), None)
    words = data[section[4] : section[4] + section[5]].decode(errors="replace").split("\0") if section else []
    pairs = [tuple(word.split("=", 1)) for word in words if "=" in word]
    depends = [canonical(d) for tag, value in pairs if tag == "depends" for d in value.split(",") if d]
    before = [canonical(d) for tag, value in pairs if tag == "softdep" and value.startswith("pre:") for d in _pre(value)]
    aliases = [value.replace("-", "_") for tag, value in pairs if tag == "alias"]
    return Module(depends=tuple(depends), before=tuple(before), aliases=tuple(aliases))


def _pre(softdep: str) -> list[str]:
    return softdep.removeprefix("pre:").partition("post:")[0].split()


def load_order(wanted: Iterable[str], modules: Mapping[str, Module], builtin: frozenset[str]) -> list[str]:
    """The modules to load for `wanted`, each after what it needs. Built-in ones are left out; HostError names one that does not exist."""
    order: list[str] = []
    entered: set[str] = set()

    def visit(name: str, chain: tuple[str, ...]) -> None:
        if name in builtin or name in entered:
            return
        entered.add(name)
        if name not in modules:
            raise HostError(f"the kernel has no module {name}" + (f", which {chain[-1]} needs" if chain else ""))
        for first in modules[name].before:
            for provider in [first] if first in modules else sorted(n for n, m in modules.items() if first in m.aliases):
                visit(provider, (*chain, name))
        for first in modules[name].depends:
            visit(first, (*chain, name))
        order.append(name)

    for name in wanted:
        visit(canonical(name), ())
    return order
