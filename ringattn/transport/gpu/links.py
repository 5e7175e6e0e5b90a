"""Messages between the GPUs of neighbours, in rounds that all ranks do in the same order.

NCCL has no tags: the two ends of a link must post their messages in the same order, and a message waits on the GPU for
its other end. So the messages of one tag are a round. A rank starts a round when all its messages in it can start, and
the rounds one after the other, by `order`. Then no rank waits for a later round of another, and no circle can arise.

All methods belong to the main thread, but `oldest_with`, `moving` and `abort`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...tracing.spans import RESULTS
from ..failures.bandwidth import LinkRate
from ..failures.stall_timer import Moving
from ..interface import DeviceBuffer, GpuMemory, Links, Load, Signal, Transfer
from .nccl import Piece


class Network(Protocol):
    """Groups of messages between GPUs. `nccl.Communicator` is one."""

    @property
    def gpu(self) -> GpuMemory:
        """The GPU of this rank."""

    def start(self, sends: Sequence[Piece], receives: Sequence[Piece]) -> Any:
        """Start a group of messages, after all earlier groups. Return a token for `over`."""

    def over(self, token: Any) -> bool:
        """Return whether the messages of a group have left and arrived."""

    def check(self) -> None:
        """Raise if a message failed."""

    def abort(self) -> None:
        """End all messages that are under way."""


class DeviceMessage(Transfer):
    """A message between GPUs: waiting, then started with its round, then done."""

    def __init__(self, kind: str, peer: int, tag: int, load: Load, after: Sequence[Transfer | Signal], late: bool):
        self.kind = kind
        self.peer = peer
        self.tag = tag
        self.started = 0.0
        self.bytes = 0
        self._load: Load | None = load
        self._buffers: Sequence[DeviceBuffer] = []
        self._after = list(after)
        self._late = late
        self._done = False

    @property
    def done(self) -> bool:
        return self._done

    @property
    def ready(self) -> bool:
        """Whether it can start: rounds follow each other on the GPU, so what it waits for need only have started."""
        self._after = [one for one in self._after if not self._passed(one)]
        return not self._after

    def _passed(self, one: Transfer | Signal) -> bool:
        return one.done or (not self._late and isinstance(one, DeviceMessage) and one.started > 0)

    def start(self) -> list[Piece]:
        assert self._load is not None
        self._buffers = self._load()  # keeps their arrays alive
        self._load = None
        pieces = [Piece(self.peer, buffer.address, buffer.nbytes) for buffer in self._buffers if buffer.nbytes]
        self.started = time.time()
        self.bytes = sum(piece.nbytes for piece in pieces)
        return pieces

    def finish(self) -> None:
        self._done = True
        self._buffers = []


@dataclass
class _Round:
    token: Any
    messages: list[DeviceMessage] = field(default_factory=list)


class DeviceLinks(Links):
    """Messages of a ring between its GPUs.

    Args:
        rank: This rank.
        size: The number of ranks.
        network: Moves the bytes.
        on_done: Called with every message that has left or arrived.
    """

    def __init__(self, rank: int, size: int, network: Network, on_done: Callable[[DeviceMessage], None]):
        self._rank = rank
        self._size = size
        self._network = network
        self._on_done = on_done
        self._waiting: list[DeviceMessage] = []
        self._rounds: list[_Round] = []
        self._broken = False
        self.rate = LinkRate()

    def send(
        self, load: Load, *, tag: int, after: Sequence[Transfer | Signal] = (), step: int = 1, late: bool = False
    ) -> Transfer:
        """See `Links.send`."""
        return self._add(DeviceMessage("send", (self._rank + step) % self._size, tag, load, after, late))

    def recv(self, load: Load, *, tag: int, after: Sequence[Transfer | Signal] = (), step: int = 1) -> Transfer:
        """See `Links.recv`."""
        return self._add(DeviceMessage("recv", (self._rank - step) % self._size, tag, load, after, False))

    def _add(self, message: DeviceMessage) -> DeviceMessage:
        self._waiting.append(message)
        return message

    @property
    def gpu(self) -> GpuMemory:
        """See `Links.gpu`."""
        return self._network.gpu

    def advance(self) -> None:
        """Finish and start rounds. Post a call's first messages of all ranks' rounds before the first call of this."""
        if self._broken:
            return
        while self._rounds and self._network.over(self._rounds[0].token):
            self._finish(self._rounds.pop(0))
        while self._waiting and not self._broken:
            first = min(map(order, self._waiting))
            messages = [message for message in self._waiting if order(message) == first]
            if not all(message.ready for message in messages):
                break
            self._start(messages)
        self._network.check()

    def _start(self, messages: list[DeviceMessage]) -> None:
        pieces: dict[str, list[Piece]] = {"send": [], "recv": []}
        for message in messages:
            pieces[message.kind] += message.start()
            self._waiting.remove(message)
        token = self._network.start(pieces["send"], pieces["recv"])
        self._rounds.append(_Round(token, messages))

    def _finish(self, round_: _Round) -> None:
        for message in round_.messages:
            message.finish()
            self.rate.learn(message.bytes, time.time() - message.started)
            self._on_done(message)

    def forget(self) -> None:
        """See `Links.forget`."""
        self._waiting.clear()

    @property
    def peers(self) -> set[int]:
        """The ranks at the other ends of messages that have started, or wait."""
        started = [message for round_ in list(self._rounds) for message in round_.messages]
        return {message.peer for message in [*started, *self._waiting]}

    def oldest_with(self, peer: int) -> list[list]:
        """The messages between this rank and `peer` in the oldest round, in the form that `moving` reads there."""
        return [["gpu " + message.kind, message.tag] for message in self._oldest() if message.peer == peer]

    def moving(self, reports: Mapping[int, list[list]]) -> list[Moving]:
        """The messages that are in the oldest round at both ends, according to the other ranks' `reports`."""
        other_end = {"send": "gpu recv", "recv": "gpu send"}
        return [
            Moving(message, message.kind == "send", message.peer, message.bytes)
            for message in self._oldest()
            if [other_end[message.kind], message.tag] in reports.get(message.peer, ())
        ]

    def _oldest(self) -> list[DeviceMessage]:
        """The messages that are moving. A later round waits, perhaps for a rank that computes."""
        rounds = self._rounds[:1]
        return rounds[0].messages if rounds else []

    def abort(self) -> None:
        """End all messages. None moves afterwards."""
        if not self._broken:
            self._broken = True
            self._network.abort()


def order(message: DeviceMessage) -> tuple[int, int]:
    """The place of a message's round: hop by hop, a block before the results of its hop."""
    return message.tag % RESULTS, message.tag // RESULTS
