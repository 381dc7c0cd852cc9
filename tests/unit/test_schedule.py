"""The order in which chunks are fetched, against a model: everything that is wanted is asked for, once, in requests that are not too large and not too many."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.store.remote import Want
from ramet.store.schedule import FIRST, GAP, LONGEST, SLOTS, SPAN, Around, Rank, Readers, Request, Schedule, backoff

FRAME = 40 << 10


def frame(number: int, blob: str = "a") -> Want:
    return Want(blob=blob, offset=number * FRAME, length=FRAME, mark=number.to_bytes(16, "big"))


def frames(first: int, end: int, blob: str = "a") -> list[Want]:
    return [frame(number, blob) for number in range(first, end)]


def following(schedule: Schedule, now: float = 0.0) -> Request:
    found = schedule.next(now)
    assert found
    return found


def test_neighbours_are_one_request_and_what_lies_apart_is_another() -> None:
    schedule = Schedule()
    schedule.add([frame(7), frame(2), frame(3), frame(5), frame(30), frame(3, "b")], Rank.FOREGROUND)
    assert following(schedule).frames == (frame(2), frame(3), frame(5), frame(7))
    assert following(schedule).frames == (frame(30),)
    assert following(schedule).frames == (frame(3, "b"),)
    assert schedule.next(0) is None


def test_a_gap_that_is_too_large_is_not_fetched_along() -> None:
    schedule = Schedule()
    near = Want(blob="a", offset=FRAME + GAP, length=10, mark=b"n")
    far = Want(blob="a", offset=FRAME + GAP + 10 + GAP + 1, length=10, mark=b"f")
    schedule.add([frame(0), near, far], Rank.FOREGROUND)
    assert following(schedule).frames == (frame(0), near)


def test_what_a_guest_waits_for_comes_with_a_little_of_what_is_read_ahead() -> None:
    schedule = Schedule()
    schedule.add(frames(0, 40), Rank.AHEAD)
    schedule.add([frame(20)], Rank.FOREGROUND)
    request = following(schedule)
    assert request.rank is Rank.FOREGROUND
    assert frame(20) in request.frames
    assert request.frames == tuple(frames(20, 20 + Around.MOST // FRAME))
    assert [each for found in (following(schedule), following(schedule)) for each in found.frames] == [*frames(0, 20), *frames(26, 40)]
    schedule.add(frames(100, 140), Rank.FOREGROUND)
    assert following(schedule).frames == tuple(frames(100, 140)), "what guests wait for is not cut"


def test_guests_come_first_and_the_background_last_and_alone() -> None:
    schedule = Schedule()
    for at, rank in enumerate(reversed(Rank)):
        schedule.add([frame(at * 100)], rank)
    found = [following(schedule) for _ in range(4)]
    assert [request.rank for request in found] == [Rank.FOREGROUND, Rank.AHEAD, Rank.TRACE, Rank.BRING]
    assert schedule.next(0) is None
    for request in found:
        schedule.done(request.frames[0])
        schedule.end(request)
    assert following(schedule).rank is Rank.BACKGROUND


def test_what_is_under_way_is_not_asked_for_again_and_gets_the_higher_rank() -> None:
    schedule = Schedule()
    schedule.add(frames(0, 10), Rank.BRING)
    request = following(schedule)
    assert not schedule.urgent
    schedule.add([frame(4)], Rank.FOREGROUND)
    assert schedule.next(0) is None
    assert request.rank is Rank.FOREGROUND
    assert schedule.urgent


def test_what_waits_in_a_queue_moves_forward_and_back() -> None:
    schedule = Schedule()
    schedule.add(frames(0, 3), Rank.BRING)
    schedule.add([frame(50)], Rank.TRACE)
    schedule.add([frame(1)], Rank.FOREGROUND)
    schedule.remove([frame(1)], Rank.FOREGROUND)  # the guest was ended
    assert following(schedule).frames == (frame(50),)
    assert following(schedule).frames == tuple(frames(0, 3))


def test_what_failed_waits_for_its_time() -> None:
    schedule = Schedule()
    schedule.add([frame(0), frame(0, "b")], Rank.FOREGROUND)
    request = following(schedule)
    schedule.end(request)
    schedule.hold("a", 5.0)
    assert following(schedule, 1.0).blob == "b"
    assert schedule.next(4.9) is None
    assert schedule.due(4.9) == 5.0
    assert following(schedule, 5.0).blob == "a"
    assert schedule.due(5.0) is None


def test_what_nobody_wants_any_more_is_not_asked_for() -> None:
    schedule = Schedule()
    schedule.add(frames(0, 3), Rank.FOREGROUND)
    schedule.remove([frame(1)], Rank.FOREGROUND)
    request = following(schedule)
    assert request.frames == (frame(0), frame(2))
    schedule.remove([frame(0)], Rank.FOREGROUND)
    schedule.end(request)
    assert following(schedule).frames == (frame(2),)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(list(Rank)), st.integers(0, 400), st.integers(1, 150), st.sampled_from("ab")), max_size=12),
    st.randoms(),
)
def test_all_is_fetched_once_within_the_limits(asked: list[tuple[Rank, int, int, str]], chance: random.Random) -> None:
    schedule = Schedule()
    wanted: set[Want] = set()
    came: set[Want] = set()
    flying: list[Request] = []
    now = 0.0
    while asked or wanted - came or flying:
        if asked and chance.random() < 0.5:
            rank, first, count, blob = asked.pop()
            found = set(frames(first, first + count, blob))
            schedule.add(found - came, rank)
            wanted |= found
        while request := schedule.next(now):
            assert len(flying) < SLOTS[request.rank]
            assert {each.blob for each in request.frames} == {request.blob}
            assert all(two.offset - one.offset - one.length <= GAP for one, two in pairwise(request.frames))
            assert request.frames[-1].offset + FRAME - request.frames[0].offset <= SPAN[request.rank]
            assert not came.intersection(request.frames)
            assert not {each for other in flying for each in other.left}.intersection(request.frames)
            flying.append(request)
        if flying:
            request = flying.pop(chance.randrange(len(flying)))
            for each in chance.sample(request.frames, chance.randint(0, len(request.frames))):
                schedule.done(each)
                came.add(each)
            schedule.end(request)
            if request.left and chance.random() < 0.5:
                schedule.hold(chance.choice([request.blob, *request.left]), now + 1)
        else:
            due = schedule.due(now)
            assert asked or due is not None or wanted <= came, "something is wanted, and nothing is going to happen"
            now = due or now
    assert came == wanted
    assert schedule.requests == 0


def test_backing_off_grows_to_a_limit_and_spreads() -> None:
    delays = [backoff(count, 1.0) for count in range(1, 12)]
    assert delays[0] == FIRST
    assert delays == sorted(delays)
    assert delays[-1] == LONGEST
    assert backoff(100000, 0.0) == LONGEST / 2


def test_who_reads_on_and_on_is_noticed() -> None:
    readers = Readers()
    ahead = [readers.touch(at, at + FRAME) for at in range(0, 400 * FRAME, FRAME)]
    ranges = [found for found in ahead if found]
    assert ranges[0][0] >= Readers.ENOUGH
    assert all(one[1] == two[0] for one, two in pairwise(ranges))
    assert max(end - begin for begin, end in ranges) <= Readers.MOST
    assert len(ranges) < 30  # in large pieces


def test_who_finds_it_fetched_ahead_is_still_known_to_read_on() -> None:
    readers = Readers()
    here = missed = 0
    for at in range(0, 2000 * FRAME, FRAME):
        if at + FRAME > here:
            missed += 1
            if found := readers.touch(at, at + FRAME):
                here = found[1]
    assert missed < 40


def test_who_jumps_about_is_not_read_ahead_for() -> None:
    readers = Readers()
    chance = random.Random(1)
    assert not any(readers.touch(at, at + FRAME) for at in (chance.randrange(1 << 30) for _ in range(500)))
    assert not any(readers.touch(0, FRAME) for _ in range(500))


def test_two_who_read_at_one_time_are_both_noticed() -> None:
    readers = Readers()
    far = 1 << 30
    found = [readers.touch(base + at, base + at + FRAME) for at in range(0, 50 * FRAME, FRAME) for base in (0, far)]
    assert any(each and each[0] < far for each in found)
    assert any(each and each[0] >= far for each in found)


def test_more_is_fetched_around_where_it_takes_less_time_than_to_ask_again() -> None:
    def after(delay: float, rate: float) -> int:
        around = Around()
        for _ in range(20):
            around.measured(delay, around.length / rate)
        return around.length

    assert after(0.05, 100e6) == Around.MOST
    assert after(0.001, 1e6) == Around.LEAST
    assert Around.LEAST < after(0.01, 12.5e6) < Around.MOST
