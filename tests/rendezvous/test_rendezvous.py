"""Connections between those who share a key: who is let in, what is sent on the way there, and what strangers cost."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spawn import ROOT

from ringattn.rendezvous import channel as channels
from ringattn.rendezvous import listener as listeners
from ringattn.rendezvous.channel import Channel, ProtocolError, take
from ringattn.rendezvous.client import connect, format_endpoint, parse_endpoint
from ringattn.rendezvous.handshake import (
    CHALLENGE,
    GREETING,
    REFUSED,
    RESPONSE,
    caller_proof,
    listener_proof,
    make_key,
    make_nonce,
)
from ringattn.rendezvous.key_exchange import _PRIME, KeyExchange
from ringattn.rendezvous.listener import Listener

KEY = make_key()
HERE = "127.0.0.1"


@pytest.fixture
def listener() -> Iterator[Listener]:
    with closing(Listener([HERE], {3: KEY, 4: KEY}.get)) as one:
        yield one


def stranger(listener: Listener) -> socket.socket:
    return socket.create_connection(listener.addresses[0], timeout=10)


def drain(link: socket.socket) -> bytes:
    """All that comes until the other side hangs up."""
    data = b""
    try:
        while part := link.recv(4096):
            data += part
    except ConnectionResetError:
        pass
    return data


def test_both_sides_know_the_key(listener: Listener) -> None:
    link = connect(listener.addresses, KEY, 3)
    rank, other = listener.accept(5)
    with link, other:
        assert rank == 3 and link.gettimeout() is None and other.gettimeout() is None
        for a, b in ((link, other), (other, link)):
            a.sendall(b"hello")
            assert b.recv(10) == b"hello"
    assert listener.accept(0) is None


def test_a_caller_with_another_key_is_refused_at_once(listener: Listener) -> None:
    begin = time.monotonic()
    with pytest.raises(ConnectionError, match=r"^127.0.0.1: another machine or another run of ringattn answers there$"):
        connect(listener.addresses, make_key(), 3)
    assert time.monotonic() - begin < 3 and listener.accept(0) is None


def test_the_first_address_that_answers_is_taken(listener: Listener) -> None:
    port = listener.addresses[0][1]
    with closing(connect([("nowhere.invalid", port), (HERE, port)], KEY, 3)) as link:
        assert link.getpeername() == (HERE, port)


def test_a_proof_is_of_one_side_and_one_rank_and_two_nonces() -> None:
    nonces = [make_nonce() for _ in range(3)]
    ways = [
        (proof, rank, a, b)
        for proof in (caller_proof, listener_proof)
        for rank in (0, 1)
        for a in nonces
        for b in nonces
    ]
    assert len({proof(KEY, *rest) for proof, *rest in ways}) == len(ways)


@pytest.mark.parametrize("proof", [listener_proof, lambda *_: REFUSED, lambda *_: make_nonce()])
def test_a_caller_with_another_proof_is_refused(listener: Listener, proof) -> None:
    """The listener's own, sent back to it, among them; and the same connection again after a true one."""
    with stranger(listener) as link:
        _, theirs = CHALLENGE.unpack(link.recv(CHALLENGE.size, socket.MSG_WAITALL))
        mine = make_nonce()
        link.sendall(RESPONSE.pack(3, mine, proof(KEY, 3, theirs, mine)))
        assert drain(link) == REFUSED
    assert listener.accept(0) is None


def test_a_handshake_cannot_be_played_again(listener: Listener) -> None:
    with closing(socket.create_server((HERE, 0))) as between:
        sent: list[bytes] = []
        relaying = threading.Thread(target=_relay, args=(between, listener.addresses[0], sent))
        relaying.start()
        connect([between.getsockname()], KEY, 3).close()
        relaying.join()
    assert listener.accept(5) is not None
    with stranger(listener) as link:
        link.sendall(sent[0])
        assert drain(link)[CHALLENGE.size :] == REFUSED


def test_no_key_is_sent() -> None:
    with closing(socket.create_server((HERE, 0))) as between, closing(Listener([HERE], lambda rank: KEY)) as listener:
        sent: list[bytes] = []
        relaying = threading.Thread(target=_relay, args=(between, listener.addresses[0], sent))
        relaying.start()
        connect([between.getsockname()], KEY, 3).close()
        relaying.join()
    assert len(b"".join(sent)) == CHALLENGE.size + RESPONSE.size + 32
    assert not any(part in b"".join(sent) for part in (KEY, KEY[:8], KEY.hex().encode()))


