"""What is asked of guests, and when: by example, by properties, and on what real guests said."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ramet import reclaim
from ramet.db import Record
from ramet.entry import Entry
from ramet.errors import GuestError
from ramet.model import Reclaim, Spec, State
from ramet.reclaim import LEAST, STEERING, Sample, damon, decide
from ramet.reclaiming import AGAIN, INHERITED, Reclaimer, sample
from ramet.vm import balloon
from ramet.vm.machine import Vm

MIB = 1 << 20
TRACES = Path(__file__).with_name("traces")
ACTIVE = [Reclaim.GENTLE, Reclaim.EAGER]

sizes = st.integers(0, 1 << 42).map(float)
policies = st.sampled_from(ACTIVE)


@st.composite
def lives(draw: st.DrawFn, *, calm: bool = False) -> list[Sample]:
    """Samples of one guest. calm: nobody waits, nobody reads again."""
    found, at, stalled, refaulted = [], 0.0, 0.0, 0.0
    for _ in range(draw(st.integers(2, 8))):
        at += draw(st.floats(0.5, 600))
        if not calm:
            stalled += draw(st.floats(0, 10))
            refaulted += draw(sizes)
        found.append(Sample(at=at, reclaimable=draw(sizes), stalled=stalled, refaulted=refaulted))
    return found


def idle(policy: Reclaim, reclaimable: int, count: int = 2) -> list[Sample]:
    return [Sample(at=each * STEERING[policy].every, reclaimable=reclaimable) for each in range(count)]


# --- decide ---


@given(lives(), st.booleans())
def test_off_is_off(samples: list[Sample], pressed: bool) -> None:
    assert decide(samples, Reclaim.OFF, pressed=pressed) == 0


@given(lives(), policies)
def test_never_more_than_a_part_and_never_what_is_to_be_kept(samples: list[Sample], policy: Reclaim) -> None:
    how = STEERING[policy]
    wanted = decide(samples, policy)
    assert wanted == 0 or LEAST <= wanted <= how.most * (samples[-1].reclaimable - how.keep)


@given(lives(), policies)
def test_a_host_that_is_short_gets_all_but_what_is_to_be_kept(samples: list[Sample], policy: Reclaim) -> None:
    left = samples[-1].reclaimable - STEERING[policy].keep
    assert decide(samples, policy, pressed=True) == (int(left) if left >= LEAST else 0)
    assert decide(samples, policy) <= decide(samples, policy, pressed=True)


@given(lives(calm=True), policies, st.floats(0, 100))
def test_nothing_while_programs_wait(samples: list[Sample], policy: Reclaim, ago: float) -> None:
    """However much there is, from the stall until `calm` seconds later."""
    how = STEERING[policy]
    assume(ago <= how.calm)
    newest = samples[-1]
    began = dataclasses.replace(newest, at=newest.at + 1.0)
    stalled = dataclasses.replace(began, at=began.at + 1.0, stalled=how.stall * 1.01)
    later = dataclasses.replace(stalled, at=stalled.at + ago)
    assert decide([*samples, began, stalled], policy) == 0
    assert decide([*samples, began, stalled, later], policy) == 0


@given(lives(calm=True), policies)
def test_nothing_while_files_are_read_again(samples: list[Sample], policy: Reclaim) -> None:
    newest = samples[-1]
    again = dataclasses.replace(newest, at=newest.at + 1.0, refaulted=newest.refaulted + STEERING[policy].refault * 1.01)
    assert decide([*samples, again], policy) == 0


@given(lives(), policies, st.floats(0, 1), sizes)
def test_more_strain_never_means_more(samples: list[Sample], policy: Reclaim, stalled: float, refaulted: float) -> None:
    newest = samples[-1]
    worse = dataclasses.replace(newest, stalled=newest.stalled + stalled, refaulted=newest.refaulted + refaulted)
    assert decide([*samples[:-1], worse], policy) <= decide(samples, policy)


@given(lives(), policies, sizes)
def test_a_guest_that_holds_more_is_never_asked_for_less(samples: list[Sample], policy: Reclaim, more: float) -> None:
    newest = dataclasses.replace(samples[-1], reclaimable=samples[-1].reclaimable + more)
    assert decide([*samples[:-1], newest], policy) >= decide(samples, policy)


@given(lives(calm=True))
def test_eager_asks_for_more_than_gentle(samples: list[Sample]) -> None:
    assert decide(samples, Reclaim.EAGER) >= decide(samples, Reclaim.GENTLE)


@pytest.mark.parametrize("policy", ACTIVE)
def test_after_the_calm_it_goes_on(policy: Reclaim) -> None:
    how = STEERING[policy]
    strained = [Sample(at=0, reclaimable=900 * MIB), Sample(at=1, reclaimable=900 * MIB, stalled=1)]
    after = [Sample(at=1 + how.calm + each * how.every, reclaimable=900 * MIB, stalled=1) for each in (0.5, 1.5)]
    assert decide(strained + after, policy) > 0


@pytest.mark.parametrize("policy", ACTIVE)
@pytest.mark.parametrize(
    "second",
    [
        Sample(at=0, reclaimable=900 * MIB, stalled=5, refaulted=5),
        Sample(at=9, reclaimable=900 * MIB, stalled=4, refaulted=5),
        Sample(at=9, reclaimable=900 * MIB, stalled=5, refaulted=4),
    ],
    ids=["no time passed", "it booted", "it booted, and read again less"],
)
def test_samples_that_are_not_of_one_life(policy: Reclaim, second: Sample) -> None:
    assert decide([Sample(at=0, reclaimable=900 * MIB, stalled=5, refaulted=5), second], policy) == 0


def test_one_sample_or_none_is_not_enough() -> None:
    assert decide([], Reclaim.EAGER) == decide([], Reclaim.EAGER, pressed=True) == 0
    assert decide(idle(Reclaim.EAGER, 900 * MIB, 1), Reclaim.EAGER) == 0


@pytest.mark.parametrize(("policy", "seconds", "left"), [(Reclaim.EAGER, 60, 0.2), (Reclaim.GENTLE, 600, 0.2)])
def test_how_long_a_cold_file_stays(policy: Reclaim, seconds: float, left: float) -> None:
    """A guest that gives all that it is asked for, and in which nothing else happens."""
    how = STEERING[policy]
    held = 300.0 * MIB + how.keep
    samples = [Sample(at=0, reclaimable=held)]
    while samples[-1].at < seconds:
        samples.append(Sample(at=samples[-1].at + how.every, reclaimable=held))
        held -= decide(samples, policy)
    assert held - how.keep <= left * 300 * MIB


# --- on what real guests said ---


def traces() -> list[Path]:
    return sorted(TRACES.glob("*.json"))


def replayed(path: Path) -> tuple[Reclaim, list[Sample], list[int]]:
    """The policy under which it was recorded, what was seen, and what is decided at each sample."""
    data = json.loads(path.read_text())
    policy = Reclaim(data["policy"])
    samples = [sample(each, each["at"]) for each in data["samples"]]
    return policy, samples, [decide(samples[: count + 1], policy) for count in range(len(samples))]


def test_there_are_traces() -> None:
    assert {path.stem for path in traces()} == {"cold", "thrashing"}


def test_a_file_that_was_read_once() -> None:
    """Recorded while `decide` steered: within a minute four fifths are gone, though the kernel took more than it was asked for, and then no more is wanted."""
    _, samples, wanted = replayed(TRACES / "cold.json")
    most = max(each.reclaimable for each in samples)
    soon = [each for each in samples if each.at <= samples[0].at + 60]
    assert soon[-1].reclaimable < 0.2 * most
    assert sum(wanted) > most / 2
    assert wanted[1] == max(wanted)
    assert wanted[-1] == 0  # what is left is to be kept


def test_programs_that_need_their_files() -> None:
    """Recorded while more was taken from a guest than it could do without: `decide` would have let go of it."""
    policy, samples, wanted = replayed(TRACES / "thrashing.json")
    how = STEERING[policy]
    strained = [
        number
        for number, (a, b) in enumerate(itertools.pairwise(samples), 1)
        if (b.refaulted - a.refaulted) / (b.at - a.at) > how.refault or (b.stalled - a.stalled) / (b.at - a.at) > how.stall
    ]
    assert len(strained) > len(samples) // 3
    assert all(wanted[number] == 0 for number in strained)
    assert sum(wanted) < 0.5 * sum(
        decide([dataclasses.replace(each, stalled=0, refaulted=0) for each in samples[: n + 1]], policy) for n in range(len(samples))
    )


def test_an_agent_that_does_not_tell() -> None:
    assert sample({"uptime_ms": 5.0}, 7.0) == Sample(at=7.0, reclaimable=0.0)


# --- damon ---


@pytest.mark.parametrize("policy", ACTIVE)
def test_what_damon_takes(policy: Reclaim) -> None:
    """The rules of mm/damon/core.c (Linux 6.1): what breaks them is refused, or does nothing."""
    found = damon(policy)
    assert found["enabled"] == 1
    assert 3 <= found["min_nr_regions"] <= found["max_nr_regions"]
    assert found["aggr_interval"] >= found["sample_interval"] >= 100_000  # each is a time that the guest wakes up
    assert found["min_age"] >= 3 * found["aggr_interval"]
    assert found["wmarks_high"] >= found["wmarks_mid"] >= found["wmarks_low"]
    assert len(found) <= 16  # arguments of a builtin
    assert all(type(value) is int and value >= 0 for value in found.values())


def test_damon_is_switched_off_by_a_word() -> None:
    assert damon(Reclaim.OFF) == {"enabled": 0}
    assert damon(Reclaim.EAGER)["min_age"] < damon(Reclaim.GENTLE)["min_age"]
    assert reclaim.horizon(Reclaim.OFF) == 0


# --- what guests are told ---


class ToldGuest:
    """A guest that notes what it is told. damon: whether its kernel has it. failing: it refuses all."""

    def __init__(self, *, damon: bool) -> None:
        self.damon = damon
        self.failing = False
        self.available = 0.0
        self.told: list[object] = []

    async def tune(self, policy: Mapping[str, int], deadline: float) -> bool:
        if self.failing:
            raise GuestError("no")
        self.told.append("off" if policy == {"enabled": 0} else policy["min_age"])
        return self.damon

    async def metrics(self) -> dict[str, float]:
        self.told.append("metrics")
        return {"mem_reclaimable": 900.0 * MIB, "mem_available": self.available}

    async def reclaim(self, size: int, deadline: float) -> int:
        self.told.append("reclaim")
        return size


class Machine:
    """A machine that stands in an Entry, a clock, and a Reclaimer that ticks as the caretaker has it."""

    def __init__(self, policy: Reclaim, *, damon: bool) -> None:
        self.now = 1000.0
        self.guest = ToldGuest(damon=damon)
        self.reclaimer = Reclaimer(lambda: self.now)
        self.entry = Entry(record=Record(id="a", name="a", state=State.RUNNING, spec=Spec(name="a", reclaim=policy), created_at=0.0))
        self.restored()

    def restored(self, saved: Reclaim | None = None) -> None:
        """Another QEMU."""
        self.entry.vm = cast(Vm, Standing(self.guest, saved))

    def wants(self, policy: Reclaim) -> None:
        self.entry.record = dataclasses.replace(self.entry.record, spec=dataclasses.replace(self.entry.record.spec, reclaim=policy))

    async def ticks(self, seconds: float, *, eager: bool = False) -> list[object]:
        self.guest.told.clear()
        until = self.now + seconds
        while self.now < until:
            await self.reclaimer.tick(self.entry, eager=eager)
            self.now += 5.0
        return list(self.guest.told)


class Standing:
    """A QEMU. reclaim: the policy that its memory was saved with; granted: what its balloon leaves the guest."""

    def __init__(self, guest: ToldGuest, reclaim: Reclaim | None) -> None:
        self.guest = guest
        self.reclaim = reclaim
        self.granted = 0


GENTLY, EAGERLY = (damon(policy)["min_age"] for policy in ACTIVE)


async def test_a_guest_with_damon_is_told_once() -> None:
    machine = Machine(Reclaim.GENTLE, damon=True)
    assert await machine.ticks(600) == [GENTLY]
    machine.wants(Reclaim.EAGER)
    assert await machine.ticks(600) == [EAGERLY]
    machine.wants(Reclaim.OFF)
    assert await machine.ticks(600) == ["off"]


async def test_another_qemu_is_told_again() -> None:
    machine = Machine(Reclaim.EAGER, damon=True)
    await machine.ticks(60)
    machine.restored()
    assert await machine.ticks(60) == [EAGERLY]


async def test_a_guest_without_damon_is_asked_as_often_as_its_policy_says() -> None:
    machine = Machine(Reclaim.GENTLE, damon=False)
    told = await machine.ticks(600)
    assert (told[0], told.count("metrics"), told.count("reclaim")) == (GENTLY, 10, 9)
    machine.wants(Reclaim.EAGER)
    told = await machine.ticks(60)
    assert (told[0], told.count("reclaim")) == (EAGERLY, 11 if "metrics" in told[:2] else 10)
    machine.wants(Reclaim.OFF)
    assert await machine.ticks(600) == ["off"]


async def test_a_machine_from_a_snapshot_has_its_policy_already() -> None:
    machine = Machine(Reclaim.GENTLE, damon=True)
    machine.entry.record = dataclasses.replace(machine.entry.record, memory_layer="a" * 16)
    assert await machine.ticks(INHERITED) == []
    assert await machine.ticks(60) == [GENTLY]
    machine.restored()
    assert await machine.ticks(20) == []
    machine.wants(Reclaim.EAGER)
    assert await machine.ticks(5) == [EAGERLY]
    machine.restored()
    assert await machine.ticks(5, eager=True) == [EAGERLY, "metrics", "reclaim"]


async def test_one_that_was_given_another_policy_before_anybody_looked_is_told_at_once() -> None:
    machine = Machine(Reclaim.EAGER, damon=True)
    machine.entry.record = dataclasses.replace(machine.entry.record, memory_layer="a" * 16)
    machine.restored(Reclaim.OFF)
    assert await machine.ticks(5) == [EAGERLY]


async def test_a_guest_is_held_to_its_limit_again_when_it_needs_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(Reclaim.OFF, damon=True)
    qemu = cast(Standing, machine.entry.vm)
    asked: list[int] = []

    async def resize(vm: Standing, size: int) -> int:
        asked.append(size)
        vm.granted = size
        return size

    monkeypatch.setattr(balloon, "resize", resize)
    machine.entry.record = dataclasses.replace(machine.entry.record, memory_limit=100 * MIB)
    assert await machine.ticks(AGAIN) == ["off"]  # it has what it may have
    qemu.granted, machine.guest.available = 300 * MIB, 210.0 * MIB
    assert await machine.ticks(3 * AGAIN) == ["metrics"] * 3  # it would be left with too little
    machine.guest.available = 220.0 * MIB
    assert await machine.ticks(3 * AGAIN) == ["metrics"]
    assert asked == [100 * MIB]


@pytest.mark.parametrize("kernel", [True, False])
async def test_a_host_that_is_short_asks_at_once(kernel: bool) -> None:
    machine = Machine(Reclaim.GENTLE, damon=kernel)
    await machine.ticks(30)
    assert await machine.ticks(5, eager=True) == ["metrics", "reclaim"]
    machine.wants(Reclaim.OFF)
    assert await machine.ticks(60, eager=True) == ["off"]


async def test_a_guest_that_refuses_is_left_alone_for_a_while() -> None:
    machine = Machine(Reclaim.GENTLE, damon=True)
    machine.guest.failing = True
    with pytest.raises(GuestError):
        await machine.reclaimer.tick(machine.entry)
    machine.guest.failing = False
    assert await machine.ticks(AGAIN - 5) == []
    assert await machine.ticks(60) == [GENTLY]


async def test_a_machine_without_a_qemu() -> None:
    machine = Machine(Reclaim.EAGER, damon=True)
    machine.entry.vm = None
    assert await machine.ticks(60) == []
