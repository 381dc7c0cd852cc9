"""What machines are said to cost is what the host really gives for them: a tree's sum, page by page and file by file; and no guest can hold the answer up."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import signal
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from ramet import slimming
from ramet.engine import Engine
from ramet.errors import OutcomeUnknownError
from ramet.model import NodeKind, Snapshot, State, Usage
from ramet.paths import StateDir
from ramet.vm import memory
from ramet.vm.memory import PAGE
from tests.fixtures import Artifacts, Box, States
from tests.machine.aftermath import busy, goes_on, settled, swept
from tests.machine.doomed import parked
from tests.machine.events import listening
from tests.machine.witness import forked

MIB = 1 << 20
DEADLINE = 120.0
TRIES = 10


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def family(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory, scratch: object) -> AsyncIterator[tuple[Engine, StateDir]]:
    """A machine, three forks of it and one of those, of which some wrote memory and files; a template with one that waits; one that is hibernated."""
    state = States(artifacts, scratch, tmp_path_factory.mktemp("family")).new()  # type: ignore[arg-type]
    async with swept(state) as engine:
        await engine.create(artifacts.spec("stem"))
        stem = Box(engine, "stem")
        await stem.sh("dd if=/dev/urandom of=/dev/shm/all bs=1M count=24 && dd if=/dev/urandom of=/srv/all bs=1M count=8; sync")
        first, second, _ = await forked(stem, 3)
        await first.sh("dd if=/dev/urandom of=/dev/shm/own bs=1M count=40; dd if=/dev/urandom of=/srv/own bs=1M count=12; sync")
        await second.sh("dd if=/dev/urandom of=/srv/own bs=1M count=20; sync; rm /srv/all; sync")
        (grandchild,) = await forked(first)
        await grandchild.sh("dd if=/dev/urandom of=/dev/shm/more bs=1M count=20")
        await engine.snapshot(grandchild.name, "kept", test=False)
        await engine.template(f"{grandchild.name}@kept", label="tpl", pool=1)
        await parked(engine, 1)
        await engine.fork(second.name, names=("sleeper",))
        await engine.hibernate("sleeper")
        await settled(engine)
        yield engine, state


def mappings(pid: int) -> Iterator[tuple[int, int, tuple[str, str], int]]:
    """Of a process: begin, end, which file (device, inode), offset."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, _, offset, device, inode, *_ = line.split()
        begin, end = (int(each, 16) for each in span.split("-"))
        if begin < 1 << 47:  # the kernel's own page, of every process
            yield begin, end, (device, inode), int(offset, 16)


