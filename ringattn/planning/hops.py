"""Time of the hops of one call of ring attention, by the loop of `ringattn.ring`: transfers beside computation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..ring.schedule import HALVED_BYTES, Sizes
from .demand import Demand
from .links import Link

MESSAGE = 5e-6  # s of each further message of a round in which all ranks send to all; an assumption


@dataclass(frozen=True)
class Ring:
    """Rates of the ranks of a ring, in their order.

    Attributes:
        attention: Operations per second of each rank's attention.
        call: Seconds of a call of the kernel beside its operations.
        cut: Seconds of a query token on the mask's edge beside its visible pairs: tiles are computed whole there.
        links: Link of each rank to its right neighbour.
    """

    attention: np.ndarray
    call: float
    links: tuple[Link, ...]
    cut: float = 0.0

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.attention)

    def exchange(self, payload: int = 0) -> float:
        """Seconds of a round in which every rank sends `payload` bytes to every other one."""
        if self.size == 1:
            return 0.0
        slowest = max(self.links, key=lambda link: link.latency)
        sent = (self.size - 1) * (payload + 64)
        bandwidth = min(link.bandwidth for link in self.links)
        return slowest.latency + (self.size - 2) * MESSAGE + sent / bandwidth


class Timing(NamedTuple):
    """Seconds of each rank in a call.

    Attributes:
        finish: From the start to the end of the call.
        compute: Of these, in kernels.
        transfer: Of its receives, if they came one after the other.
    """

    finish: np.ndarray
    compute: np.ndarray
    transfer: np.ndarray


def call_timing(ring: Ring, demand: Demand, sizes: Sizes, pair_flops: float) -> Timing:
    """Follow the blocks, and the results one hop behind them, around the ring.

    A rank sends a block on when it has arrived and its link is free. It computes when the block has arrived and the
    hop before is done. Blocks that travel both ways around use both links, each for half of the bytes.
    """
    size = ring.size
    ranks = np.arange(size)
    both_ways = size > 2 and demand.blocks.max(initial=0) * sizes.block >= HALVED_BYTES
    ways = np.array([2.0 if link.duplex and both_ways else 1.0 for link in ring.links])
    per_byte = 1 / (np.array([link.bandwidth for link in ring.links]) * ways)
    latency = np.array([link.latency for link in ring.links])
    work = np.array([link.work for link in ring.links])
    flops = demand.pairs * pair_flops / ring.attention[:, None]
    kernel = flops + ring.call * (demand.pairs > 0)
    kernel[ranks, ranks] += ring.cut * demand.cut
    done = kernel[ranks, ranks]
    compute = done.copy()
    arrived = np.zeros(size)
    returned = np.zeros(size)
    free = np.zeros(size)  # time from which the link to the right is free
    transfer = np.zeros(size)
    for h in range(1, size):
        source = (ranks - h) % size
        moved = np.roll(demand.blocks[source, h] * sizes.block, -1)  # by the link of each rank
        sent = _sent(moved, arrived, free, per_byte, latency)
        arrived = np.roll(sent, 1)
        transfer += np.roll(moved * per_byte, 1)
        own = kernel[ranks, source]
        done = np.where(own > 0, np.maximum(done, arrived), done) + own
        compute += own
        back = demand.results[source, h] * sizes.result
        returned = np.roll(_sent(back, np.maximum(done, returned), free, per_byte, latency), 1)
        transfer += np.roll(back * per_byte, 1)
        handled = work * (moved + np.roll(moved, 1) + back + np.roll(back, 1))
        done = done + handled
        compute += handled
    return Timing(np.maximum(done, returned), compute, transfer)


def _sent(
    moved: np.ndarray, ready: np.ndarray, free: np.ndarray, per_byte: np.ndarray, latency: np.ndarray
) -> np.ndarray:
    """Times at which `moved` bytes, ready at some time, arrive at the right neighbours. `free` is updated."""
    end = np.maximum(ready, free) + moved * per_byte
    free[:] = np.where(moved > 0, end, free)
    return np.where(moved > 0, end + latency, 0.0)
