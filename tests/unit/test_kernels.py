"""Kernels: the pure parts."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import struct
from pathlib import Path
from stat import S_IFCHR, S_IFDIR, S_IFREG

import pytest

from ramet import kernels
from ramet.errors import BusyError, HostError, SpecError
from ramet.kernels import Kernel, KernelKind, config, modules, own, record
from ramet.kernels.initramfs import Entry, entries, initramfs, newc
from ramet.kernels.modules import Module

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAMET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RAMET_KERNEL", raising=False)
    return tmp_path / "cache"


def make_kernel(kind: KernelKind, name: str, recipe: str, content: bytes = b"kernel", names: tuple[str, ...] = ()) -> Kernel:
    """A kernel in the cache, published as real ones are."""
    with record.workshop(kind) as (work, _):
        staged = work / "staged"
        staged.mkdir()
        (staged / "image").write_bytes(content)
        if names:
            (staged / "modules").mkdir()
            (staged / "modules" / "order").write_text("\n".join(names))
            for module in names:
                (staged / "modules" / module).write_bytes(module.encode())
        return record.publish(staged, name, kind=kind, version="6.1", image="image", recipe=recipe)


# --- cpio ---


def test_cpio_golden() -> None:
    archive = newc([Entry(name="d", mode=S_IFDIR | 0o755), Entry(name="d/f", mode=S_IFREG | 0o644, data=b"hello")])
    assert archive == (
        b"070701" b"00000001" b"000041ED" b"00000000" b"00000000" b"00000002" b"00000000" b"00000000" b"00000000" b"00000000"
        b"00000000" b"00000000" b"00000002" b"00000000" b"d\0"
        b"070701" b"00000002" b"000081A4" b"00000000" b"00000000" b"00000001" b"00000000" b"00000005" b"00000000" b"00000000"
        b"00000000" b"00000000" b"00000004" b"00000000" b"d/f\0" b"\0\0" b"hello" b"\0\0\0"
        b"070701" b"00000000" b"00000000" b"00000000" b"00000000" b"00000001" b"00000000" b"00000000" b"00000000" b"00000000"
        b"00000000" b"00000000" b"0000000B" b"00000000" b"TRAILER!!!\0" b"\0\0\0"
    )  # fmt: skip


def test_cpio_device_numbers() -> None:
    archive = newc([Entry(name="console", mode=S_IFCHR | 0o600, device=(5, 1))])
    assert archive[6 + 9 * 8 : 6 + 11 * 8] == b"0000000500000001"
    assert len(archive) % 4 == 0


def test_initramfs_entries_come_after_their_directories(cache: Path) -> None:
    kernel = make_kernel(KernelKind.DEBIAN, "00", "r", names=("b.ko", "a.ko"))
    found = list(entries(b"agent", kernel.modules))
    names = [entry.name for entry in found]
    assert names[-4:] == ["modules", "modules/b.ko", "modules/a.ko", "modules/order"]
    for name in names:
        parent = name.rpartition("/")[0]
        assert not parent or names.index(parent) < names.index(name)
    assert next(entry for entry in found if entry.name == "dev/console").device == (5, 1)


def test_initramfs_is_cached_by_content(cache: Path, tmp_path: Path) -> None:
    agent = tmp_path / "agent"
    agent.write_bytes(b"one")
    first = make_kernel(KernelKind.OWN, "01", "r", b"first")
    second = make_kernel(KernelKind.OWN, "02", "r", b"second")
    path = initramfs(first, agent)
    assert initramfs(first, agent) == path
    assert initramfs(second, agent) != path
    agent.write_bytes(b"two")
    assert initramfs(first, agent) != path
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


# --- modules ---


def elf_module(info: bytes) -> bytes:
    """The least of an ELF file that has a .modinfo section."""
    names = b"\0.modinfo\0.shstrtab\0"
    offset = 64 + len(info) + len(names)
    header = b"\x7fELF\x02\x01\x01".ljust(0x28, b"\0") + struct.pack("<Q", offset)
    header = header.ljust(0x3A, b"\0") + struct.pack("<HHH", 64, 3, 2)
    sections = [(0,) * 10, (1, 1, 0, 0, 64, len(info), 0, 0, 1, 0), (10, 3, 0, 0, 64 + len(info), len(names), 0, 0, 1, 0)]
    return header + info + names + b"".join(struct.pack("<IIQQQQIIQQ", *section) for section in sections)


def test_describe_reads_modinfo() -> None:
    module = modules.describe(
        elf_module(b"license=GPL\0depends=libcrc32c,x-tables\0softdep=pre: crc32c-generic post: none\0alias=crypto-foo\0alias=foo\0")
    )
    assert module == Module(depends=("libcrc32c", "x_tables"), before=("crc32c_generic",), aliases=("crypto_foo", "foo"))


def test_content_is_decompressed_by_name() -> None:
    assert modules.content("a.ko", b"raw") == b"raw"
    assert modules.content("a.ko.xz", lzma.compress(b"raw")) == b"raw"
    with pytest.raises(HostError, match=r"a\.ko\.br"):
        modules.content("a.ko.br", b"")


def test_load_order_puts_what_is_needed_first() -> None:
    known = {
        "virtio": Module(depends=("virtio_ring",)),
        "virtio_ring": Module(),
        "virtio_pci": Module(depends=("virtio", "virtio_ring")),
        "ext4": Module(depends=("jbd2",), before=("crc32c", "nowhere")),
        "jbd2": Module(),
        "crc32c_intel": Module(aliases=("crc32c",)),
    }
    order = modules.load_order(["virtio-pci", "ext4", "fuse"], known, frozenset({"fuse"}))
    assert order == ["virtio_ring", "virtio", "virtio_pci", "crc32c_intel", "jbd2", "ext4"]


def test_load_order_survives_a_circle_and_names_what_is_missing() -> None:
    assert modules.load_order(["a"], {"a": Module(depends=("b",)), "b": Module(depends=("a",))}, frozenset()) == ["b", "a"]
    with pytest.raises(HostError, match="no module gone, which a needs"):
        modules.load_order(["a"], {"a": Module(depends=("gone",))}, frozenset())
    with pytest.raises(HostError, match=r"no module gone$"):
        modules.load_order(["gone"], {}, frozenset())


# --- the configuration ---


def test_dropped_names_the_lines_that_took_no_effect() -> None:
    fragment = '# why\nCONFIG_A=y\nCONFIG_B=n\nCONFIG_C=y\nCONFIG_D="x"\nCONFIG_E=n\n# CONFIG_F is not set\n'
    configured = 'CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_D="y"\nCONFIG_F=y\n'
    assert config.dropped(fragment, configured) == ["CONFIG_C=y, got n", 'CONFIG_D="x", got "y"', "CONFIG_F=n, got y"]
    assert config.dropped(fragment, 'CONFIG_A=y\nCONFIG_C=y\nCONFIG_D="x"\n') == []


def test_fragment_sets_each_symbol_once() -> None:
    lines = [line.partition("=")[0] for line in own.shipped().fragment.splitlines() if line.startswith("CONFIG_")]
    assert sorted(lines) == sorted(set(lines))


def test_cache_key_depends_on_fragment_patches_version_and_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = own.Recipe(fragment="CONFIG_A=y\nCONFIG_B=y\n")
    others = [
        own.Recipe(fragment="CONFIG_A=n\n"),
        own.Recipe(fragment="CONFIG_A=y", patches=("p",)),
        own.Recipe(fragment="CONFIG_A=y", patches=("q",)),
    ]
    keys = {plain.cache_key("1"), plain.cache_key("2"), *(other.cache_key("1") for other in others)}
    monkeypatch.setattr(own, "RECIPE", "own-0")
    keys.add(plain.cache_key("1"))
    assert len(keys) == 6
    monkeypatch.undo()
    assert plain.key == own.Recipe(fragment="# why\nCONFIG_B=y\n\nCONFIG_A=y").key


# --- the cache ---


def test_digest_covers_image_and_modules(cache: Path) -> None:
    plain = make_kernel(KernelKind.OWN, "0a", "r", b"same")
    again = make_kernel(KernelKind.OWN, "0b", "r", b"same")
    moduled = make_kernel(KernelKind.DEBIAN, "0c", "r", b"same", names=("a.ko",))
    assert plain.digest == again.digest == hashlib.sha256(b"same").hexdigest()
    assert moduled.digest != plain.digest
    assert record.find(moduled.digest) == moduled
    assert record.find("0" * 64) is None


def test_publishing_twice_keeps_the_first(cache: Path) -> None:
    first = make_kernel(KernelKind.OWN, "0a", "r")
    inode = first.image.stat().st_ino
    assert make_kernel(KernelKind.OWN, "0a", "r").image.stat().st_ino == inode
    assert sorted(path.name for path in (cache / "kernels").iterdir()) == [".own-lock", "0a"]


def test_damaged_record_is_no_kernel(cache: Path) -> None:
    kernel = make_kernel(KernelKind.OWN, "0a", "r")
    (kernel.image.parent / "kernel.json").write_text("{")
    assert record.cached(KernelKind.OWN) == []


def test_one_workshop_at_a_time(cache: Path) -> None:
    with record.workshop(KernelKind.OWN) as (work, _):
        (work / "file").touch()
        with pytest.raises(BusyError), record.workshop(KernelKind.OWN):
            pass
        assert record.clean() == []
        assert (work / "file").exists()
        with record.workshop(KernelKind.DEBIAN):
            pass
    assert not work.exists()


def test_clean_removes_what_a_killed_build_left(cache: Path) -> None:
    stale = record.work_dir(KernelKind.OWN)
    (stale / "source").mkdir(parents=True)
    assert record.clean() == [stale]
    assert not stale.exists()


async def test_current_prefers_own_of_todays_recipe(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = make_kernel(KernelKind.OWN, "0a", "older recipe", b"1")
    assert await kernels.current() == foreign
    today = make_kernel(KernelKind.OWN, "0b", own.shipped().key, b"2")
    os.utime(today.image.parent / "kernel.json", (1, 1))
    assert await kernels.current() == today
    debian = make_kernel(KernelKind.DEBIAN, "0c", kernels.debian.RECIPE, b"3")
    monkeypatch.setenv("RAMET_KERNEL", "debian")
    assert await kernels.current() == debian


async def test_current_refuses_what_it_cannot_give(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMET_KERNEL", "own")
    with pytest.raises(HostError, match="not built"):
        await kernels.current()
    monkeypatch.setenv("RAMET_KERNEL", "mine")
    with pytest.raises(SpecError, match="mine"):
        await kernels.current()


# --- the state of the build ---


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> own.Source:
    found = own.Source(version="6.1.0-1", archive=None)

    async def fake() -> own.Source:
        return found

    monkeypatch.setattr(own, "source", fake)
    return found


async def test_build_status_walks_its_states(cache: Path, source: own.Source) -> None:
    name = own.shipped().cache_key(source.version)
    assert (await kernels.build_status()).state == "none"
    with record.workshop(KernelKind.OWN) as (work, _):
        (work / "progress").write_text("0.250")
        status = await kernels.build_status()
        assert (status.state, status.fraction) == ("running", 0.25)
    record.work_dir(KernelKind.OWN).mkdir()
    (cache / "kernels" / ".own-log").write_text("  CC a.o\nKilled\n")
    status = await kernels.build_status()
    assert (status.state, status.log) == ("failed", "  CC a.o\nKilled")
    kernels.clean()
    (cache / "kernels" / ".own-failed").write_text(json.dumps({"key": "another", "message": "m", "log": "l"}))
    assert (await kernels.build_status()).state == "none"
    (cache / "kernels" / ".own-failed").write_text(json.dumps({"key": name, "message": "m", "log": "l"}))
    status = await kernels.build_status()
    assert (status.state, status.message, status.log) == ("failed", "m", "l")
    make_kernel(KernelKind.OWN, name, own.shipped().key)
    assert (await kernels.build_status()).state == "ready"


async def test_a_build_that_fails_is_on_record(cache: Path, source: own.Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "PROGRAMS", {"no-such-program-of-ramet": "some-package"})
    monkeypatch.setattr(own, "HEADERS", {})
    with pytest.raises(HostError, match="no-such-program") as caught:
        await kernels.build(lambda _: None)
    assert "some-package" in caught.value.hint
    status = await kernels.build_status()
    assert (status.state, status.message) == ("failed", caught.value.message)
    assert not record.work_dir(KernelKind.OWN).exists()


async def test_build_returns_what_is_there(cache: Path, source: own.Source) -> None:
    kernel = make_kernel(KernelKind.OWN, own.shipped().cache_key(source.version), "r")
    assert await kernels.build(lambda _: None) == kernel


# --- the command line ---


def test_cmdline_words_are_unique_and_reasoned() -> None:
    for kind in KernelKind:
        kernel = Kernel(kind=kind, version="", image=Path(), modules=None, digest="")
        words = kernels.cmdline(kernel).split()
        assert len(words) == len(set(words))
        assert "console=ttyS0" in words
