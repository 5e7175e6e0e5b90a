"""Order of messages and gathers over mx.distributed, with ranks that are threads and links as strict as possible."""

from __future__ import annotations

import queue
import random
import threading
from typing import Any

import numpy as np
import pytest

from ringattn.errors import RingError
from ringattn.transport.mlx.all_gather import INLINE_BYTES
from ringattn.transport.mlx.backend import copy_bytes, split_pieces
from ringattn.transport.mlx.matching import Link, Offer, PendingMessage, leads
from ringattn.transport.mlx.scheduler import MessageScheduler

DEADLOCK_AFTER = 20.0  # s


class World:
    """State that the fake groups of all ranks share. A message moves only when both ends have started it."""

    def __init__(self, size: int, duplex: bool):
        self.size, self.duplex = size, duplex
        ends = [(rank, peer) for rank in range(size) for peer in range(size)]
        self.links: dict[tuple[int, int], queue.Queue] = {end: queue.Queue() for end in ends}
        self.taken = {end: threading.Semaphore(0) for end in ends}
        self.barrier = threading.Barrier(size)
        self.rows: list[Any] = [None] * size


class Group:
    """A fake of `ringattn.transport.mlx.backend.Group`. It asserts that no calls overlap that must not."""

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
        assert self.world.taken[self.rank, peer].acquire(timeout=DEADLOCK_AFTER)
        self._busy.remove(f"send to {peer}")

    def recv(self, buffers, peer, stream) -> None:
        self._enter(f"recv from {peer}")
        data = self.world.links[peer, self.rank].get(timeout=DEADLOCK_AFTER)
        assert len(data) == sum(map(len, buffers))
        copy_bytes([np.frombuffer(data, np.uint8)], [np.frombuffer(buffer, np.uint8) for buffer in buffers])
        self.world.taken[peer, self.rank].release()
        self._busy.remove(f"recv from {peer}")

    def swap(self, out, into, stream) -> None:
        self._enter("swap")
        other = self._all(b"".join(out))[1 - self.rank]
        assert len(other) == sum(map(len, into))
        copy_bytes([np.frombuffer(other, np.uint8)], [np.frombuffer(buffer, np.uint8) for buffer in into])
        self._busy.remove("swap")

    def gather(self, x, stream) -> np.ndarray:
        self._enter("gather")
        rows = np.stack(self._all(x))
        self._busy.remove("gather")
        return rows

    def _all(self, mine) -> list:
        self.world.rows[self.rank] = mine
        self.world.barrier.wait(DEADLOCK_AFTER)
        rows = list(self.world.rows)
        self.world.barrier.wait(DEADLOCK_AFTER)
        return rows


class Rank:
    """A scheduler whose neighbours are in this process. Notes arrive on a thread of their own, in order."""

    def __init__(self, world: World, rank: int, ranks: list[Rank]):
        self.inbox: queue.Queue = queue.Queue()
        self.errors: list[BaseException] = []
        send_note = lambda peer, kind, note: ranks[peer].inbox.put((rank, kind, note))  # noqa: E731
        self.scheduler = MessageScheduler(Group(world, rank), send_note, self.errors.append)  # type: ignore[arg-type]
        threading.Thread(target=self._receive_notes, daemon=True).start()

    def _receive_notes(self) -> None:
        while True:
            self.scheduler.receive_note(*self.inbox.get())

    def wait(self, condition) -> None:
        def check() -> None:
            assert not self.errors, self.errors

        deadline = threading.Event()
        timer = threading.Timer(DEADLOCK_AFTER, deadline.set)
        timer.start()
        try:
            self.scheduler.wait(lambda: condition() or deadline.is_set(), check)
        finally:
            timer.cancel()
        assert condition(), "a deadlock"


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
def test_random_messages_and_gathers(size: int, duplex: bool, seed: int) -> None:
    """Each end posts its messages in an order of its own, before, between and after the gathers."""
    rng = random.Random(seed)
    steps = (1, -1) if duplex and size > 2 else (1,)
    lengths = {
        (number, step): {tag: rng.choice([0, 1, 1000, 70_000]) for tag in range(rng.randrange(12))}
        for number in range(size)
        for step in steps
    }
    gathers = rng.randrange(1, 5)

    def content(link: tuple[int, int], tag: int) -> bytes:
        return bytes([link[0] * 32 + (link[1] < 0) * 16 + tag]) * lengths[link][tag]

    def play(rank: Rank, number: int) -> None:
        own, messages = random.Random(seed * 100 + number), []
        before = {step: ((number - step) % size, step) for step in steps}
        todo: list[Any] = [(step, True, tag) for step in steps for tag in lengths[number, step]]
        todo += [(step, False, tag) for step in steps for tag in lengths[before[step]]]
        own.shuffle(todo)
        for at in sorted(own.choices(range(len(todo) + 1), k=gathers), reverse=True):
            todo.insert(at, "gather")
        into = {(step, tag): bytearray(n) for step in steps for tag, n in lengths[before[step]].items()}
        for at, what in enumerate(todo):
            if what == "gather":
                replies = rank.scheduler.exchange(7, [memoryview(bytes([number, at]))], rank.wait)
                assert [reply[0] for reply in replies] == list(range(size))
                continue
            step, sending, tag = what
            data = memoryview(content((number, step), tag) if sending else into[step, tag])
            peer = (number + step) % size if sending else before[step][0]
            message = PendingMessage(sending, peer, (7, tag), lambda data=data: [data], (), lambda _: None)
            messages.append(message)
            rank.scheduler.add(message)
        rank.wait(lambda: all(message.done for message in messages))
        assert all(data == content(before[step], tag) for (step, tag), data in into.items())

    together(size, duplex, play)


