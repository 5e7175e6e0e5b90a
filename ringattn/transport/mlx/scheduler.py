"""Order of point-to-point messages and all-gathers on `mx.distributed`.

A process has one group of processes, so it has one scheduler, which all its rings share. The scheduler runs worker
threads, each of which does one thing after the other: a message to a neighbour, a message from one, or a gather. With
one thread for each link, a rank does all four at once (two where it has only one neighbour). With one thread for all
links, messages go to the right, one at a time. The main thread only waits, and checks the other ranks meanwhile.

No deadlock is possible if all ranks make the same calls:

- A message starts at one end only when it is ready at both, and both ends start messages in one order (`matching`).
- One thread for each link: the tasks before a message in a thread's queue are of the same link, in the same order at
  both ends. So the first message of a link always moves. One thread for all links: the leader commits only when its
  thread is idle, and `matching.leads` explains why the waits for followers form no cycle.
- A gather starts when its threads have done everything that was committed before it. Everything that is committed
  after it waits for its end. A follower that waits for its leader always gets an answer, because the leader either
  commits or begins the gather too.
- Gathers that are nodes of MLX's graph depend on one another in the order of the calls. They are evaluated before
  anything else starts here.

A precomputed order for each link would not be simpler than offers and commits. Two rings may post their messages in
different orders on two ranks, and the order in which one ring posts them can deadlock (pass-Q on six ranks: the block
of hop 5 waits for the buffer of hop 3, in front of a result that the receiver needs at the end of hop 2). The ends must
notify each other in any case: a receive that starts early keeps a core busy in MLX, and sizes that differ and links
that are stuck must be found.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..interface import Buffers
from . import all_gather
from .backend import Group
from .matching import Key, Link, Offer, PendingMessage, leads
from .worker_thread import Task, WorkerThread

# Kinds of notes between schedulers
OFFER = 16  # a message can move at the follower
COMMIT = 17  # the leader starts one message, or one in each direction
EPOCH_BEGUN = 18  # the leader has begun a gather and commits nothing more before it
EPOCH_FINISHED = 19  # a rank that closes a ring has finished this gather
EPOCH_ENTERED = 20  # a rank is in this gather, or past it

CHECK_INTERVAL = 0.02  # s between two checks of the other ranks in a wait

_OFFER = struct.Struct("<BIqQQ")  # whether the follower sends; channel, tag, bytes, epoch
_COMMIT = struct.Struct("<QBIqBIq")  # epoch; whether the leader sends, channel, tag; whether it receives, channel, tag
_EPOCH_BEGUN = struct.Struct("<BQ")  # whether the leader sends; epoch
_EPOCH = struct.Struct("<Q")
_NO_KEY: Key = (0, 0)

SendNote = Callable[[int, int, bytes], object]  # peer, kind, note
Wait = Callable[[Callable[[], bool]], None]  # returns when its argument returns True; raises when that cannot happen


class MessageScheduler:
    """Orders point-to-point messages and all-gathers on `mx.distributed`.

    Args:
        group: The group that moves the bytes.
        send_note: Sends a note to the scheduler of another rank, which passes it to `receive_note`; never blocks.
        on_error: Called with an exception of a worker thread.

    Attributes:
        epoch: The number of gathers that this rank has begun.
        finished_epochs: By rank that has closed a ring: the last gather that it had finished.
        lock: Guards the state.
        changed: Notified after every change of the state.
    """

    def __init__(self, group: Group, send_note: SendNote, on_error: Callable[[BaseException], None]):
        self.group = group
        self.rank = group.rank
        self.size = group.size
        self.epoch = 0
        self.finished_epochs: dict[int, int] = {}
        self._entered_epochs: dict[int, int] = {}  # by rank: the last gather that it has entered
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.on_error = on_error
        self._send_note = send_note
        self._blocked: list[PendingMessage] = []
        self._gather_begun = False  # until the gather has ended
        self._in_gather = False  # the gather itself runs
        self._gather_lock = threading.Lock()
        self._last_in_graph: mx.array | None = None  # the last gather in MLX's graph, until it is known to have run
        ends = self._ends()
        self._links = {end: Link(*end, leads(self.rank, end[1], end[0], group.duplex)) for end in ends}
        self._half_duplex_order = list(self._links.values())  # the links that `_commit_one` tries, first to last
        names = [f"{'to' if sending else 'from'} rank {peer}" for sending, peer in ends]
        threads = [self._worker(name) for name in (names if group.duplex else ["moves"])]
        self._workers = dict(zip(self._links.values(), threads * (len(ends) // len(threads))))
        self._gather_worker = threads[0]

    def _ends(self) -> list[tuple[bool, int]]:
        """Return, for each link, whether this rank sends on it, and its peer."""
        right = (self.rank + 1) % self.size
        left = (self.rank - 1) % self.size
        ends = [(True, right), (False, left)]
        if self.group.duplex and self.size > 2:
            ends += [(True, left), (False, right)]
        return ends

    def _worker(self, name: str) -> WorkerThread:
        return WorkerThread(name, self.lock, self._may_start, self.advance, self.fail)

    # Messages

    def add(self, message: PendingMessage) -> None:
        """Move `message` when it is ready at both ends."""
        self.settle()
        with self.lock:
            self._blocked.append(message)
            self.advance()

    def advance(self) -> None:
        """Start everything that can start now. Call this after every change."""
        with self.lock:
            try:
                for message in [message for message in self._blocked if message.ready]:
                    self._blocked.remove(message)
                    self._make_ready(message)
                self._commit()
            except Exception as error:  # the peers must get it, whichever thread this is
                self.fail(error)
            self.changed.notify_all()
            for worker in self._workers.values():
                worker.wakeup.notify()

    def _make_ready(self, message: PendingMessage) -> None:
        link = self._links[message.sending, message.peer]
        message.load()
        link.ready.append(message)
        if not link.leads:
            message.epoch = self.epoch
            self._send_note(message.peer, OFFER, _OFFER.pack(link.sending, *message.key, message.bytes, self.epoch))

    def _commit(self) -> None:
        """Commit the messages that both ends of a led link can move."""
        if self._gather_begun:
            return
        if self.group.duplex:
            for link in self._links.values():
                while link.leads and (message := link.match(self.epoch)) is not None:
                    self._send_commit(message.peer, message, None)
                    self._enqueue(self.epoch, message, None)
        elif self._gather_worker.idle:
            self._commit_one()

    def _commit_one(self) -> None:
        """Commit one message, or with two ranks one in each direction."""
        found: dict[bool, PendingMessage] = {}
        for link in self._half_duplex_order:
            if link.leads and (message := link.match(self.epoch)) is not None:
                found[link.sending] = message
                if self.size > 2:  # the other link has another peer
                    break
        if found:
            self._half_duplex_order.reverse()  # so that each link gets its turn
            peer = next(iter(found.values())).peer
            self._send_commit(peer, found.get(True), found.get(False))
            self._enqueue(self.epoch, found.get(True), found.get(False))

    def _send_commit(self, peer: int, sent: PendingMessage | None, received: PendingMessage | None) -> None:
        keys = [(message is not None, *(_NO_KEY if message is None else message.key)) for message in (sent, received)]
        self._send_note(peer, COMMIT, _COMMIT.pack(self.epoch, *keys[0], *keys[1]))

    def _enqueue(self, epoch: int, sent: PendingMessage | None, received: PendingMessage | None) -> None:
        """Queue the messages of one commit."""
        messages = tuple(message for message in (sent, received) if message is not None)

        def run(stream: Any) -> None:
            for message in messages:
                message.started = time.time()
            if self.size == 2 and not self.group.duplex:
                out: Buffers = () if sent is None else sent.buffers
                into: Buffers = () if received is None else received.buffers
                self.group.swap(out, into, stream)
            elif sent is not None:
                self.group.send(sent.buffers, sent.peer, stream)
            elif received is not None:
                self.group.recv(received.buffers, received.peer, stream)

        link = self._links[messages[0].sending, messages[0].peer]
        self._workers[link].add(Task(run, epoch, messages))

    # Notes from other ranks

    def receive_note(self, sender: int, kind: int, note: bytes) -> None:
        """Handle a note from the scheduler of another rank."""
        with self.lock:
            if kind == OFFER:
                sending, channel, tag, count, epoch = _OFFER.unpack(note)
                link = self._links[not sending, sender]
                link.offers.append(Offer((channel, tag), count, epoch))
                self._announce_begun_gather()
            elif kind == COMMIT:
                self._receive_commit(sender, note)
            elif kind == EPOCH_BEGUN:
                sending, epoch = _EPOCH_BEGUN.unpack(note)
                self._links[not sending, sender].leader_epoch = epoch
            elif kind == EPOCH_ENTERED:
                (self._entered_epochs[sender],) = _EPOCH.unpack(note)
            elif kind == EPOCH_FINISHED:
                (self.finished_epochs[sender],) = _EPOCH.unpack(note)
            self.advance()

    def _receive_commit(self, leader: int, note: bytes) -> None:
        epoch, leader_sends, *sent_key, leader_receives, channel, tag = _COMMIT.unpack(note)
        sent = self._links[True, leader].take((channel, tag)) if leader_receives else None
        received = self._links[False, leader].take((sent_key[0], sent_key[1])) if leader_sends else None
        self._enqueue(epoch, sent, received)

    def _announce_begun_gather(self) -> None:
        """Notify followers that have offers from before the gather that this rank has begun it."""
        if self._gather_begun:
            for link in self._links.values():
                if link.leads and link.must_announce_epoch(self.epoch):
                    self._send_note(link.peer, EPOCH_BEGUN, _EPOCH_BEGUN.pack(link.sending, self.epoch))

    # Gathers

    def exchange(self, channel: int, payload: Buffers, wait: Wait) -> list[memoryview]:
        """Gather every rank's payload, in one gather, or two if a payload is longer than `all_gather.INLINE_BYTES`.

        Args:
            channel: The channel of the ring that gathers.
            payload: This rank's bytes.
            wait: Waits for a condition.
        """
        self.settle()
        with self._gather_lock:
            self._begin_gather()
            wait(self._drained)
            epoch = self.epoch
            data = b"".join(payload)
            task = Task(lambda stream: all_gather.gather(self.group, channel, epoch, data, stream), None)
            with self.lock:
                self._in_gather = True
                self._gather_worker.add(task)
            wait(lambda: task.done)
            self._end_gather()
        replies: list[memoryview] = task.result
        return replies

    def _begin_gather(self) -> None:
        with self.lock:
            self.epoch += 1
            self._gather_begun = True
            self._announce_begun_gather()

    def _end_gather(self) -> None:
        with self.lock:
            self._gather_begun = False
            self._in_gather = False
            self.advance()

    def _drained(self) -> bool:
        """Return whether all messages from before the gather that this rank has begun are done."""
        links = self._workers.items()
        return all(link.drained_before(self.epoch) and worker.drained_before(self.epoch) for link, worker in links)

    def _may_start(self, task: Task) -> bool:
        """Return whether `task` may start now. A message from after the gather waits for the gather's end."""
        return task.epoch is None or not self._gather_begun or task.epoch < self.epoch

    # Gathers in MLX's graph

    def exchange_in_graph(self, channel: int, payload: mx.array, wait: Wait) -> mx.array:
        """Gather a payload of at most `all_gather.INLINE_BYTES` as a node of MLX's graph.

        On the link it is the same gather as that of `exchange`, so one rank may call the one and another rank the
        other. See `all_gather.gather_in_graph` for the result.
        """
        with self._gather_lock:
            self._begin_gather()
            wait(self._drained)
            # The gather before it may not have run yet: the order on the link must be that of the calls.
            self._last_in_graph, replies = all_gather.gather_in_graph(
                self.group, channel, self.epoch, payload, self._last_in_graph
            )
            return replies

    @property
    def pending(self) -> bool:
        """Whether a gather in MLX's graph may still have to run."""
        return self._last_in_graph is not None

    def settle(self) -> None:
        """Evaluate all gathers in MLX's graph, so that anything else can move."""
        if self._last_in_graph is not None:
            self._in_gather = True
            mx.eval(self._last_in_graph)
            self._last_in_graph = None
            self._end_gather()

    # State for the checks of links

    def announce_epoch(self) -> None:
        """Notify all ranks of the last gather that this rank has entered."""
        self._notify_all(EPOCH_ENTERED, self.epoch - (self._gather_begun and not self._in_gather))

    def announce_finished_epoch(self) -> None:
        """Notify all ranks of the last gather that this rank has finished."""
        self._notify_all(EPOCH_FINISHED, self.epoch)

    def _notify_all(self, kind: int, epoch: int) -> None:
        for peer in range(self.size):
            if peer != self.rank:
                self._send_note(peer, kind, _EPOCH.pack(epoch))

    def moving(self, channel: int) -> list[PendingMessage]:
        """Return the messages of a ring that this rank is moving, which the other end has committed too."""
        with self.lock:
            tasks = [worker.current for worker in set(self._workers.values()) if worker.current is not None]
            return [message for task in tasks for message in task.messages if message.key[0] == channel]

    @property
    def gather_moving(self) -> int | None:
        """The gather that this rank is in, if all other ranks are in it or past it."""
        peers = (peer for peer in range(self.size) if peer != self.rank)
        all_entered = all(self._entered_epochs.get(peer, 0) >= self.epoch for peer in peers)
        return self.epoch if self._in_gather and all_entered else None

    # Waits

    def wait(self, condition: Callable[[], bool], check: Callable[[], None]) -> None:
        """Return when `condition` returns True. Meanwhile call `check`, which may raise, every `CHECK_INTERVAL`."""
        while True:
            with self.lock:
                if self.changed.wait_for(condition, CHECK_INTERVAL):
                    return
            check()

    def fail(self, error: BaseException) -> None:
        """Report `error`, after which nothing more can move."""
        self.on_error(error)
        with self.lock:
            self.changed.notify_all()

    def message_peers(self, channel: int) -> set[int]:
        """Return the ranks at the other ends of a ring's messages that are ready here and not committed."""
        with self.lock:
            return {message.peer for link in self._workers for message in link.ready if message.key[0] == channel}

    def gather_peers(self) -> set[int]:
        """Return the ranks that the present gather may still need."""
        finished = self.finished_epochs
        return {peer for peer in range(self.size) if peer != self.rank and finished.get(peer, 0) < self.epoch}
