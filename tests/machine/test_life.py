"""A machine's life: created, used, stopped, started, deleted, and what each of these refuses."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json

import pytest

from ramet import process
from ramet.engine import Engine
from ramet.errors import BusyError, ExistsError, ImageError, MachineFailedError, NotFoundError, RametError, SpecError, StateError
from ramet.model import Command, InitMode, Lifecycle, Port, State
from ramet.paths import StateDir
from tests.fixtures import Artifacts, Box
from tests.machine.events import listening

UP = Command(argv=("true",))


async def test_a_whole_life_in_its_states(engine: Engine, artifacts: Artifacts) -> None:
    async with listening(engine) as ear:
        made = await engine.create(artifacts.spec("whole"))
        assert (made.state, made.name, made.reason) == (State.RUNNING, "whole", "")
        assert made.pid
        assert made.boot_time
        assert made.accelerator
        assert made.usage
        assert made.usage.memory > 20 << 20
        await Box(engine, "whole").sh("echo kept > /srv/file; hostname | grep -x whole")
        stopped = await engine.stop("whole")
        assert (stopped.state, stopped.reason, stopped.pid) == (State.STOPPED, "", None)
        assert stopped.usage
        assert stopped.usage.memory == 0
        with pytest.raises(StateError, match="cannot use whole: it is stopped, not running"):
            await engine.run("whole", UP)
        with pytest.raises(StateError, match="cannot stop whole: it is stopped"):
            await engine.stop("whole")
        again = await engine.start("whole")
        assert (again.state, again.id) == (State.RUNNING, made.id)
        assert await Box(engine, "whole").text("cat /srv/file") == "kept"
        with pytest.raises(StateError, match="cannot start whole: it is running"):
            await engine.start("whole")
        await engine.delete("whole")
    assert ear.states("whole") == ["creating", "running", "stopping", "stopped", "starting", "running", "deleting", "removed"]
    assert ear.steps("whole") == [
        *("looking up the image", "making the disk", "preparing the kernel", "booting"),
        "powering off",
    ]
    with pytest.raises(NotFoundError, match="there is no machine 'whole'"):
        await engine.get("whole")


async def test_lookups_by_name_and_by_id(box: Box) -> None:
    machine = await box.get()
    assert (await box.engine.get(machine.id)).name == box.name
    assert box.name in [each.name for each in await box.engine.list()]
    for missing in ("nobody", "", box.name + "x"):
        with pytest.raises(NotFoundError):
            await box.engine.get(missing)


async def test_a_second_create_of_the_same_name(box: Box, artifacts: Artifacts) -> None:
    before = await box.get()
    with pytest.raises(ExistsError, match=f"there is a machine {box.name} already"):
        await box.engine.create(artifacts.spec(box.name))
    after = await box.get()
    assert (after.id, after.state) == (before.id, State.RUNNING)
    await box.sh("true")


async def test_two_creates_of_one_name_at_once(engine: Engine, artifacts: Artifacts) -> None:
    results = await asyncio.gather(*(engine.create(artifacts.spec("twice")) for _ in range(2)), return_exceptions=True)
    assert sorted(type(each).__name__ for each in results) == ["ExistsError", "Machine"]
    assert [each.state for each in await engine.list() if each.name == "twice"] == [State.RUNNING]
    await engine.delete("twice")


async def test_one_operation_at_a_time(engine: Engine, artifacts: Artifacts) -> None:
    async with listening(engine) as ear:
        creating = asyncio.ensure_future(engine.create(artifacts.spec("busy")))
        await ear.until(lambda event: bool(event.activity and event.activity.step == "booting"))
        with pytest.raises(BusyError, match="busy is busy: create"):
            await engine.stop("busy")
        with pytest.raises(BusyError):
            await engine.start("busy")
        await creating
        await engine.delete("busy")


async def test_environment_user_and_directory_of_spec_and_image(engine: Engine, artifacts: Artifacts) -> None:
    spec = artifacts.spec("shaped", env={"A": "spec", "IMAGE": "mine"}, user="app", workdir="/srv/deep/er", ports=(Port(guest=8080),))
    spec = dataclasses.replace(spec, lifecycle=Lifecycle(create="id -un > /tmp/create; pwd >> /tmp/create", start="echo $A >> /tmp/start"))
    made = await engine.create(spec)
    box = Box(engine, "shaped")
    assert await box.text("cat /tmp/create") == "app\n/srv/deep/er"
    assert await box.text("id -un; pwd; echo $A $IMAGE $PATH $HOME") == "app\n/srv/deep/er\nspec mine /bin:/sbin /home/app"
    assert await box.text("id -un; pwd; echo $A", user="root", cwd="/", env={"A": "own"}) == "root\n/\nown"
    assert [(port.guest, port.host > 0) for port in made.ports] == [(8080, True)]
    await engine.stop("shaped")
    await engine.start("shaped")
    assert await box.text("cat /tmp/start; wc -l < /tmp/create") == "spec\nspec\n2"
    await engine.delete("shaped")


async def test_a_create_command_that_fails_leaves_a_machine_to_look_at(engine: Engine, artifacts: Artifacts) -> None:
    spec = artifacts.spec("hooked", lifecycle=Lifecycle(create="echo the reason >&2; exit 3"))
    with pytest.raises(MachineFailedError, match=r"lifecycle\.create ended with status 3: the reason"):
        await engine.create(spec)
    machine = await engine.get("hooked")
    assert machine.state is State.FAILED
    assert "lifecycle.create ended with status 3" in machine.reason
    assert machine.pid is None
    await engine.delete("hooked")


async def test_what_cannot_be_created_leaves_nothing(engine: Engine, artifacts: Artifacts, state: StateDir) -> None:
    with pytest.raises(ImageError):
        await engine.create(artifacts.spec("absent", image="oci:/nowhere:latest"))
    with pytest.raises(SpecError, match="a guest port is named twice"):
        await engine.create(artifacts.spec("absent", ports=(Port(guest=1), Port(guest=1, host=2))))
    assert "absent" not in [each.name for each in await engine.list()]
    known = {each.id for each in await engine.list()}
    assert {path.name for path in state.machines.iterdir()} <= known


async def test_two_cpus_and_their_memory(engine: Engine, artifacts: Artifacts) -> None:
    await engine.create(artifacts.spec("big", cpus=2, memory=512 << 20, disk=1 << 30))
    box = Box(engine, "big")
    assert await box.text("nproc") == "2"
    metrics = await engine.metrics("big")
    assert 400 << 20 < metrics["mem_total"] < 512 << 20
    assert 850 << 20 < metrics["disk_total"] <= 1 << 30
    await engine.delete("big")


async def test_the_image_s_own_init(engine: Engine, artifacts: Artifacts) -> None:
    await engine.create(artifacts.spec("own-init", init=InitMode.IMAGE))
    box = Box(engine, "own-init")
    assert await box.text("cat /proc/1/comm; readlink /proc/1/exe") == "init\n/bin/busybox"
    assert await box.text("ps | grep -c '[s]leep 100000'") == "1"  # as its inittab says
    stopped = await engine.stop("own-init")
    assert (stopped.state, stopped.reason) == (State.STOPPED, "")
    await engine.start("own-init")
    await engine.delete("own-init")


async def test_a_guest_that_powers_itself_off_is_stopped(engine: Engine, artifacts: Artifacts) -> None:
    await engine.create(artifacts.spec("selfish", init=InitMode.IMAGE))
    async with listening(engine) as ear:
        stopped = asyncio.create_task(ear.until_state("selfish", State.STOPPED))
        while not stopped.done():  # a signal that comes before init has its handlers is lost
            with contextlib.suppress(RametError):
                await engine.run("selfish", Command(argv=("kill", "-USR2", "1")))  # busybox: power off
            await asyncio.wait({stopped}, timeout=10)
        event = await stopped
        assert event.reason == "the guest powered off"
    assert (await engine.get("selfish")).state is State.STOPPED
    await engine.delete("selfish")


async def test_force_is_a_power_cut(engine: Engine, artifacts: Artifacts) -> None:
    await engine.create(artifacts.spec("forced"))
    async with asyncio.timeout(20):
        stopped = await engine.stop("forced", force=True)
    assert stopped.state is State.STOPPED
    assert (await engine.start("forced")).state is State.RUNNING
    await engine.delete("forced")


async def test_logs(box: Box) -> None:
    console = await box.engine.logs(box.name)
    assert b"ramet-agent: ready" in console
    assert (await box.engine.logs(box.name, lines=1)).count(b"\n") <= 1
    assert await box.engine.logs(box.name, lines=0) == b""
    await box.engine.logs(box.name, source="qemu")
    with pytest.raises(SpecError, match="there is no log 'kernel': write console or qemu"):
        await box.engine.logs(box.name, source="kernel")


async def test_info(engine: Engine, box: Box) -> None:
    info = await engine.info()
    assert info.running >= 1
    assert info.machines >= info.running
    assert info.cpus
    assert info.memory > info.memory_available > 0
    assert info.qemu[0].isdigit()
    assert any("user-mode" in limit for limit in info.limits)
    assert info.accelerator.value in ("kvm", "tcg")
    assert info.accelerator_reason


async def test_the_disk_is_an_overlay_that_can_be_moved(box: Box, state: StateDir) -> None:
    disk = state.machine((await box.get()).id).overlay(0)
    shown = await process.output(["qemu-img", "info", "-U", "--output=json", str(disk)], deadline=60)
    about = json.loads(shown)
    assert about["format"] == "qcow2"
    assert "backing-filename" not in about, "no path is written down that could be wrong after a move"
    assert about["actual-size"] < 40 << 20
    assert disk.parent.stat().st_mode & 0o077 == 0


async def test_what_the_guest_frees_leaves_the_host_s_file(box: Box, state: StateDir) -> None:
    disk = state.machine((await box.get()).id).overlay(0)
    await box.sh("dd if=/dev/urandom of=/srv/big bs=1M count=30 2>/dev/null; sync")
    full = disk.stat().st_blocks * 512
    await box.sh("rm /srv/big; sync")
    assert full > 30 << 20
    async with asyncio.timeout(60):
        while disk.stat().st_blocks * 512 > full - (25 << 20):
            await box.sh("sync")
            await asyncio.sleep(0.2)


async def test_metrics(box: Box) -> None:
    found = await box.engine.metrics(box.name)
    for name in ("uptime_ms", "load1", "cpu_user_ms", "cpu_system_ms", "cpu_idle_ms", "mem_total", "mem_free", "mem_available", "mem_cached",
                 "mem_anon", "disk_total", "disk_free", "processes"):  # fmt: skip
        assert found[name] >= 0, name
    assert found["mem_total"] > found["mem_free"]
