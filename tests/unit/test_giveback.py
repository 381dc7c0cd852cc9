"""The pure parts of the bench of what guests give back: samples as CSV and as a picture, shares of what was given up."""

from __future__ import annotations

import dataclasses
import itertools
import os
import struct
import sys
import xml.etree.ElementTree as ElementTree
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.bench import figures, giveback, idle, members, picture, plot, returned
from ramet.bench.plot import Point
from ramet.bench.returned import Back, Work
from ramet.errors import HostError

MIB = 1 << 20


def run(machine: str, peak: int, end: int) -> list[Point]:
    """Ten seconds of each phase; memory climbs to the peak, and is at the end when it has rested."""
    heights = {picture.IDLE: 100, picture.FILL: peak // 2, picture.WORK: peak, picture.FREE: peak, picture.REST: end}
    return [
        Point(seconds=at * 10 + second, machine=machine, memory=height * MIB, disk=height * MIB // 3, phase=phase)
        for at, (phase, height) in enumerate(heights.items())
        for second in range(10)
    ]


RUNS = [*run(picture.OFF, 800, 800), *run(picture.ON, 800, 150), *run(picture.FORK, 760, 90)]
points = st.builds(
    Point,
    seconds=st.integers(0, 10**6).map(lambda n: n / 100),
    machine=st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1),
    memory=st.integers(0, 1 << 50),
    disk=st.integers(0, 1 << 50),
    phase=st.sampled_from([picture.IDLE, picture.FILL, picture.REST]),
)


@given(st.lists(points, max_size=20))
def test_the_csv_has_all_of_the_samples(samples: list[Point]) -> None:
    text = plot.as_csv(samples)
    assert text.startswith("seconds,machine,memory,disk,phase\n")
    assert plot.parse(text) == samples


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", "seconds,machine,memory,disk,phase\nx,m,1,2,idle\n", "seconds,machine,memory,disk,phase\n1,m\n"]
)
def test_another_csv_is_refused(text: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        plot.parse(text)


def test_phases_touch_each_other() -> None:
    found = plot.phases(run("m", 500, 100))
    assert [name for name, _, _ in found] == [picture.IDLE, picture.FILL, picture.WORK, picture.FREE, picture.REST]
    assert all(end == begin for (_, _, end), (_, begin, _) in itertools.pairwise(found))
    assert (found[0][1], found[-1][2]) == (0, 49)
    assert plot.phases([]) == []


def test_phases_begin_together() -> None:
    slow = [dataclasses.replace(point, seconds=point.seconds * 1.5) for point in run("slow", 500, 100)]
    runs = {"quick": run("quick", 500, 100), "slow": slow}
    found = plot.aligned(runs)
    assert found["slow"] == slow
    starts = {name: [begin for _, begin, _ in plot.phases(points)] for name, points in found.items()}
    assert starts["quick"] == starts["slow"] == [0, 15, 30, 45, 60]
    assert [point.memory for point in found["quick"]] == [point.memory for point in runs["quick"]]
    assert plot.longest(found)[-1] == (picture.REST, 60, 73.5)
    assert plot.aligned({"quick": runs["quick"]}) == {"quick": runs["quick"]}


def test_machines_keep_their_order() -> None:
    found = plot.machines(RUNS)
    assert list(found) == [picture.OFF, picture.ON, picture.FORK]
    assert [point for own in found.values() for point in own] == RUNS


@pytest.fixture(scope="module")
def drawn() -> dict[str, bytes]:
    """Made once: matplotlib keeps its fonts open until the process ends."""
    return plot.draw(RUNS, "A title")


def test_the_picture_is_drawn_as_png(drawn: dict[str, bytes]) -> None:
    data = drawn["png"]
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 1600  # twice what a README is wide
    assert height >= 800
    at, kinds = 8, []
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        assert zlib.crc32(data[at + 4 : at + 8 + length]) == struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0]
        kinds.append(data[at + 4 : at + 8])
        at += 12 + length
    assert kinds[0] == b"IHDR"
    assert kinds[-1] == b"IEND"


def test_the_picture_is_drawn_as_svg(drawn: dict[str, bytes]) -> None:
    data = drawn["svg"]
    root = ElementTree.fromstring(data)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    styles = " ".join(each.get("style", "") for each in root.iter("{http://www.w3.org/2000/svg}path")).lower()
    for color, _ in plot.LINES:
        assert styles.count(f"stroke: {color.lower()}") >= 3, color  # in two panels and in the legend
    assert all(line == line.rstrip() for line in data.decode().splitlines())
    assert data == plot.draw(RUNS, "A title")["svg"]


def test_lines_differ_without_their_colors() -> None:
    assert len({str(dashes) for _, dashes in plot.LINES}) == len(plot.LINES) >= 3


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(HostError) as caught:
        plot.draw(RUNS, "A title")
    assert "./ramet bench giveback" in caught.value.hint


async def test_what_came_back_is_a_share_of_what_was_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(returned, "_NAP", 0.001)
    costs = iter([1000, 900, 550, 500])
    back = await returned.watch(lambda: next(costs, 500), 500, 0.5, 0.8, nothing())
    assert back.share == 1.0
    assert [share for _, share in back.series[:3]] == [0.2, 0.9, 1.0]
    assert back.seconds == back.series[1][0]


async def test_nothing_comes_back_and_more_is_taken() -> None:
    back = await returned.watch(iter(range(1000, 10**6, 100)).__next__, 500, 0.3, 0.8, nothing())
    assert (back.share, back.seconds) == (0.0, None)


async def nothing() -> None:
    pass


def test_shares_have_their_goals() -> None:
    whole = Back(share=0.97, seconds=1.25, series=((1.25, 0.97),))
    share, when = giveback.came_back("x", whole, 0.95, 5)
    assert (share.value, share.goal, share.holds, when.value) == (pytest.approx(97), ">= 95", True, 1.25)
    (share,) = giveback.came_back("x", Back(share=0.0, seconds=None, series=()), 0.95, 5)
    assert share.holds is False
    (share,) = giveback.came_back("x", Back(share=0.0, seconds=None, series=()), None, 5)
    assert (share.value, share.goal, share.holds) == (0, "", None)


def test_the_slowdown_is_of_the_least_disturbed() -> None:
    work = Work(off=(10.0, 11.0, 30.0), eager=(10.2, 11.0, 40.0), off_cpu=(10.0, 10.0, 10.0), eager_cpu=(10.1, 10.2, 10.3))
    time, cpu, *_ = giveback.slowdown(work)
    assert (time.value, time.holds) == (1.02, True)
    assert cpu.value == pytest.approx(1.02)
    worse, *_ = giveback.slowdown(Work(off=(10.0,), eager=(10.6,), off_cpu=(1.0,), eager_cpu=(1.0,)))
    assert worse.holds is False


def test_a_lower_goal_holds_from_there_on() -> None:
    assert [figures.at_least("x", value, "%", 80).holds for value in (79.9, 80, 81)] == [False, True, True]


def test_a_process_is_looked_at() -> None:
    assert 0 < returned.private(os.getpid()) <= members.resident(os.getpid(), "Pss") * 1.01
    assert idle.switches(os.getpid())[str(os.getpid())] > 0
    with pytest.raises(HostError):
        returned.private(1 << 30)
