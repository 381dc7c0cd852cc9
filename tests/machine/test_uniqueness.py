"""What makes a copy of a machine a machine of its own: each clause of docs/forking.md, which names these tests."""

from __future__ import annotations

import asyncio
import re
import subprocess
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from ramet import paths
from ramet.engine import Engine
from ramet.errors import MachineFailedError, NotFoundError, RametError
from ramet.kernels import KernelKind
from ramet.model import State
from tests.fixtures import Artifacts, Box
from tests.machine import witness
from tests.machine.witness import DEADLINE, DRAW, HOLD, ask, check, forked

TEXT = Path(__file__).parents[2] / "docs" / "forking.md"
RANDOM = "head -c 8 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid"
MARK = b"ramet-witness-dr"  # draw_mark of witness.c
PAGE, HEAD = 4096, 24
NUMBERS = (PAGE - HEAD) // 8
STRICT = 300  # numbers that are looked at where none may be the same


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stem(engine: Engine, artifacts: Artifacts) -> AsyncIterator[Box]:
    """A machine that tests take copies of; it has drawn random numbers before."""
    await engine.create(artifacts.spec("stem"))
    box = Box(engine, "stem")
    await witness.install(box)
    await witness.start(box, f"hold {HOLD} /srv", HOLD)
    await box.sh(RANDOM)
    async with witness.cleared(engine):
        await forked(box)
    yield box
    await engine.delete("stem")


@pytest_asyncio.fixture(autouse=True, loop_scope="session")
async def cleared(engine: Engine, stem: Box) -> AsyncIterator[None]:
    async with witness.cleared(engine):
        yield


# --- random numbers ---


async def test_the_first_random_numbers_differ(stem: Box) -> None:
    """In each machine that goes on from one instant, whichever the verb: siblings, machines of a snapshot, of a pool, a machine that is rewound."""
    engine = stem.engine
    boxes = [stem, *await forked(stem, 3)]
    seen = [line for box in boxes for line in (await box.text(RANDOM)).splitlines()]
    await engine.snapshot("stem", "instant")
    await engine.template("stem@instant", label="instant", pool=2)
    async with asyncio.timeout(DEADLINE):
        while (await engine.get_snapshot("instant")).pooled < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    for name in ("a", "b", "c"):
        await engine.create_from("instant", name)
        seen += (await Box(engine, name).text(RANDOM)).splitlines()
    for _ in range(2):
        await engine.restore("a", "instant")
        seen += (await Box(engine, "a").text(RANDOM)).splitlines()
    await engine.hibernate("a")
    for _ in range(2):
        await engine.restore("a")  # the same instant twice
        seen += (await Box(engine, "a").text(RANDOM)).splitlines()
    assert len(seen) == 2 * (4 + 3 + 2 + 2)
    assert len(set(seen)) == len(seen)


async def filled(engine: Engine, layer: str) -> int:
    """How many numbers a memory image has drawn: the program fills pages that begin with a mark, one after the other."""
    count, pages = 0, 0
    async for piece in engine.export_layer(layer):
        for at in range(0, len(piece), PAGE):
            if piece[at : at + 16] == MARK:
                pages += 1
                page = piece[at + HEAD : at + PAGE]
                count += sum(page[i : i + 8] != bytes(8) for i in range(0, len(page), 8)) if page[-8:] == bytes(8) else NUMBERS
    assert pages, "the program is not in this memory"
    return count


async def drawn(box: Box, first: int, count: int) -> list[str]:
    """Numbers that the program has drawn there, once there are so many."""
    async with asyncio.timeout(DEADLINE):
        while len(lines := (await ask(box, DRAW, f"dump {first} {count}")).split()) < count:
            pass
    return lines


async def test_a_program_that_draws_across_the_instant(engine: Engine, artifacts: Artifacts) -> None:
    """Strictly: the last number before the instant is the same in all, and from the first one after it on they differ.

    Two cpus: on one only, the agent is always first.
    """
    await engine.create(artifacts.spec("drawing", cpus=2))
    parent = Box(engine, "drawing")
    await witness.install(parent)
    await witness.start(parent, f"draw {DRAW} 4000000", DRAW)
    children = await forked(parent, 3)
    point = await engine.get_snapshot((await engine.get(children[0].name)).snapshot)
    await witness.saved(engine, point.id)
    known = await filled(engine, point.memory_layer)
    assert known > 100
    window = await patience_with(engine)
    streams = [await drawn(box, known - 100, 100 + window) for box in (parent, *children)]
    assert len({tuple(each[:100]) for each in streams}) == 1, "these are not copies of one instant"
    common = max(
        next((at for at, (x, y) in enumerate(zip(one[100:], other[100:], strict=True)) if x != y), window)
        for number, one in enumerate(streams)
        for other in streams[:number]
    )
    assert common < window, "siblings draw the same numbers"
    if window == STRICT:  # one number may have been drawn before the instant and be on its way to the program
        assert common <= 1, f"siblings drew the same {common} numbers after the instant"


