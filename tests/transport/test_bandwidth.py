"""How often messages under way are looked at, and how long they may take."""

from __future__ import annotations

import pytest

from ringattn.transport.failures.bandwidth import LONGEST_POLL, POLL, POLL_BYTES, TIMED_BYTES, LinkRate

MB = 1 << 20


def after(*messages: tuple[int, float]) -> LinkRate:
    link = LinkRate()
    for count, seconds in messages:
        link.learn(count, seconds)
    return link


def test_an_unknown_link_is_looked_at_often() -> None:
    assert after().poll_interval([64 * MB]) == POLL
    assert after((TIMED_BYTES - 1, 10.0)).poll_interval([64 * MB]) == POLL, "a short message tells of latency alone"


@pytest.mark.parametrize("rate", [1e6, 2e7, 1e8, 1e9, 1e10])
def test_no_more_gathers_than_buffers_hold(rate: float) -> None:
    nap = after((64 * MB, 64 * MB / rate)).poll_interval([64 * MB])
    assert POLL <= nap <= LONGEST_POLL
    assert nap * rate <= POLL_BYTES * 1.001 or nap == POLL


def test_a_slow_link_costs_few_looks_and_a_short_message_is_not_late() -> None:
    link = after((20 * MB, 1.0))
    assert link.poll_interval([64 * MB]) > 2e-3
    assert link.poll_interval([64 * MB, 4096]) == POLL
    assert link.poll_interval([]) == POLL


def test_one_late_message_does_not_make_the_link_slow() -> None:
    fast = after((64 * MB, 0.064)).poll_interval([64 * MB])
    link = after((64 * MB, 0.064), (64 * MB, 60.0))
    assert link.poll_interval([64 * MB]) == fast == POLL
    for _ in range(10):  # but a link that has become slow is
        link.learn(64 * MB, 60.0)
    assert link.poll_interval([64 * MB]) == LONGEST_POLL


def test_a_deadline_grows_with_the_bytes_and_the_link_that_was_seen() -> None:
    assert after().deadline(0, 30.0) == 30.0
    assert after().deadline(100 * MB, 30.0) == 30.0 + 10 * 100 * MB / 1e7, "nothing is known of the link"
    fast, slow = after((1 << 30, 1.0)), after((1 << 20, 1.0))
    assert fast.deadline(1 << 30, 5.0) == 15.0
    assert slow.deadline(1 << 30, 5.0) == 5.0 + 10 * 1024
