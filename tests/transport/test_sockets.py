"""The sockets between all ranks: who is let in, and what arrives."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import closing

import pytest

from ringattn.errors import RingError
from ringattn.rendezvous.key_exchange import KeyExchange
from ringattn.transport.mlx import bootstrap
from ringattn.transport.mlx.bootstrap import Meeting
from ringattn.transport.mlx.sockets import Switchboard


def meet(meetings: list[Meeting], cards=None) -> list:
    """What `meet` returns or raises on every rank."""
    results: list = [None] * len(meetings)

    def one(rank: int) -> None:
        try:
            results[rank] = meetings[rank].meet(rank, cards or [m.card for m in meetings])
        except RingError as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(meetings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_all_are_connected() -> None:
    found = meet([Meeting("here", ["127.0.0.1"]) for _ in range(4)])
    for rank, sockets in enumerate(found):
        assert sockets.keys() == set(range(4)) - {rank}
        for peer, sock in sockets.items():
            sock.sendall(bytes([rank, peer]))
    for rank, sockets in enumerate(found):
        for peer, sock in sockets.items():
            assert sock.recv(2) == bytes([peer, rank])
    for sockets in found:
        for sock in sockets.values():
            sock.close()


@pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="only Linux has all of 127.0.0.0/8")
def test_an_address_that_leads_elsewhere_is_given_up() -> None:
    """Nobody listens at the first one, and at the second somebody who does not know what is said there."""
    meetings = [Meeting("here", ["127.0.0.1"]) for _ in range(2)]
    with closing(socket.create_server(("127.0.0.2", meetings[0].card["port"]))) as elsewhere:
        threading.Thread(target=lambda: elsewhere.accept()[0].close(), daemon=True).start()
        cards = [{**m.card, "addresses": ["127.0.0.3", "127.0.0.2", "127.0.0.1"]} for m in meetings]
        found = meet(meetings, cards)
    assert [set(sockets) for sockets in found] == [{1}, {0}]


def test_strangers_are_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "PATIENCE", 1.0)
    meetings = [Meeting("a", ["127.0.0.1"]), Meeting("b", ["127.0.0.1"])]
    first, second = meet(meetings, [{**m.card, "public": KeyExchange().public} for m in meetings])
    assert "rank 1 (b) did not connect to rank 0 (a) within 1 s" in str(first)
    assert "rank 1 cannot reach rank 0 (a) at 127.0.0.1" in str(second)


@pytest.fixture
def boards():
    """Two connected switchboards, what each has heard, whom it has lost, and the sockets."""
    with closing(socket.create_server(("127.0.0.1", 0))) as door:
        ends = (socket.create_connection(door.getsockname()), door.accept()[0])
    heard: list[list] = [[], []]
    lost: list[list] = [[], []]
    made = [
        Switchboard({1 - i: ends[i]}, lambda *message, i=i: heard[i].append(message), lost[i].append) for i in range(2)
    ]
    yield made, heard, lost, ends
    for end in ends:
        end.close()


def test_messages_arrive_in_order(boards) -> None:
    (a, b), heard, _, _ = boards
    for i in range(100):
        a.send(1, 3, i, bytes(i))
    while len(heard[1]) < 100:
        b.pump(1)
    assert heard[1] == [(0, 3, i, bytes(i)) for i in range(100)]


def test_sending_never_waits(boards) -> None:
    """Not even for a rank that reads nothing; it gets all when it does."""
    (a, b), heard, _, _ = boards
    begin = time.monotonic()
    sent = [a.send(1, 0, 1, bytes(500_000)) for _ in range(40)]
    assert time.monotonic() - begin < 2 and not sent[-1]()
    while len(heard[1]) < 40:
        a.pump(0)
        b.pump(0)
    assert sent[-1]()


def test_a_lost_connection_is_told_after_its_messages(boards) -> None:
    (a, b), heard, lost, ends = boards
    a.send(1, 0, 7, b"last words")
    ends[0].close()
    while not lost[1]:
        b.pump(1)
    assert heard[1] == [(0, 0, 7, b"last words")] and lost[1] == [0]
    assert b.send(0, 0, 1, b"too late")()


def test_nonsense_ends_the_connection(boards) -> None:
    (_, b), heard, lost, ends = boards
    ends[0].send(b"\xff" * 100)
    while not lost[1]:
        b.pump(1)
    assert not heard[1]