async def patience_with(engine: Engine) -> int:
    """After how many numbers copies must differ, at the latest: Debian's kernel does not know that it was copied, until the agent tells it."""
    return STRICT if (await engine.info()).kernel_kind == KernelKind.OWN else 50_000


async def test_a_rewound_program_draws_other_numbers(engine: Engine, artifacts: Artifacts) -> None:
    await engine.create(artifacts.spec("drawing", cpus=2))
    box = Box(engine, "drawing")
    await witness.install(box)
    await witness.start(box, f"draw {DRAW} 4000000", DRAW)
    point = await engine.snapshot(box.name, "instant", test=False)
    known = await filled(engine, (await witness.saved(engine, point.name)).memory_layer)
    window = await patience_with(engine)
    lives = [await drawn(box, known + 1, window)]
    for _ in range(2):
        await engine.restore(box.name, "instant")
        lives.append(await drawn(box, known + 1, window))
    for number, one in enumerate(lives):
        for other in lives[:number]:
            assert not set(one) & set(other) if window == STRICT else one != other


# --- time ---


async def skew(box: Box) -> float:
    """Seconds by which the guest's clock is wrong at least."""
    before = time.time()
    there = float(await box.text("date +%s; cut -d' ' -f1 /proc/uptime >/dev/null"))
    after = time.time()
    return max(before - 1 - there, there - after, 0.0)  # `date` tells whole seconds


async def test_the_clock_is_right(stem: Box) -> None:
    engine = stem.engine
    paused, asleep, rewound = await forked(stem, 3)
    await engine.snapshot(rewound.name, "then", test=False)
    await engine.pause(paused.name)
    await engine.hibernate(asleep.name)
    await asyncio.sleep(4)
    await engine.resume(paused.name)
    assert await skew(paused) < 1
    await engine.resume(asleep.name)
    assert await skew(asleep) < 1
    await engine.restore(rewound.name, "then")
    assert await skew(rewound) < 1
    await engine.create_from(f"{rewound.name}@then", "late")
    assert await skew(Box(engine, "late")) < 1
    assert await skew(stem) < 1


# --- names and ids ---


async def test_the_hostname_is_the_machine_s_name(stem: Box) -> None:
    await stem.engine.fork("stem", names=("first-name", "second"))
    await stem.engine.fork("second", names=("third",))
    for name in ("stem", "first-name", "second", "third"):
        assert (
            await Box(stem.engine, name).text("hostname; cat /proc/sys/kernel/hostname; grep -cw $(hostname) /etc/hosts")
            == f"{name}\n{name}\n1"
        )


async def test_the_machine_id_is_one_for_each_machine_for_life(stem: Box) -> None:
    engine = stem.engine
    one, two = await forked(stem, 2)
    ids = [await box.text("cat /etc/machine-id") for box in (stem, one, two)]
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)
    assert len(set(ids)) == 3
    await engine.snapshot(one.name, "point", test=False)
    for verb in (engine.hibernate, engine.pause):
        await verb(one.name)
        await engine.resume(one.name)
        assert await one.text("cat /etc/machine-id") == ids[1]
    await engine.restore(one.name, "point")
    assert await one.text("cat /etc/machine-id") == ids[1]
    await engine.stop(one.name)
    await engine.start(one.name)
    assert await one.text("cat /etc/machine-id") == ids[1]
    await engine.create_from(f"{one.name}@point", "other")
    assert await Box(engine, "other").text("cat /etc/machine-id") not in ids


# --- the generation file ---


def told(answer: str) -> dict[str, str]:
    words = answer.split()[1:]
    return dict(zip(words[::2], words[1::2], strict=True))


