"""The pure parts of the tour: what makes forks forks, whose tree is drawn, how times look."""

from __future__ import annotations

import dataclasses

import pytest

from ramet import chart, colony, tour
from ramet.colony import Told
from ramet.errors import GuestError
from ramet.model import NodeKind, TreeNode


def told(host: str, *drawn: str, pid: int = 121, machine_id: str = "") -> Told:
    return Told(host=host, machine_id=machine_id or f"id-of-{host}", clock=0, pid=pid, drawn=drawn)


FORKS = [told("hello", "aa", "bb", "c1", "d1"), told("tour-1", "aa", "bb", "c2"), told("tour-2", "aa", "bb", "c3", "d3")]


def test_what_a_machine_says_is_read() -> None:
    said = Told.parse("tour-1\n5be1\n1790000000\n121 aa bb\n")
    assert said == Told(host="tour-1", machine_id="5be1", clock=1790000000, pid=121, drawn=("aa", "bb"))


@pytest.mark.parametrize("text", ["", "tour-1\n5be1\n1790000000\n", "tour-1\n5be1\nnoon\n121 aa\n", "a\nb\n1\n\n", "a\nb\n1\nx aa\n"])
def test_nonsense_of_a_machine_is_an_error(text: str) -> None:
    with pytest.raises(GuestError, match=r"count\.pl"):
        Told.parse(text)


def test_forks_have_in_common_what_was_drawn_before() -> None:
    assert colony.common(FORKS) == 2
    assert colony.common([FORKS[0], FORKS[0]]) == 4
    assert colony.common([FORKS[0], told("x")]) == 0
    assert colony.check(FORKS, seen=2) == 2
    assert colony.check(FORKS, seen=1) == 2


@pytest.mark.parametrize(
    ("changes", "seen", "words"),
    [
        ({"pid": 7}, 2, "its program is not the same"),
        ({"drawn": ("aa", "xx", "c2")}, 2, "remembers is not the same"),
        ({"drawn": ("aa", "bb")}, 2, "does not go on"),
        ({"drawn": ("aa", "bb", "c1")}, 2, "random numbers are the same"),
        ({"host": "hello"}, 2, "host names are the same"),
        ({"machine_id": "id-of-hello"}, 2, "machine ids are the same"),
        ({}, 3, "remembers is not the same"),
    ],
)
def test_what_is_no_fork_is_named(changes: dict[str, object], seen: int, words: str) -> None:
    with pytest.raises(GuestError, match=words) as caught:
        colony.check([FORKS[0], dataclasses.replace(FORKS[1], **changes), FORKS[2]], seen)  # type: ignore[arg-type]
    assert "report" in caught.value.hint


def test_the_tree_is_the_family_s() -> None:
    parents = {
        "image": "",
        "hello": "image",
        "point": "hello",
        "tour-1": "point",
        "deep": "tour-1",
        "stranger": "image",
        "its child": "stranger",
        "other image": "",
    }
    nodes = [TreeNode(id=f"id {name}", parent=f"id {above}", kind=NodeKind.MACHINE, name=name) for name, above in parents.items()]
    assert [node.name for node in colony.family(nodes, "hello")] == ["image", "hello", "point", "tour-1", "deep"]
    assert colony.family(nodes, "nobody") == []


def test_bars_are_to_scale_and_fit() -> None:
    lines = chart.bars({"cold boot → first command": 123.4, "fork → first command": 61.7, "resume → first command": 0.1})
    assert [line.count("█") for line in lines] == [16, 8, 0]
    assert lines[1].endswith("1/2.0")
    assert lines[2].split()[-2:] == ["▏", "1/1234"]  # what is too short to see is seen
    assert max(map(len, lines)) <= chart.WIDTH


def test_a_longer_one_than_the_first_fits_too() -> None:
    lines = chart.bars({"cold boot → first command": 1.0, "fork → first command": 4.0})
    assert [line.count("█") for line in lines] == [4, 16]
    assert lines[1].endswith("1/0.2")


@pytest.mark.parametrize(("number", "word"), [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (112, "112th"), (121, "121st")])
def test_ordinals(number: int, word: str) -> None:
    assert chart.ordinal(number) == word


def test_what_the_tour_brings_along_is_there() -> None:
    assert tour.example().with_name("count.pl").exists()