@dataclass
class Pages:
    """What processes have in memory, page by page; no sum of the kernel's is used. written: pages of each; mapped: of each page of a file, who maps it."""

    written: Counter[int]
    mapped: defaultdict[tuple[str, str, int], set[int]]

    @classmethod
    def of(cls, pids: list[int]) -> Pages:
        """Of these, and who else on the host maps the same files: other machines run the same QEMU."""
        found = cls(Counter(), defaultdict(set))
        files = {file for pid in pids for _, _, file, _ in mappings(pid) if file[1] != "0"}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended, or is somebody's whom we may not look at
                found._look(int(path.name), files)
        for pid in pids:
            for begin, end, _, _ in mappings(pid):
                found.written[pid] += sum(count for _, count in memory.private(pid, begin, end - begin))
        return found

    def _look(self, pid: int, files: set[tuple[str, str]]) -> None:
        for begin, end, file, offset in mappings(pid):
            if file in files:
                with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
                    words = array.array("Q", os.pread(pagemap.fileno(), 8 * ((end - begin) // PAGE), 8 * (begin // PAGE)))
                for page, word in enumerate(words, offset // PAGE):
                    if word >> 63 and word >> 61 & 1:  # present, and a file's (Documentation/admin-guide/mm/pagemap.rst)
                        self.mapped[*file, page].add(pid)

    def together(self) -> float:
        """Bytes: a page once, however many of ours map it, and in part where others do."""
        ours = self.written.keys()
        return PAGE * (self.written.total() + sum(len(pids & ours) / len(pids) for pids in self.mapped.values()))

    def alone(self, pid: int) -> int:
        """Bytes that would go with it."""
        return PAGE * (self.written[pid] + sum(pids == {pid} for pids in self.mapped.values()))


def blocks(*places: Path) -> int:
    """As `du` counts."""
    found = {}
    for place in places:
        for root, _, names in os.walk(place):
            for path in [Path(root), *(Path(root, name) for name in names)]:
                stat = path.lstat()
                found[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
    return sum(found.values())


async def costs(engine: Engine) -> list[Usage]:
    return [node.usage for node in await engine.tree() if node.usage]


async def astray(engine: Engine, pids: list[int]) -> list[str]:
    """Which sums are not what the pages are. Others' QEMUs, which ours share their program with, come and go meanwhile: pages are read before and after."""
    before = Pages.of(pids)
    told = await costs(engine)
    by_pid = {machine.pid: machine.usage for machine in await engine.list() if machine.pid}
    after = Pages.of(pids)
    sums = {"the sum": (sum(each.memory for each in told), before.together(), after.together())}
    for pid, usage in by_pid.items():
        assert usage
        assert usage.memory == usage.private + usage.shared
        assert 0 < usage.overhead < usage.memory
        sums[f"{pid}'s own"] = (usage.private, before.alone(pid), after.alone(pid))
    return [f"{name}: {mine} of {pages}" for name, (mine, *pages) in sums.items() if not 0.95 * min(pages) < mine < 1.05 * max(pages)]


async def test_the_sum_of_a_tree_is_the_memory_that_the_host_gives(family: tuple[Engine, StateDir]) -> None:
    engine, _ = family
    pids = [entry.vm.pid for entry in engine._ops.entries.values() if entry.vm]
    assert len(pids) == 6  # the sleeper has none, the parked one has
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(TRIES):
            if not (wrong := await astray(engine, pids)):
                break
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert not wrong


async def test_the_sum_of_a_tree_is_what_the_host_has_on_its_disk(family: tuple[Engine, StateDir]) -> None:
    engine, state = family
    image = state.image((await engine.get("stem")).image_digest).root
    real = blocks(state.store.layers, state.store.blobs, state.snapshots, state.machines, image)
    assert sum(each.disk_unique + each.disk_shared for each in await costs(engine)) == pytest.approx(real, rel=0.02)


async def test_what_is_unique_is_what_goes_with_a_machine(family: tuple[Engine, StateDir]) -> None:
    engine, state = family
    (child,) = await forked(Box(engine, "stem"))
    await child.sh("dd if=/dev/urandom of=/srv/mine bs=1M count=8; sync")
    await settled(engine)
    usage = (await child.get()).usage
    assert usage
    assert usage.disk_unique >= usage.disk >= 8 * MIB
    before = blocks(state.root)
    await engine.delete(child.name)
    await settled(engine)
    assert before - blocks(state.root) == pytest.approx(usage.disk_unique, rel=0.05)


async def test_one_that_is_hibernated_costs_its_disk(family: tuple[Engine, StateDir]) -> None:
    engine, _ = family
    usage = (await engine.get("sleeper")).usage
    assert usage
    assert (usage.memory, usage.private, usage.returned, usage.reclaimable) == (0, 0, 0, None)
    kept = await engine.get_snapshot((await engine.get("sleeper")).snapshot)
    assert usage.disk_unique >= kept.stored > 0


async def test_a_template_costs_what_waits_for_it(family: tuple[Engine, StateDir]) -> None:
    engine, _ = family
    usage = {node.name: node.usage for node in await engine.tree() if node.kind is NodeKind.SNAPSHOT}["tpl:latest"]
    assert usage
    assert usage.memory > 8 * MIB
    assert usage.disk_unique + usage.disk_shared > 0


async def test_memory_moves_between_returned_and_private(family: tuple[Engine, StateDir]) -> None:
    engine, _ = family
    (child,) = await forked(Box(engine, "stem"))
    before = (await child.get()).usage
    await child.sh("dd if=/dev/urandom of=/dev/shm/big bs=1M count=40")
    after = (await child.get()).usage
    assert before
    assert after
    assert after.private >= before.private + 32 * MIB
    assert before.returned - after.returned >= 32 * MIB
    await engine.delete(child.name)


async def test_a_guest_tells_what_it_could_give_back(family: tuple[Engine, StateDir]) -> None:
    engine, _ = family
    (child,) = await forked(Box(engine, "stem"))

    async def reclaimable() -> int:
        async with asyncio.timeout(DEADLINE):
            while True:  # on a busy host a guest may miss its deadline
                usage = (await child.get()).usage
                if usage and usage.reclaimable is not None:
                    return usage.reclaimable

    await child.sh("echo 3 > /proc/sys/vm/drop_caches")
    empty = await reclaimable()
    await child.sh("cat /srv/all > /dev/null")
    assert await reclaimable() >= empty + 6 * MIB
    found = await engine.metrics(child.name)
    assert found["mem_total"] > 0
    assert found["host_private"] > MIB
    assert found["host_disk_shared"] > 0
    await engine.delete(child.name)


async def test_no_answer_waits_for_a_guest_that_hangs(family: tuple[Engine, StateDir]) -> None:
    engine, _ = family
    (child,) = await forked(Box(engine, "stem"))
    pid = (await child.get()).pid
    assert pid
    os.kill(pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(DEADLINE):  # its agent is given up after 60 s, were it asked
            listed = {machine.name: machine for machine in await engine.list()}
            drawn = {node.name: node for node in await engine.tree()}
            shown = await engine.get(child.name)
    finally:
        os.kill(pid, signal.SIGCONT)
    for usage in (listed[child.name].usage, drawn[child.name].usage, shown.usage):
        assert usage
        assert usage.memory > MIB
        assert usage.reclaimable is None
    await engine.delete(child.name)


# slim hibernation

CACHED = "dd if=/dev/urandom of=/srv/cached bs=1M count=64 && sync && cat /srv/cached > /dev/null"
STEPS = ["dropping caches", "giving memory back"]


async def asleep(box: Box, *, slim: bool = True) -> tuple[Snapshot, list[str]]:
    """Fill its caches and hibernate it; what was kept, and what was done for it."""
    await box.sh(CACHED)
    async with listening(box.engine) as ear:
        machine = await box.engine.hibernate(box.name, slim=slim)
    assert machine.state is State.HIBERNATED
    await settled(box.engine)
    return await box.engine.get_snapshot(machine.snapshot), [step for step in ear.steps(box.name) if step in STEPS]


async def test_caches_are_not_saved(states: States, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    for patience, seconds in (("_QUIET", 10.0), ("_PAUSE", 5.0), ("_GIVING", 60.0)):  # a busy host gives a guest little time
        monkeypatch.setattr(slimming, patience, seconds)
    async with swept(states.new()) as engine:
        for name in ("slim", "whole"):
            await engine.create(artifacts.spec(name))
            await busy(Box(engine, name))
        slim, steps = await asleep(Box(engine, "slim"))
        whole, none = await asleep(Box(engine, "whole"), slim=False)
        assert (steps, none, whole.slimmed) == (STEPS, [], 0)
        assert slim.slimmed > 48 * MIB
        assert slim.saved < whole.saved - 48 * MIB
        layers = [await engine.get_layer(each.memory_layer) for each in (slim, whole)]
        assert layers[0].stored < layers[1].stored - 48 * MIB
        for name in ("slim", "whole"):
            await engine.resume(name)
            assert await goes_on(Box(engine, name)) > 0
            assert await Box(engine, name).text("wc -c < /srv/cached") == str(64 * MIB)
        again, steps = await asleep(Box(engine, "slim"))  # as what stands on a layer now
        assert (steps, again.slimmed > 48 * MIB) == (STEPS, True)


async def test_a_paused_machine_is_saved_as_it_is(states: States, artifacts: Artifacts) -> None:
    async with swept(states.new()) as engine:
        await engine.create(artifacts.spec("box"))
        await engine.pause("box")
        async with listening(engine) as ear:
            machine = await engine.hibernate("box")
        assert not set(STEPS) & set(ear.steps("box"))
        assert (await engine.get_snapshot(machine.snapshot)).slimmed == 0


async def test_a_guest_that_does_not_slim_in_time_is_hibernated_all_the_same(
    states: States, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(slimming, "_DEADLINE", 0.0)
    async with swept(states.new()) as engine:
        await engine.create(artifacts.spec("box"))
        await busy(Box(engine, "box"))
        with pytest.raises(OutcomeUnknownError):
            await engine._guest("box").slim(0.0)
        machine = await engine.hibernate("box")
        assert (machine.state, (await engine.get_snapshot(machine.snapshot)).slimmed) == (State.HIBERNATED, 0)
        assert "box is not slimmed before its hibernation: the guest did not finish" in caplog.text
        await engine.resume("box")
        assert await goes_on(Box(engine, "box")) > 0
