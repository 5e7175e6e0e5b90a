"""The order of things over mx.distributed, with ranks that are threads and links that are as strict as can be."""

from __future__ import annotations

import queue
import random
import threading
from typing import Any

import numpy as np
import pytest

from ringattn.errors import RingError
from ringattn.transport.mlx import scheduler as fabrics
from ringattn.transport.mlx.all_gather import INLINE_BYTES
from ringattn.transport.mlx.backend import cut, pour
from ringattn.transport.mlx.matching import Link, Parcel, leads
from ringattn.transport.mlx.scheduler import Fabric

PATIENCE = 20.0  # s until a wait counts as a deadlock


class World:
    """What the fake groups of all ranks share: a message is handed over when both ends are at it, and never before."""

    def __init__(self, size: int, duplex: bool):
        self.size, self.duplex = size, duplex
        ends = [(rank, peer) for rank in range(size) for peer in range(size)]
        self.links: dict[tuple[int, int], queue.Queue] = {end: queue.Queue() for end in ends}
        self.taken = {end: threading.Semaphore(0) for end in ends}
        self.barrier = threading.Barrier(size)
        self.rows: list[Any] = [None] * size


class Group:
    """Stands for `ringattn.transport.mlx.backend.Group`, and notices what the real one could not bear."""

    def __init__(self, world: World, rank: int):
        self.world, self.rank, self.size, self.duplex = world, rank, world.size, world.duplex
        self._busy: set[str] = set()

    def _enter(self, what: str) -> None:
        together = self.duplex and what.startswith(("send", "recv"))
        allowed = {busy for busy in self._busy if together and busy.startswith(("send", "recv")) and busy != what}
        assert self._busy <= allowed, f"{what} while {self._busy}"
        self._busy.add(what)

    def send(self, buffers, peer, stream) -> None:
        self._enter(f"send to {peer}")
        self.world.links[self.rank, peer].put(b"".join(buffers))
        assert self.world.taken[self.rank, peer].acquire(timeout=PATIENCE)
        self._busy.remove(f"send to {peer}")

    def recv(self, buffers, peer, stream) -> None:
        self._enter(f"recv from {peer}")
        data = self.world.links[peer, self.rank].get(timeout=PATIENCE)
        assert len(data) == sum(map(len, buffers))
        pour([np.frombuffer(data, np.uint8)], [np.frombuffer(buffer, np.uint8) for buffer in buffers])
        self.world.taken[peer, self.rank].release()
        self._busy.remove(f"recv from {peer}")

    def swap(self, out, into, stream) -> None:
        self._enter("swap")
        other = self._all(b"".join(out))[1 - self.rank]
        assert len(other) == sum(map(len, into))
        pour([np.frombuffer(other, np.uint8)], [np.frombuffer(buffer, np.uint8) for buffer in into])
        self._busy.remove("swap")

    def gather(self, x, stream) -> np.ndarray:
        self._enter("gather")
        rows = np.stack(self._all(x))
        self._busy.remove("gather")
        return rows

    def _all(self, mine) -> list:
        self.world.rows[self.rank] = mine
        self.world.barrier.wait(PATIENCE)
        rows = list(self.world.rows)
        self.world.barrier.wait(PATIENCE)
        return rows


class Rank:
    """A fabric whose neighbours are in this process; what is told arrives on a thread of its own, in order."""

    def __init__(self, world: World, rank: int, ranks: list[Rank]):
        self.inbox: queue.Queue = queue.Queue()
        self.errors: list[BaseException] = []
        tell = lambda peer, kind, note: ranks[peer].inbox.put((rank, kind, note))  # noqa: E731
        self.fabric = Fabric(Group(world, rank), tell, self.errors.append)  # type: ignore[arg-type]
        threading.Thread(target=self._hear, daemon=True).start()

    def _hear(self) -> None:
        while True:
            self.fabric.hear(*self.inbox.get())

    def wait(self, poll) -> None:
        def look() -> None:
            assert not self.errors, self.errors

        deadline = threading.Event()
        timer = threading.Timer(PATIENCE, deadline.set)
        timer.start()
        try:
            self.fabric.wait(lambda: poll() or deadline.is_set(), look)
        finally:
            timer.cancel()
        assert poll(), "a deadlock"


def together(size: int, duplex: bool, play) -> None:
    """Run `play` of (this rank, its number) on all ranks at once."""
    world, ranks, failures = World(size, duplex), [], []
    ranks += [Rank(world, rank, ranks) for rank in range(size)]

    def guarded(rank: int) -> None:
        try:
            play(ranks[rank], rank)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("duplex", [True, False], ids=["both ways", "one way"])
