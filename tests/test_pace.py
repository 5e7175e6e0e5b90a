"""How often messages under way are looked at."""

from __future__ import annotations

import pytest

from ringattn.comm.pace import LONGEST_POLL, LOOK_BYTES, POLL, TELLING_BYTES, Looks

MB = 1 << 20


def after(*messages: tuple[int, float]) -> Looks:
    looks = Looks()
    for count, seconds in messages:
        looks.learn(count, seconds)
    return looks


def test_an_unknown_link_is_looked_at_often() -> None:
    assert after().nap([64 * MB]) == POLL
    assert after((TELLING_BYTES - 1, 10.0)).nap([64 * MB]) == POLL, "a short message tells of latency alone"


@pytest.mark.parametrize("rate", [1e6, 2e7, 1e8, 1e9, 1e10])
def test_no_more_gathers_than_buffers_hold(rate: float) -> None:
    nap = after((64 * MB, 64 * MB / rate)).nap([64 * MB])
    assert POLL <= nap <= LONGEST_POLL
    assert nap * rate <= LOOK_BYTES * 1.001 or nap == POLL


def test_a_slow_link_costs_few_looks_and_a_short_message_is_not_late() -> None:
    looks = after((20 * MB, 1.0))
    assert looks.nap([64 * MB]) > 2e-3
    assert looks.nap([64 * MB, 4096]) == POLL
    assert looks.nap([]) == POLL


def test_one_late_message_does_not_make_the_link_slow() -> None:
    fast = after((64 * MB, 0.064)).nap([64 * MB])
    looks = after((64 * MB, 0.064), (64 * MB, 60.0))
    assert looks.nap([64 * MB]) == fast == POLL
    for _ in range(10):  # but a link that has become slow is
        looks.learn(64 * MB, 60.0)
    assert looks.nap([64 * MB]) == LONGEST_POLL