async def test_the_generation_changes_in_place(stem: Box) -> None:
    """Who has it mapped sees the new one, who watches it gets one event; what only stood still has its old one."""
    engine = stem.engine
    at_first = told(await check(stem, HOLD))
    inode = await stem.text("stat -c '%d %i' /run/ramet/generation")
    one, two = await forked(stem, 2)
    seen = {at_first["generation"]}
    for box in (one, two):
        now = told(await check(box, HOLD))
        assert now["first"] == at_first["first"]
        assert int(now["changes"]) == int(at_first["changes"]) + 1
        assert now["generation"] == await box.text("cat /run/ramet/generation")
        assert await box.text("stat -c '%d %i' /run/ramet/generation") == inode
        seen.add(now["generation"])
    assert len(seen) == 3
    assert told(await check(stem, HOLD))["generation"] == at_first["generation"]
    await engine.pause(one.name)
    await engine.resume(one.name)
    assert told(await check(one, HOLD))["generation"] in seen
    await engine.snapshot(one.name, "point", test=False)
    for verb in (engine.hibernate, lambda name: engine.restore(name, "point"), lambda name: engine.restore(name, "point")):
        if (await verb(one.name)).state is State.HIBERNATED:
            await engine.resume(one.name)
        now = told(await check(one, HOLD))
        assert now["generation"] not in seen
        seen.add(now["generation"])
    assert all(re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", each) for each in seen)


# --- hooks ---


HOOK = b'#!/bin/sh\necho "$(basename $0) $RAMET_NAME $RAMET_GENERATION $(hostname) $(cat /run/ramet/generation)" >> /tmp/hooks\n'


async def test_hooks_run_in_order_before_the_copy_is_ready(stem: Box) -> None:
    engine = stem.engine
    (parent,) = await forked(stem)
    for name, mode in (("20-second", 0o755), ("10-first", 0o755), ("15-not-executable", 0o644), ("9-last", 0o755)):
        await witness.put(parent, f"/etc/ramet/fork.d/{name}", HOOK, mode=mode)
    await engine.fork(parent.name, names=("one", "two"))
    for name in ("one", "two"):
        box = Box(engine, name)
        generation = await box.text("cat /run/ramet/generation")
        rest = f"{name} {generation} {name} {generation}"
        assert (await box.text("cat /tmp/hooks")).splitlines() == [f"10-first {rest}", f"20-second {rest}", f"9-last {rest}"]
    assert (await parent.sh("cat /tmp/hooks", check=False)).status != 0
    await engine.hibernate("one")
    await engine.resume("one")
    assert (await Box(engine, "one").text("wc -l < /tmp/hooks")) == "6"
    await engine.snapshot(parent.name, "warm")
    await engine.template(f"{parent.name}@warm", label="hooked", pool=1)
    async with asyncio.timeout(DEADLINE):
        while not (await engine.get_snapshot("hooked")).pooled:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await engine.create_from("hooked", "claimed")
    claimed = Box(engine, "claimed")
    generation = await claimed.text("cat /run/ramet/generation")
    assert (await claimed.text("tail -n 1 /tmp/hooks")) == f"9-last claimed {generation} claimed {generation}"


async def test_a_hook_that_fails_fails_the_copy(stem: Box) -> None:
    engine = stem.engine
    (parent,) = await forked(stem)
    await witness.put(parent, "/etc/ramet/fork.d/10-fine", HOOK)
    await witness.put(parent, "/etc/ramet/fork.d/20-fails", b"#!/bin/sh\necho no licence for a copy >&2\nexit 4\n")
    await witness.put(parent, "/etc/ramet/fork.d/30-never", HOOK)
    await parent.sh("sync")
    (outcome,) = await engine.fork(parent.name, names=("child",))
    assert outcome.machine is None
    assert outcome.error
    assert "20-fails" in outcome.error["message"]
    assert "no licence for a copy" in str(outcome.error)
    with pytest.raises(NotFoundError):
        await engine.get("child")
    await check(parent, HOLD)
    await engine.hibernate(parent.name)
    with pytest.raises(RametError, match="20-fails"):
        await engine.resume(parent.name)
    assert (
        await parent.get()
    ).state is State.HIBERNATED  # nothing is lost: what the hook wants can be repaired on the host, and the disk booted
    await engine.stop(parent.name)
    await engine.start(parent.name)
    await parent.sh("rm /etc/ramet/fork.d/20-fails")
    assert (await engine.fork(parent.name, names=("child",)))[0].machine


async def test_a_hook_that_hangs_is_named(stem: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = stem.engine
    (parent,) = await forked(stem)
    await witness.put(parent, "/etc/ramet/fork.d/20-hangs", b"#!/bin/sh\necho waiting for a lease >&2\nexec sleep 100000\n")
    monkeypatch.setattr("ramet.vm.machine.HOOKS_DEADLINE", 6.0)
    (outcome,) = await engine.fork(parent.name, names=("child",))
    assert outcome.error
    assert outcome.error["message"] == "/etc/ramet/fork.d/20-hangs did not end within 6 s: waiting for a lease"
    await check(parent, HOLD)


async def test_a_guest_that_does_not_take_its_identity_does_not_run(stem: Box) -> None:
    """A generation that cannot be written: the copy would not know that it is one."""
    (parent,) = await forked(stem)
    await parent.sh("mount -o remount,ro /run 2>/dev/null || true; mount | grep ' /run '")
    outcomes = await stem.engine.fork(parent.name, names=("child",))
    if outcomes[0].machine:  # the agent's descriptor was open before
        generation = await Box(stem.engine, "child").text("cat /run/ramet/generation")
        assert generation != await parent.text("cat /run/ramet/generation")
    else:
        with pytest.raises(NotFoundError):
            await stem.engine.get("child")
        with pytest.raises(MachineFailedError, match="identity"):
            raise MachineFailedError(outcomes[0].error["message"] if outcomes[0].error else "")
    await check(parent, HOLD)


# --- what is not made unique ---


async def test_a_program_s_own_generator_is_copied(stem: Box) -> None:
    """That is the limit: a shell's $RANDOM goes on with the same numbers in all copies."""
    (parent,) = await forked(stem)
    await parent.sh(
        "mkfifo /tmp/in /tmp/out; setsid sh -c 'echo $RANDOM; while read line < /tmp/in; do echo $RANDOM $RANDOM $RANDOM > /tmp/out; done' >/dev/null 2>&1 &"
    )
    draw = "echo > /tmp/in; cat /tmp/out"
    await parent.sh(draw)
    children = await forked(parent, 2)
    numbers = {await box.text(draw) for box in (parent, *children)}
    assert len(numbers) == 1
    assert len(numbers.pop().split()) == 3


def python() -> bytes:
    """Debian's Python as a tar, with what it needs to run in an image that has nothing; from Debian's packages, unpacked into the cache."""
    cached = paths.cache_dir() / "tools" / "guest-python.tar"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        packages = ["python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "zlib1g", "libexpat1"]
        with tempfile.TemporaryDirectory(dir=cached.parent) as work:
            download = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *packages]
            subprocess.run(download, cwd=work, check=True, timeout=600)
            for package in Path(work).glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", package, f"{work}/tree"], check=True, timeout=60)
            made = Path(work) / "tar"
            with tarfile.open(made, "w") as tar:
                for path in sorted(Path(work, "tree").rglob("*")):
                    if wanted(str(path.relative_to(f"{work}/tree"))) and (path.is_symlink() or path.is_file()):
                        tar.add(path, arcname=path.relative_to(f"{work}/tree"), recursive=False)
            made.rename(cached)
    return cached.read_bytes()


def wanted(path: str) -> bool:
    """Of those packages' files."""
    library = re.match(r"usr/lib/python3\.11/([^/]+\.py|(collections|encodings|importlib|json)/[^/]+\.py|lib-dynload/mmap\..*)$", path)
    return bool(library) or path == "usr/bin/python3.11" or re.search(r"(ld-linux-x86-64|lib(c|m|z|expat))\.so", path) is not None


def example() -> str:
    """The Python program of docs/forking.md."""
    (found,) = re.findall(r"```python\n(.*?)```", TEXT.read_text(), re.DOTALL)
    return str(found)


SERVER = """
import os, random, sys
sys.path.insert(0, "/srv")
import example

class Connections:
    closed = 0
    def close(self):
        self.closed += 1

example.connections = Connections()
plain = random.Random(4711)
example.token()
open("/tmp/up", "w").close()
while True:
    with open("/tmp/in") as file:
        file.read()
    with open("/tmp/out", "w") as file:
        print(plain.getrandbits(64), example.token(), example.connections.closed, file=file)
"""


async def test_the_python_example_of_the_documentation(stem: Box) -> None:
    (parent,) = await forked(stem)

    async def pieces() -> AsyncIterator[bytes]:
        yield python()

    await stem.engine.unpack(parent.name, "/", pieces())
    await parent.sh("ln -sf usr/lib /lib; ls /lib64 >/dev/null 2>&1 || ln -sf usr/lib64 /lib64; true")
    await witness.put(parent, "/srv/example.py", example().encode())
    await witness.put(parent, "/srv/server.py", SERVER.encode())
    await parent.sh(
        "mkfifo /tmp/in /tmp/out; setsid python3.11 /srv/server.py >/tmp/log 2>&1 & "
        "until [ -e /tmp/up ]; do kill -0 $! || { cat /tmp/log >&2; exit 1; }; usleep 50000; done",
        timeout=DEADLINE,
        env={"PATH": "/bin:/sbin:/usr/bin"},
    )
    talk = "echo > /tmp/in; cat /tmp/out"
    children = await forked(parent, 2)
    answers = [(await box.text(talk)).split() for box in (parent, *children)]
    plain, tokens, closed = zip(*answers, strict=True)
    assert len(set(plain)) == 1  # left alone, they are each other's doubles
    assert len(set(tokens)) == 3
    assert closed == ("0", "1", "1")  # each copy dropped its connections once, the parent kept its own
    assert (await children[0].text(talk)).split()[2] == "1"


def test_the_documentation_names_the_tests() -> None:
    """Every clause has one, and each that it names is there."""
    named = set(re.findall(r"`(test_\w+)`", TEXT.read_text()))
    here = {
        name
        for path in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"^async def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert named <= here, named - here
    own = set(re.findall(r"^async def (test_\w+)", Path(__file__).read_text(), re.MULTILINE))
    assert own <= named, own - named