@pytest.mark.parametrize("size", [2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(5))
def test_random_messages_and_rounds(size: int, duplex: bool, seed: int) -> None:
    """Each end posts its messages in an order of its own, before, between and after the rounds."""
    rng = random.Random(seed)
    steps = (1, -1) if duplex and size > 2 else (1,)
    lengths = {
        (number, step): {tag: rng.choice([0, 1, 1000, 70_000]) for tag in range(rng.randrange(12))}
        for number in range(size)
        for step in steps
    }
    rounds = rng.randrange(1, 5)

    def content(link: tuple[int, int], tag: int) -> bytes:
        return bytes([link[0] * 32 + (link[1] < 0) * 16 + tag]) * lengths[link][tag]

    def play(rank: Rank, number: int) -> None:
        own, parcels = random.Random(seed * 100 + number), []
        before = {step: ((number - step) % size, step) for step in steps}
        todo: list[Any] = [(step, True, tag) for step in steps for tag in lengths[number, step]]
        todo += [(step, False, tag) for step in steps for tag in lengths[before[step]]]
        own.shuffle(todo)
        for at in sorted(own.choices(range(len(todo) + 1), k=rounds), reverse=True):
            todo.insert(at, "round")
        into = {(step, tag): bytearray(n) for step in steps for tag, n in lengths[before[step]].items()}
        for at, what in enumerate(todo):
            if what == "round":
                replies = rank.fabric.exchange(7, [memoryview(bytes([number, at]))], rank.wait)
                assert [reply[0] for reply in replies] == list(range(size))
                continue
            step, sending, tag = what
            data = memoryview(content((number, step), tag) if sending else into[step, tag])
            peer = (number + step) % size if sending else before[step][0]
            parcel = Parcel(sending, peer, (7, tag), lambda data=data: [data], (), lambda _: None)
            parcels.append(parcel)
            rank.fabric.add(parcel)
        rank.wait(lambda: all(parcel.done for parcel in parcels))
        assert all(data == content(before[step], tag) for (step, tag), data in into.items())

    together(size, duplex, play)


def test_two_rings_keep_their_tags_apart() -> None:
    def play(rank: Rank, number: int) -> None:
        into = [bytearray(1), bytearray(1)]
        order = (0, 1) if number else (1, 0)
        parcels = [
            Parcel(True, 1 - number, (c, 0), lambda c=c: [memoryview(bytes([c]))], (), lambda _: None) for c in order
        ]
        parcels += [
            Parcel(False, 1 - number, (c, 0), lambda c=c: [memoryview(into[c])], (), lambda _: None) for c in (0, 1)
        ]
        for parcel in parcels:
            rank.fabric.add(parcel)
        rank.wait(lambda: all(parcel.done for parcel in parcels))
        assert into == [b"\0", b"\1"]

    together(2, True, play)


def test_rounds_of_two_rings_in_different_orders_are_an_error() -> None:
    def play(rank: Rank, number: int) -> None:
        with pytest.raises(AssertionError, match="rings must be used in the same order"):
            rank.fabric.exchange(number, [], rank.wait)

    together(2, True, play)


def test_payloads_longer_than_a_frame() -> None:
    def play(rank: Rank, number: int) -> None:
        payload = bytes([number]) * (INLINE_BYTES - 1 + number)
        replies = rank.fabric.exchange(1, [memoryview(payload)], rank.wait)
        assert [bytes(reply) for reply in replies] == [bytes([r]) * (INLINE_BYTES - 1 + r) for r in range(3)]

    together(3, True, play)


def test_sizes_that_differ_are_an_error_and_nothing_moves() -> None:
    link = Link(True, 1, leads=True)
    parcel = Parcel(True, 1, (1, 5), lambda: [memoryview(bytes(10))], (), lambda _: None)
    parcel.load()
    link.ready.append(parcel)
    link.offers.append(fabrics.Offer((1, 5), 11, 0))
    with pytest.raises(RingError, match=r"this rank sent 10 bytes where 11 were expected \(tag 5\)"):
        link.match(0)


def test_an_offer_from_after_a_round_waits_for_it() -> None:
    link = Link(True, 1, leads=True)
    parcel = Parcel(True, 1, (1, 5), lambda: [], (), lambda _: None)
    parcel.load()
    link.ready.append(parcel)
    link.offers.append(fabrics.Offer((1, 5), 0, 1))
    assert link.match(0) is None and not link.due(1)
    assert link.match(1) is parcel


@pytest.mark.parametrize("size", range(2, 9))
def test_waiting_for_followers_makes_no_circle(size: int) -> None:
    """Where a rank does one thing at a time: every link has one leader, and followers are later in one order."""
    order = sorted(range(size), key=lambda rank: (rank % 2, rank))
    for rank in range(size):
        right = (rank + 1) % size
        sender, receiver = leads(rank, right, True, False), leads(right, rank, False, False)
        assert sender != receiver
        leader, follower = (rank, right) if sender else (right, rank)
        assert order.index(leader) < order.index(follower)


@pytest.mark.parametrize("most", [1, 3, 7, 100])
def test_pieces(most: int) -> None:
    buffers = [memoryview(bytes(range(n))) for n in (0, 5, 0, 1, 9)]
    pieces = list(cut(buffers, most))
    assert [count for _, count in pieces[:-1]] == [most] * (len(pieces) - 1)
    into = np.zeros(15, np.uint8)
    at = 0
    for parts, count in pieces:
        pour(parts, [into[at : at + count]])
        at += count
    assert bytes(into) == b"".join(buffers) and at == 15
