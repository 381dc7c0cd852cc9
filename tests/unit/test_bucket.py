"""The token bucket of the benches' slow line: how long what is sent takes, by a clock of the test's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as some

from ramet.bench.bucket import Bucket


def _sent(rate: int, sizes: list[int], pauses: list[float]) -> tuple[list[float], list[float]]:
    """When each piece may go on, and when it came."""
    bucket, now = Bucket(), 100.0
    bucket.rate = rate
    gone, came = [], []
    for size, pause in zip(sizes, pauses, strict=True):
        now += pause
        came.append(now)
        now += bucket.delay(size, now)
        gone.append(now)
    return gone, came


def test_without_a_rate_nothing_waits() -> None:
    gone, came = _sent(0, [1 << 20] * 9, [0.0] * 9)
    assert gone == came


def test_a_second_of_bytes_takes_a_second() -> None:
    gone, came = _sent(8_000_000, [10_000] * 100, [0.0] * 100)
    assert 0.98 <= gone[-1] - came[0] <= 1.0


@given(some.integers(10**5, 10**10), some.lists(some.tuples(some.integers(1, 1 << 16), some.floats(0, 3)), min_size=1, max_size=40))
def test_no_stretch_is_faster_than_the_rate(rate: int, pieces: list[tuple[int, float]]) -> None:
    """But for what a silence of 10 ms makes up for."""
    sizes, pauses = zip(*pieces, strict=True)
    gone, came = _sent(rate, list(sizes), list(pauses))
    for first in range(len(sizes)):
        for last in range(first, len(sizes)):
            assert sum(sizes[first : last + 1]) * 8 / rate <= gone[last] - came[first] + 0.0101
    assert all(later <= earlier + size * 8 / rate + 1e-6 for earlier, later, size in zip(came, gone, sizes, strict=True))


def test_a_new_rate_holds_from_then_on() -> None:
    bucket = Bucket()
    assert bucket.delay(1 << 20, 5.0) == 0.0
    bucket.rate = 8_000_000
    assert 0.98 <= bucket.delay(1_000_000, 5.0) <= 1.0
    bucket.rate = 0
    assert bucket.delay(1 << 20, 5.0) == 0.0