def _relay(between: socket.socket, address: tuple[str, int], sent: list[bytes]) -> None:
    """Pass all on between one caller and the listener, and note what each says."""
    said = [b"", b""]

    def pass_on(side: int, source: socket.socket, target: socket.socket) -> None:
        while part := source.recv(4096):
            said[side] += part
            target.sendall(part)

    with between.accept()[0] as caller, socket.create_connection(address) as listener:
        back = threading.Thread(target=pass_on, args=(1, listener, caller))
        back.start()
        pass_on(0, caller, listener)
        listener.shutdown(socket.SHUT_RDWR)
        back.join()
    sent += said


@pytest.mark.parametrize(
    "answer, reason",
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "another program answers there"),
        (
            CHALLENGE.pack(GREETING, bytes(32)) + make_nonce(),
            "another machine or another run of ringattn answers there",
        ),
        (CHALLENGE.pack(GREETING, bytes(32))[:9], "timed out"),
    ],
    ids=["another program", "a wrong proof", "silence"],
)
def test_a_caller_finds_out_who_answers(answer: bytes, reason: str) -> None:
    with closing(socket.create_server((HERE, 0))) as other:
        links = []

        def serve() -> None:
            links.append(other.accept()[0])
            links[0].sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(ConnectionError, match=f"^127.0.0.1: {reason}$"):
            connect([other.getsockname()], KEY, 3, seconds=1.0)
        links[0].close()


def test_a_caller_that_was_dropped_calls_again(monkeypatch: pytest.MonkeyPatch, listener: Listener) -> None:
    monkeypatch.setattr(listeners, "MOST_PENDING", 0)  # every connection is dropped
    with ThreadPoolExecutor(1) as pool:
        calling = pool.submit(connect, listener.addresses, KEY, 4, 20.0)
        time.sleep(0.5)
        assert not calling.done()
        monkeypatch.setattr(listeners, "MOST_PENDING", 64)
        with calling.result(20):
            assert listener.accept(5)[0] == 4


def test_a_handshake_has_one_deadline(monkeypatch: pytest.MonkeyPatch, listener: Listener) -> None:
    """Not one for each byte."""
    monkeypatch.setattr(listeners, "HANDSHAKE_SECONDS", 0.5)
    with stranger(listener) as link:
        begin = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() - begin < 10:
                link.send(b"\0")
                time.sleep(0.1)
        assert time.monotonic() - begin < 4


def test_of_too_many_that_wait_the_oldest_is_dropped(listener: Listener) -> None:
    idle = [stranger(listener) for _ in range(listeners.MOST_PENDING + 5)]
    with connect(listener.addresses, KEY, 3), closing(listener.accept(5)[1]):
        for link in idle[:5]:
            drain(link)  # which returns, because they were hung up on
        idle[-1].settimeout(0.1)
        with pytest.raises(TimeoutError):
            drain(idle[-1])
    for link in idle:
        link.close()


FEW = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
from ringattn.rendezvous.listener import Listener
listener = Listener(["127.0.0.1"], lambda rank: bytes(32))
print(listener.addresses[0][1], flush=True)
print(listener.accept(30)[0], flush=True)
"""


def test_a_flood_that_takes_all_descriptors_keeps_nobody_out() -> None:
    line = [sys.executable, "-c", FEW]
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as process:
        port = int(process.stdout.readline())
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 60
        idle = [socket.create_connection((HERE, port)) for _ in range(40)]
        with connect([(HERE, port)], bytes(32), 7, 20.0):
            assert process.stdout.readline() == "7\n"
        for link in idle:
            link.close()


def test_an_endpoint_is_a_text() -> None:
    places = [("127.0.0.1", 5), ("10.0.0.1", 6)]
    assert parse_endpoint(format_endpoint(places, KEY)) == (places, KEY)


def test_a_caller_without_a_key_as_yet_calls_again() -> None:
    keys: dict[int, bytes] = {}
    with closing(Listener([HERE], keys.get)) as listener, ThreadPoolExecutor(1) as pool:
        calling = pool.submit(connect, listener.addresses, KEY, 4, 20.0)
        time.sleep(0.3)
        keys[4] = KEY
        with calling.result(20), listener.accept(10)[1]:
            pass
        with pytest.raises(ConnectionError, match=r"^127.0.0.1: hung up during the handshake$"):
            connect(listener.addresses, KEY, 5, 0.5)


def test_a_closed_listener_ends_those_who_wait(listener: Listener) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(listener.accept)
        unclaimed = connect(listener.addresses, KEY, 3)
        waiting.result(5)[1].close()
        waiting = pool.submit(listener.accept)
        listener.close()
        assert waiting.result(5) is None
    unclaimed.close()
    with pytest.raises(ConnectionError, match="refused"):
        connect(listener.addresses, KEY, 3)


# Keys


def test_two_ranks_agree_on_a_key() -> None:
    a, b, c = (KeyExchange() for _ in range(3))
    assert a.key_with(b.public) == b.key_with(a.public) != a.key_with(c.public)
    assert len(a.key_with(b.public)) == 32


@pytest.mark.parametrize("public", ["0", "1", f"{_PRIME - 1:x}", f"{_PRIME:x}", "-2", "no number"])
def test_a_public_key_that_gives_the_secret_away_is_refused(public: str) -> None:
    with pytest.raises(ValueError):
        KeyExchange().key_with(public)


# Messages


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel and the raw other end."""
    a, b = socket.socketpair()
    a.settimeout(10)
    with a, b:
        yield Channel(a), b


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
MESSAGES = st.lists(JSON.filter(lambda one: isinstance(one, (dict, list))), max_size=5)