def test_two_rings_keep_their_tags_apart() -> None:
    def play(rank: Rank, number: int) -> None:
        into = [bytearray(1), bytearray(1)]
        order = (0, 1) if number else (1, 0)
        messages = [
            PendingMessage(True, 1 - number, (c, 0), lambda c=c: [memoryview(bytes([c]))], (), lambda _: None)
            for c in order
        ]
        messages += [
            PendingMessage(False, 1 - number, (c, 0), lambda c=c: [memoryview(into[c])], (), lambda _: None)
            for c in (0, 1)
        ]
        for message in messages:
            rank.scheduler.add(message)
        rank.wait(lambda: all(message.done for message in messages))
        assert into == [b"\0", b"\1"]

    together(2, True, play)


def test_gathers_of_two_rings_in_different_orders_are_an_error() -> None:
    def play(rank: Rank, number: int) -> None:
        with pytest.raises(AssertionError, match="rings must be used in the same order"):
            rank.scheduler.exchange(number, [], rank.wait)

    together(2, True, play)


def test_payloads_longer_than_a_frame() -> None:
    def play(rank: Rank, number: int) -> None:
        payload = bytes([number]) * (INLINE_BYTES - 1 + number)
        replies = rank.scheduler.exchange(1, [memoryview(payload)], rank.wait)
        assert [bytes(reply) for reply in replies] == [bytes([r]) * (INLINE_BYTES - 1 + r) for r in range(3)]

    together(3, True, play)


def test_sizes_that_differ_are_an_error_and_nothing_moves() -> None:
    link = Link(True, 1, leads=True)
    message = PendingMessage(True, 1, (1, 5), lambda: [memoryview(bytes(10))], (), lambda _: None)
    message.load()
    link.ready.append(message)
    link.offers.append(Offer((1, 5), 11, 0))
    with pytest.raises(RingError, match=r"this rank sent 10 bytes where 11 were expected \(tag 5\)"):
        link.match(0)


def test_an_offer_from_after_a_gather_waits_for_it() -> None:
    link = Link(True, 1, leads=True)
    message = PendingMessage(True, 1, (1, 5), lambda: [], (), lambda _: None)
    message.load()
    link.ready.append(message)
    link.offers.append(Offer((1, 5), 0, 1))
    assert link.match(0) is None and not link.must_announce_epoch(1)
    assert link.match(1) is message


@pytest.mark.parametrize("size", range(2, 9))
def test_waits_for_followers_form_no_cycle(size: int) -> None:
    """Where a rank does one thing at a time, every link has one leader, and followers are later in one order."""
    order = sorted(range(size), key=lambda rank: (rank % 2, rank))
    for rank in range(size):
        right = (rank + 1) % size
        sender, receiver = leads(rank, right, True, False), leads(right, rank, False, False)
        assert sender != receiver
        leader, follower = (rank, right) if sender else (right, rank)
        assert order.index(leader) < order.index(follower)


@pytest.mark.parametrize("most", [1, 3, 7, 100])
def test_split_pieces(most: int) -> None:
    buffers = [memoryview(bytes(range(n))) for n in (0, 5, 0, 1, 9)]
    pieces = list(split_pieces(buffers, most))
    assert [count for _, count in pieces[:-1]] == [most] * (len(pieces) - 1)
    into = np.zeros(15, np.uint8)
    at = 0
    for parts, count in pieces:
        copy_bytes(parts, [into[at : at + count]])
        at += count
    assert bytes(into) == b"".join(buffers) and at == 15
