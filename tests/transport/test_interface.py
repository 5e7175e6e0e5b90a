"""A ring as users see it, apart from the transport that the library calls."""

from __future__ import annotations

import ringattn as ra
from ringattn.transport.base import Ring
from ringattn.transport.interface import Transport


def test_completion_on_a_ring_lists_what_users_call() -> None:
    with ra.init("solo") as ring:
        assert isinstance(ring, ra.Ring) and isinstance(ring, Transport)
        names = {name for name in dir(ring) if not name.startswith("_")}
    assert names >= {"rank", "size", "hosts", "timeout", "trace", "bytes_sent", "both_ways"}
    assert names >= {"split", "broadcast", "all_reduce", "barrier", "close"}
    assert not names & {"exchange", "send", "recv", "wait", "fail", "call", "sharing"}


def test_a_ring_declares_nothing_of_the_transport() -> None:
    assert not {name for name in vars(Transport) if not name.startswith("_") and name in vars(Ring)} - {"split"}
