"""What a rank concludes from what it hears of others, and from what it does not hear."""

from __future__ import annotations

import json
from collections import deque

import pytest

from ringattn.transport.failures import heartbeats
from ringattn.transport.failures.cause import Cause
from ringattn.transport.failures.control_channel import BEAT, FAIL
from ringattn.transport.failures.heartbeats import UNWATCHED, Liveness, Member
from ringattn.transport.failures.status_file import FILE_BYTES, LINE_BYTES, PULSE, status

TIMEOUT = 0.4
ALONE = [Member(host, TIMEOUT, -1) for host in ("mac0", "mac1", "mac2")]
LAUNCHED = [member._replace(job_rank=5 - rank) for rank, member in enumerate(ALONE)]


class Wire:
    """A post whose messages a test writes and reads."""

    def __init__(self) -> None:
        self.coming: deque[tuple[int, int, bytes]] = deque()
        self.sent: list[tuple[int, int, object]] = []

    def send(self, peer: int, kind: int, note: bytes):
        self.sent.append((peer, kind, json.loads(note)))
        return lambda: True

    def take(self):
        return self.coming.popleft() if self.coming else None

    def beat(self, sender: int, call: str, hop: int, moving: list, agreed: int = 0) -> None:
        self.coming.append((sender, BEAT, json.dumps([call, hop, agreed, moving]).encode()))


def make(wire: Wire, rank: int, told: list, members: list[Member] = ALONE) -> Liveness:
    return Liveness(wire, rank, members, 0.05, lambda: ("barrier", 0), lambda peer: [["send", peer]], told.append)


class Clock:
    """A clock that a test sets, so that a busy machine changes nothing."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(heartbeats, "time", clock)
    return clock


def wait(clock: Clock, life: Liveness, seconds: float, but: tuple[int, ...], wire: Wire) -> None:
    """Time passes, in which all ranks but some are heard."""
    end = clock.now + seconds
    while clock.now < end:
        for peer in range(3):
            if peer not in but:
                wire.beat(peer, "barrier", 0, [])
        life.beat()
        clock.now += 0.02


@pytest.mark.parametrize(("members", "more"), [(ALONE, UNWATCHED), (LAUNCHED, "")])
def test_a_silent_rank_is_named_with_the_last_place_it_was_seen_at(
    clock: Clock, members: list[Member], more: str
) -> None:
    wire, told = Wire(), []
    life = make(wire, 0, told, members)
    life.set_all_places(("ring_attention", 0))
    wait(clock, life, 2 * TIMEOUT, but=(0, 1), wire=wire)
    text = "rank 1 (mac1) gave no sign of life for 0.4 s; it was last heard of in ring_attention, hop 0" + more
    assert [str(error) for error in told] == [text] and told[0].rank == 1
    notes = [(peer, Cause(**note)) for peer, kind, note in wire.sent if kind == FAIL]
    assert [(peer, cause.kind, str(cause)) for peer, cause in notes] == [(1, "silent", text), (2, "silent", text)]


@pytest.mark.parametrize(
    ("agreed", "where"), [(0, "in ring_attention, hop 0"), (1, "after barrier"), (2, "after barrier")]
)
def test_a_heartbeat_from_before_an_agreement_says_nothing_new(clock: Clock, agreed: int, where: str) -> None:
    """It may be read late: where waits are short, nobody reads messages for half a second."""
    wire, told = Wire(), []
    life = make(wire, 0, told)
    life.set_all_places(("ring_attention", 0))
    wire.beat(1, "after barrier", 0, [], agreed)
    wait(clock, life, 2 * TIMEOUT, but=(0, 1), wire=wire)
    assert [str(error).split("last heard of ")[1] for error in told] == [where + UNWATCHED]
    life.beat()
    assert {note[2] for _, kind, note in wire.sent if kind == BEAT} == {1}


def test_a_rank_that_the_launcher_sees_compute_is_alive_until_it_does_not(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = bytearray(FILE_BYTES)
    monkeypatch.setattr(status, "_map", shared)
    wire, told = Wire(), []
    life = make(wire, 0, told, LAUNCHED)
    wire.beat(1, "barrier", 0, [["recv", 5]])
    life.beat()
    for _ in range(3):
        wait(clock, life, 0.75 * TIMEOUT, but=(0, 1), wire=wire)
        shared[LINE_BYTES + PULSE.size + LAUNCHED[1].job_rank] += 1
    wait(clock, life, 0.5 * TIMEOUT, but=(0, 1), wire=wire)
    assert not told
    assert 1 not in life.moving  # what it was moving does not move while it computes, and is not stuck
    wait(clock, life, TIMEOUT, but=(0, 1), wire=wire)
    assert [error.rank for error in told] == [1]


def test_data_is_a_sign_of_life(clock: Clock) -> None:
    wire, told = Wire(), []
    life = make(wire, 0, told)
    end = clock.now + 2 * TIMEOUT
    while clock.now < end:
        life.seen(1)
        life.seen(2)
        life.beat()
        clock.now += 0.02
    assert not told


@pytest.mark.parametrize(
    ("rank", "heard", "note"),
    [
        (2, True, "(rank 0 (mac0) says so, but it is heard by rank 2 (mac2): look at the way between the two)"),
        (2, False, ""),
        (1, True, "(rank 0 (mac0) says so, but it is alive: look at the way between the two)"),
    ],
)
def test_who_is_accused_of_silence_and_heard(clock: Clock, rank: int, heard: bool, note: str) -> None:
    wire, told = Wire(), []
    life = make(wire, rank, told)
    wait(clock, life, 0.75 * TIMEOUT, but=(rank,) if heard else (rank, 1), wire=wire)
    cause = Cause("silent", 1, "mac1", "barrier", 0, "60 s", exit_code=7)
    wire.coming.append((0, FAIL, cause.encode()))
    life.process_messages()
    assert [str(error) for error in told] == [f"{cause} {note}".strip()]
    assert told[0].exit_code == 7


def test_what_is_under_way_is_told_and_kept() -> None:
    wire = Wire()
    life = make(wire, 0, [])
    wire.beat(1, "ring_attention", 2, [["recv", 5]])
    life.beat()
    assert life.moving[1] == [["recv", 5]]
    assert [note for peer, kind, note in wire.sent if (peer, kind) == (2, BEAT)] == [["barrier", 0, 0, [["send", 2]]]]
