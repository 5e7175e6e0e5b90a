"""Messages over MPI that both ends are moving: which they are, and for how long nothing of them has moved."""

from __future__ import annotations

import pytest

from ringattn.transport.failures.stall_timer import StallTimer
from ringattn.transport.mpi import progress
from ringattn.transport.mpi.progress import Message, MessageEngine


class Request:
    done = False

    def Test(self, status: object = None) -> bool:  # noqa: N802  (MPI's name)
        return self.done


class Status:
    def Get_count(self, kind: object) -> int:  # noqa: N802
        return 4


@pytest.fixture
def posted(monkeypatch: pytest.MonkeyPatch) -> tuple[MessageEngine, list[Request], list[int]]:
    """An engine with a receive of two pieces from rank 1 under tag 3."""
    monkeypatch.setattr(progress, "CHUNK_BYTES", 4)
    requests: list[Request] = []
    arrived: list[int] = []

    def post(*_: object) -> Request:
        requests.append(Request())
        return requests[-1]

    engine = MessageEngine(post, post, Status, None, lambda message: None, arrived.append)
    engine.add(Message("recv", 1, 3, lambda: [memoryview(bytearray(8))], ()))
    engine.step()
    return engine, requests, arrived


def test_only_what_the_other_end_moves_too(posted) -> None:
    engine, _, _ = posted
    assert engine.in_flight_with(1) == [["recv", 3]] and engine.in_flight_with(2) == []
    assert engine.moving({}) == engine.moving({1: [["recv", 3]]}) == engine.moving({1: [["send", 4]]}) == []
    (one,) = engine.moving({1: [["send", 3]]})
    assert (one.sending, one.peer, one.bytes) == (False, 1, 4)


def test_a_piece_that_has_passed_starts_the_time_anew(posted) -> None:
    engine, requests, arrived = posted
    (before,) = engine.moving({1: [["send", 3]]})
    requests[0].done = True
    engine.step()
    (after,) = engine.moving({1: [["send", 3]]})
    assert before.key != after.key and arrived == [1]
    requests[1].done = True
    engine.step()
    assert engine.moving({1: [["send", 3]]}) == [] and arrived == [1, 1]


def test_time_counts_while_a_thing_is_there_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("ringattn.transport.failures.stall_timer.time.monotonic", lambda: now)
    timer = StallTimer(interval=1.0)
    ages = []
    for now, keys in ((1.0, "a"), (2.0, "ab"), (3.0, "b"), (4.0, "ab"), (14.0, "ab")):  # noqa: B007
        ages.append(timer.look(keys))
    assert ages == [{"a": 0}, {"a": 1, "b": 0}, {"b": 1}, {"a": 0, "b": 2}, {"a": 2, "b": 4}], "awake for 2 of 10 s"
