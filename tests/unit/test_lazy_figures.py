"""What the bench of lazy starts says of what it measured."""

from __future__ import annotations

from ramet.bench import lazy
from ramet.bench.lazy import Mark, Marks

MARKS = Marks(
    lazy=[Mark(seconds=5.0, fetched=40), Mark(seconds=4.0, fetched=20), Mark(seconds=9.0, fetched=30)],
    ahead=[Mark(seconds=3.0, fetched=10)],
    full=Mark(seconds=100.0, fetched=1100),
)


def test_goals_are_for_medians() -> None:
    found = {figure.figure: figure for figure in lazy.compared("it", 1000, MARKS, goals=True, trace=True)}
    share, sooner, traced = list(found.values())[:3]
    assert (share.value, share.unit, share.goal, share.holds) == (3.0, "%", "<= 8", True)
    assert (sooner.value, sooner.goal, sooner.holds) == (0.05, "<= 0.1", True)
    assert (traced.value, traced.holds) == (0.6, True)
    assert found["it: lazy"].value == 5.0
    assert found["it: after a full pull"].value == 100.0


def test_a_goal_that_is_missed_is_told() -> None:
    slow = Marks(lazy=MARKS.lazy, ahead=[Mark(seconds=4.9, fetched=10)], full=Mark(seconds=20.0, fetched=1100))
    share, sooner, traced, *others = lazy.compared("it", 100, slow, goals=True, trace=True)
    assert [share.holds, sooner.holds, traced.holds] == [False, False, False]
    assert all(figure.holds is None and not figure.goal for figure in others)


def test_only_some_figures_have_goals() -> None:
    share, sooner, traced, *_ = lazy.compared("it", 100, MARKS, goals=True, trace=False)
    assert (share.holds, sooner.holds, traced.holds, traced.goal) == (False, True, None, "")
    assert all(figure.holds is None for figure in lazy.compared("it", 100, MARKS, goals=False, trace=True))
