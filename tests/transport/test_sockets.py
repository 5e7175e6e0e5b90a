"""The sockets between all ranks: their set-up, and the messages on them."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import closing

import pytest

from ringattn.errors import RingError
from ringattn.rendezvous.key_exchange import KeyExchange
from ringattn.transport.mlx import bootstrap
from ringattn.transport.mlx.bootstrap import TcpBootstrap
from ringattn.transport.mlx.sockets import ControlSockets


def connect_all(bootstraps: list[TcpBootstrap], endpoints=None) -> list:
    """Return the result or the exception of `connect_all` on every rank."""
    results: list = [None] * len(bootstraps)

    def one(rank: int) -> None:
        try:
            results[rank] = bootstraps[rank].connect_all(rank, endpoints or [one.endpoint for one in bootstraps])
        except RingError as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(bootstraps))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_all_are_connected() -> None:
    found = connect_all([TcpBootstrap("here", ["127.0.0.1"]) for _ in range(4)])
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
def test_an_address_of_another_program_is_skipped() -> None:
    """No program listens at the first address, and a program that does not know the protocol at the second."""
    bootstraps = [TcpBootstrap("here", ["127.0.0.1"]) for _ in range(2)]
    with closing(socket.create_server(("127.0.0.2", bootstraps[0].endpoint["port"]))) as elsewhere:
        threading.Thread(target=lambda: elsewhere.accept()[0].close(), daemon=True).start()
        addresses = ["127.0.0.3", "127.0.0.2", "127.0.0.1"]
        endpoints = [{**one.endpoint, "addresses": addresses} for one in bootstraps]
        found = connect_all(bootstraps, endpoints)
    assert [set(sockets) for sockets in found] == [{1}, {0}]


def test_a_peer_with_another_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "CONNECT_TIMEOUT", 1.0)
    bootstraps = [TcpBootstrap("a", ["127.0.0.1"]), TcpBootstrap("b", ["127.0.0.1"])]
    endpoints = [{**one.endpoint, "public": KeyExchange().public} for one in bootstraps]
    first, second = connect_all(bootstraps, endpoints)
    assert "rank 1 (b) did not connect to rank 0 (a) within 1 s" in str(first)
    assert "rank 1 cannot reach rank 0 (a) at 127.0.0.1" in str(second)


@pytest.fixture
def pair():
    """Two connected `ControlSockets`, the messages and lost ranks of each, and the sockets."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        ends = (socket.create_connection(listener.getsockname()), listener.accept()[0])
    received: list[list] = [[], []]
    lost: list[list] = [[], []]
    made = [
        ControlSockets({1 - i: ends[i]}, lambda *message, i=i: received[i].append(message), lost[i].append)
        for i in range(2)
    ]
    yield made, received, lost, ends
    for end in ends:
        end.close()


def test_messages_arrive_in_order(pair) -> None:
    (a, b), received, _, _ = pair
    for i in range(100):
        a.send(1, 3, i, bytes(i))
    while len(received[1]) < 100:
        b.process_events(1)
    assert received[1] == [(0, 3, i, bytes(i)) for i in range(100)]


def test_a_send_never_blocks(pair) -> None:
    """A send does not block even if the peer reads nothing. The peer gets all messages when it reads."""
    (a, b), received, _, _ = pair
    begin = time.monotonic()
    sent = [a.send(1, 0, 1, bytes(500_000)) for _ in range(40)]
    assert time.monotonic() - begin < 2 and not sent[-1]()
    while len(received[1]) < 40:
        a.process_events(0)
        b.process_events(0)
    assert sent[-1]()


def test_a_lost_connection_is_reported_after_its_messages(pair) -> None:
    (a, b), received, lost, ends = pair
    a.send(1, 0, 7, b"last words")
    ends[0].close()
    while not lost[1]:
        b.process_events(1)
    assert received[1] == [(0, 0, 7, b"last words")] and lost[1] == [0]
    assert b.send(0, 0, 1, b"too late")()


def test_invalid_bytes_end_the_connection(pair) -> None:
    (_, b), received, lost, ends = pair
    ends[0].send(b"\xff" * 100)
    while not lost[1]:
        b.process_events(1)
    assert not received[1]
