"""The ladder of a host that runs low: traces, and what must hold on all of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet import caretaker, host
from ramet.errors import DaemonError
from ramet.model import State
from ramet.pressure import Action, HostSample, Kind, Limits, MachineSample, Trouble, decide, has_enough, is_idle, is_low

LIMITS = Limits()
TOTAL = 1000
LOW, BETWEEN, ENOUGH = 50, 120, 300
EVERY = 5.0


def machine(
    name: str, *, used: float = -1000.0, busy: bool = False, cpu: float = 0.0, state: State = State.RUNNING, parked: bool = False
) -> MachineSample:
    return MachineSample(id=name, state=state, last_used=used, busy=busy, cpu=cpu, parked=parked)


@dataclass
class Play:
    """A host with machines on which what is decided is done, looked at every five seconds."""

    machines: dict[str, MachineSample]
    at: float = 0.0
    trouble: Trouble | None = None
    done: list[tuple[float, str, str]] = field(default_factory=list)

    def look(self, available: int, stalled: float = 0.0, times: int = 1) -> list[tuple[Kind, str]]:
        """What was done meanwhile."""
        did: list[tuple[Kind, str]] = []
        for _ in range(times):
            self.at += EVERY
            sample = HostSample(at=self.at, total=TOTAL, available=available, stalled=stalled)
            decision = decide(sample, list(self.machines.values()), self.trouble, LIMITS)
            self.trouble = decision.trouble
            for action in decision.actions:
                self._do(action)
                did.append((action.kind, action.machine))
        return did

    def _do(self, action: Action) -> None:
        one = self.machines[action.machine]
        if action.kind is Kind.PAUSE:
            self.machines[action.machine] = dataclasses.replace(one, state=State.PAUSED)
        elif action.kind in (Kind.HIBERNATE, Kind.END):
            del self.machines[action.machine]


def play(*machines: MachineSample) -> Play:
    return Play({each.id: each for each in machines})


def test_the_ladder_from_its_foot_to_its_top() -> None:
    on = play(machine("used", busy=True), machine("new", used=-100), machine("old", used=-500), machine("works", cpu=0.5))
    assert on.look(LOW) == [(Kind.RECLAIM, name) for name in ("used", "new", "old", "works")]
    assert on.look(LOW) == [], "a rung gets time to help"
    assert on.look(LOW) == [(Kind.PAUSE, "old"), (Kind.PAUSE, "new")]
    assert on.look(LOW) == []
    assert on.look(LOW) == [(Kind.HIBERNATE, "old")]
    assert on.look(LOW) == []
    assert on.look(LOW) == [(Kind.HIBERNATE, "new")]
    assert on.look(LOW, times=5) == []
    assert on.look(LOW, times=7) == [(Kind.RECLAIM, "used"), (Kind.RECLAIM, "works")], "once a minute the others are asked again"
    assert set(on.machines) == {"used", "works"}


def test_what_helps_is_all_that_is_done() -> None:
    on = play(machine("a"), machine("b"))
    on.look(LOW)
    assert on.look(ENOUGH, times=20) == []
    assert on.trouble is None


def test_a_host_between_low_and_enough_goes_on_where_it_was() -> None:
    on = play(machine("a"), machine("b"))
    on.look(LOW, times=3)
    assert {each.state for each in on.machines.values()} == {State.PAUSED}
    assert on.look(BETWEEN, times=100) == []
    assert on.look(LOW) == [(Kind.HIBERNATE, "a")], "not from the foot of the ladder again"
    on.look(ENOUGH)
    assert on.look(LOW) == [], "a new time of trouble begins with guests that run, and none does"
    assert on.look(LOW, times=2) == [(Kind.HIBERNATE, "b")]


def test_stalls_count_only_where_memory_is_scarce() -> None:
    on = play(machine("a"))
    assert on.look(ENOUGH, stalled=90, times=10) == [], "they stall at limits of their own"
    assert on.look(BETWEEN, stalled=10, times=10) == []
    assert on.look(BETWEEN, stalled=30) == [(Kind.RECLAIM, "a")]


def test_a_machine_that_somebody_lets_go_on_is_in_use() -> None:
    on = play(machine("a"))
    on.look(LOW, times=3)
    on.machines["a"] = machine("a", used=on.at)  # `ramet resume`
    assert on.look(LOW, times=8) == []
    assert is_idle(on.machines["a"], on.at + 60, LIMITS)


def test_those_that_were_paused_before_are_hibernated_too() -> None:
    on = play(machine("mine", state=State.PAUSED), machine("attached", state=State.PAUSED, busy=True))
    assert on.look(LOW, times=3) == [(Kind.HIBERNATE, "mine")]
    assert on.look(LOW, times=20) == []


def test_parked_machines_go_before_anybody_stands_still() -> None:
    parked = [machine(f"parked{number}", state=State.PAUSED, parked=True) for number in range(2)]
    on = play(machine("a"), *parked, machine("claimed", state=State.PAUSED, parked=True, busy=True))
    assert on.look(LOW) == [(Kind.RECLAIM, "a")]
    assert on.look(LOW, times=2) == [(Kind.END, "parked0"), (Kind.END, "parked1")]
    assert on.look(LOW, times=2) == [(Kind.PAUSE, "a")]
    assert on.look(LOW, times=2) == [(Kind.HIBERNATE, "a")]
    assert on.look(LOW, times=5) == []


# what must hold on every trace

levels = st.tuples(st.integers(0, TOTAL), st.floats(0, 100))
times = st.floats(-10_000, 0)
machines = st.lists(
    st.builds(
        MachineSample,
        id=st.integers(0, 10**6).map(str),
        state=st.sampled_from([State.RUNNING, State.PAUSED]),
        last_used=times,
        busy=st.booleans(),
        cpu=st.floats(0, 4),
        parked=st.booleans(),
    ),
    max_size=6,
    unique_by=lambda each: each.id,
)


@given(machines, st.lists(levels, max_size=60))
def test_whatever_happens(them: list[MachineSample], trace: list[tuple[int, float]]) -> None:
    on = play(*them)
    for available, stalled in trace:
        before, trouble = dict(on.machines), on.trouble
        did = on.look(available, stalled)
        sample = HostSample(at=on.at, total=TOTAL, available=available, stalled=stalled)
        if has_enough(sample, LIMITS):
            assert on.trouble is None
        if not did:
            continue
        assert is_low(sample, LIMITS), "nothing is done to a host that has room"
        assert len({kind for kind, _ in did}) == 1, "one rung at a time"
        kind = did[0][0]
        taken = [before[name] for _, name in did]
        if kind is Kind.RECLAIM:
            assert taken == [each for each in before.values() if each.state is State.RUNNING]
            continue
        assert trouble, "guests are asked first"
        assert on.at - trouble.step >= LIMITS.patience
        if kind is Kind.END:
            assert all(each.parked and not each.busy for each in taken)
            continue
        assert not any(each.parked and not each.busy for each in before.values()), "what is nobody's goes first"
        assert all(is_idle(each, on.at, LIMITS) for each in taken), "never a machine in use"
        assert [each.last_used for each in taken] == sorted(each.last_used for each in taken)
        idle = [each for each in before.values() if is_idle(each, on.at, LIMITS)]
        if kind is Kind.HIBERNATE:
            assert all(each.state is State.PAUSED for each in idle), "all stand still before one is hibernated"
            assert taken[0].last_used == min(each.last_used for each in idle)


@given(machines, st.integers(0, TOTAL), st.floats(0, 100))
def test_the_same_samples_are_decided_the_same(them: list[MachineSample], available: int, stalled: float) -> None:
    sample = HostSample(at=0.0, total=TOTAL, available=available, stalled=stalled)
    assert decide(sample, them, None) == decide(sample, them, None)
    assert bool(decide(sample, them, None).trouble) is is_low(sample, LIMITS)


# where samples come from


def test_the_kernels_own_words(tmp_path: Path) -> None:
    file = tmp_path / "memory"
    file.write_text("some avg10=12.34 avg60=0.87 avg300=0.15 total=123\nfull avg10=55.00 avg60=0.00 avg300=0.00 total=0\n")
    found = host.sample(file)
    assert found.stalled == 12.34
    assert 0 < found.available <= found.total
    for text in ("", "some nonsense\n", "some avg10=\n", "some avg10=x avg60=1\n"):
        file.write_text(text)
        assert host.sample(file).stalled == 0.0
    assert host.sample(tmp_path / "none").stalled == 0.0


def test_the_ladder_can_be_taken_away() -> None:
    assert caretaker.wanted({})
    assert caretaker.wanted({"RAMET_PRESSURE": "on"})
    assert not caretaker.wanted({"RAMET_PRESSURE": "off"})
    with pytest.raises(DaemonError, match="RAMET_PRESSURE"):
        caretaker.wanted({"RAMET_PRESSURE": "no"})