@given(MESSAGES, st.lists(st.integers(1, 30), min_size=1))
def test_messages_arrive_whole_however_they_are_cut(messages: list, sizes: list[int]) -> None:
    a, b = socket.socketpair()
    c, d = socket.socketpair()
    with a, b, c, d:
        sender, receiver = Channel(a), Channel(d)
        for message in messages:
            sender.send(message)
        a.shutdown(socket.SHUT_WR)
        data, found, turn = drain(b), [], 0
        while data:
            size = sizes[turn % len(sizes)]
            c.sendall(data[:size])
            assert receiver.read()
            while (message := receiver.next()) is not None:
                found.append(message)
            data, turn = data[size:], turn + 1
        c.close()
        assert found == messages and receiver.receive() is None


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff\xff\xff\xff",
        b"\0\x01\0\x01",
        b"\0\0\0\x04null",
        b"\0\0\0\x02{]",
        b"\0\0\0\x02\xff\xfe",
        b"\0\0\0\0",
        b"\0\0\xea\x60" + b"[" * 60000,
        b"\0\0\xea\x60" + b'{"a":' * 12000,
        b"\0\0\x13\x88" + b"9" * 5000,
    ],
)
def test_nonsense_is_an_error(pair: tuple[Channel, socket.socket], sent: bytes) -> None:
    channel, other = pair
    other.sendall(sent)
    with pytest.raises(ProtocolError):
        channel.receive()


def test_what_a_parser_cannot_hold_is_an_error(
    pair: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(text: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr(channels.json, "loads", parse)
    pair[1].sendall(b"\0\0\0\x02[]")
    with pytest.raises(ProtocolError, match="MemoryError"):
        pair[0].receive()


def test_no_message_is_longer_than_agreed(pair: tuple[Channel, socket.socket]) -> None:
    with pytest.raises(ProtocolError, match=r"^message of 65538 bytes after 0 that wait, expected at most 65536$"):
        pair[0].send(["x" * (channels.MESSAGE_BYTES - 2)])


def test_sending_waits_for_nobody_where_the_socket_does_not(pair: tuple[Channel, socket.socket]) -> None:
    channel, other = pair
    channel._link.setblocking(False)
    count = 0
    with pytest.raises(ProtocolError, match="that wait"):
        while count < 1000:
            channel.send({"n": count, "text": "x" * 30_000})
            count += 1
    other.setblocking(False)
    receiver, found = Channel(other), []
    while len(found) < count:
        channel.flush()
        receiver.read()
        while (message := receiver.next()) is not None:
            found.append(message["n"])
    assert found == list(range(count))


@pytest.mark.parametrize(
    "message, kind", [({"a": True}, int), ({"a": 1}, bool), ({}, int), ([1], int), ({"a": 1.0}, int)]
)
def test_a_field_has_just_its_type(message: object, kind: type) -> None:
    with pytest.raises(ProtocolError, match="^a: .*, expected"):
        take(message, "a", kind)


def test_the_wrapper_of_a_rank_needs_nothing_of_ringattn() -> None:
    """What every rank pays for is the standard library, and of it not what takes long."""
    code = "import sys, ringattn.rendezvous.client, ringattn.rendezvous.channel; print(*sys.modules)"
    stub = (
        "import sys, types; m = types.ModuleType('ringattn'); m.__path__ = [sys.argv[1]]; sys.modules['ringattn'] = m\n"
    )
    line = [sys.executable, "-IS", "-c", stub + code, str(ROOT / "ringattn")]
    loaded = subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()
    ours = {name for name in loaded if name.startswith("ringattn")}
    assert ours == {"ringattn", *(f"ringattn.rendezvous{part}" for part in ("", ".client", ".channel", ".handshake"))}
    assert not {"mlx", "numpy", "secrets", "random", "asyncio", "ssl", "logging", "multiprocessing"} & set(loaded)
