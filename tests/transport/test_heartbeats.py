"""What a rank concludes from what it hears of others, and from what it does not hear."""

from __future__ import annotations

import json
import time
from collections import deque

import pytest

from ringattn.transport.failures.control_channel import BEAT, FAIL
from ringattn.transport.failures.heartbeats import Liveness

HOSTS = ("mac0", "mac1", "mac2")
TIMEOUT = 0.4


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

    def beat(self, sender: int, *said: object) -> None:
        self.coming.append((sender, BEAT, json.dumps([*said]).encode()))


def make(wire: Wire, rank: int, told: list) -> Liveness:
    return Liveness(
        wire, rank, HOSTS, TIMEOUT, 0.05, lambda: ("barrier", 0), lambda peer: [["send", peer]], told.append
    )


def wait(life: Liveness, seconds: float, but: tuple[int, ...], wire: Wire) -> None:
    """Time passes, in which all ranks but some are heard."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for peer in range(3):
            if peer not in but:
                wire.beat(peer, "barrier", 0, [])
        life.beat()
        time.sleep(0.02)


def test_a_silent_rank_is_named_with_the_last_place_it_was_seen_at() -> None:
    wire, told = Wire(), []
    life = make(wire, 0, told)
    life.met(("ring_attention", 0))
    wait(life, 2 * TIMEOUT, but=(0, 1), wire=wire)
    text = "rank 1 (mac1) gave no sign of life for 0.4 s; it was last heard of in ring_attention, hop 0"
    assert [str(error) for error in told] == [text] and told[0].rank == 1
    assert {(peer, note["text"], note["silent"]) for peer, kind, note in wire.sent if kind == FAIL} == {
        (1, text, True),
        (2, text, True),
    }


def test_data_is_a_sign_of_life() -> None:
    wire, told = Wire(), []
    life = make(wire, 0, told)
    end = time.monotonic() + 2 * TIMEOUT
    while time.monotonic() < end:
        life.seen(1)
        life.seen(2)
        life.beat()
        time.sleep(0.02)
    assert not told


@pytest.mark.parametrize(
    ("rank", "heard", "told_of"),
    [
        (2, True, "(rank 0 (mac0) says so, but it is heard by rank 2 (mac2): look at the way between the two)"),
        (2, False, ""),
        (1, True, "(rank 0 (mac0) says so, but it is alive: look at the way between the two)"),
    ],
)
def test_who_is_accused_of_silence_and_heard(rank: int, heard: bool, told_of: str) -> None:
    wire, told = Wire(), []
    life = make(wire, rank, told)
    wait(life, 0.75 * TIMEOUT, but=(rank,) if heard else (rank, 1), wire=wire)
    note = {"text": "rank 1 is silent", "rank": 1, "host": "mac1", "hop": 0, "exit_code": 7, "silent": True}
    wire.coming.append((0, FAIL, json.dumps(note).encode()))
    life.hear()
    assert [str(error) for error in told] == [f"rank 1 is silent {told_of}".strip()]
    assert life.exit_code == 7


def test_what_is_under_way_is_told_and_kept() -> None:
    wire = Wire()
    life = make(wire, 0, [])
    wire.beat(1, "ring_attention", 2, [["recv", 5]])
    life.beat()
    assert life.moving[1] == [["recv", 5]]
    assert [note for peer, kind, note in wire.sent if (peer, kind) == (2, BEAT)] == [["barrier", 0, [["send", 2]]]]
