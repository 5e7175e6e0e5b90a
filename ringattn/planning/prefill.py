"""Time to read a prompt: over a ring, over a row that divides the weights, or through a pipeline of layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.intervals import Spans
from ..core.masks import Band
from ..layout import Layout
from ..lm.sharding.partition import LEAST, round_layout
from ..ring.schedule import Sizes
from .demand import choose
from .hops import Ring, Timing, call_timing
from .links import Link
from .machines import Machine
from .shape import Attending, ModelShape

SAMPLES = 64  # of the rounds of a prompt


def ring_of(rows: Sequence[Machine], links: Sequence[Link]) -> Ring:
    """The ring of these machines."""
    rates = np.array([m.attention for m in rows])
    return Ring(rates, max(m.call for m in rows), tuple(links), max(m.cut for m in rows))


@dataclass
class Reading:
    """Result of reading a prompt.

    Attributes:
        seconds: Time.
        transfer: Seconds of transfers on the rank that has most of them, if nothing else ran.
        exposed: Of these, seconds in which the rank waited.
        sent: Bytes that all ranks together sent.
        strategy: Strategy of the last round.
    """

    seconds: float = 0.0
    transfer: float = 0.0
    exposed: float = 0.0
    sent: float = 0.0
    strategy: str = "none"

    def add(self, other: Reading, times: int) -> None:
        """Add what takes `times` as long as `other`."""
        self.seconds += times * other.seconds
        self.transfer += times * other.transfer
        self.exposed += times * other.exposed
        self.sent += times * other.sent
        self.strategy = other.strategy if other.strategy != "none" else self.strategy

    @property
    def hidden(self) -> float:
        """Share of the transfers that computation hides; 1 where there are none."""
        return max(0.0, 1 - self.exposed / self.transfer) if self.transfer > 0 else 1.0


def read_on_ring(
    shape: ModelShape,
    rows: Sequence[Machine],
    links: Sequence[Link],
    tokens: int,
    step: int,
    weights: Sequence[float],
    tensor: int = 1,
    row_link: Link | None = None,
) -> Reading:
    """Time of rounds in which each row of ranks computes a chunk.

    Args:
        shape: The model, whole.
        rows: The slowest machine of each row.
        links: Link from each row to the next one.
        tokens: Tokens of the prompt.
        step: Tokens of all rows in one round.
        weights: Speed of each row.
        tensor: Ranks in a row.
        row_link: Link within a row.
    """
    part = shape.part(tensor)
    ring = ring_of(rows, links)
    found = Reading()
    for start, new, times in _samples(tokens, step):
        one = Reading()
        if new < LEAST * ring.size:
            one.seconds = _few(part, rows, ring, start, new)
        else:
            _round(part, rows, ring, one, (start, new), weights)
        if tensor > 1 and row_link is not None:
            _sum(one, shape, row_link, tensor, ring.size, new)
        found.add(one, times)
    return found


def _samples(tokens: int, step: int) -> Iterator[tuple[int, int, int]]:
    """Rounds to compute as (start, tokens, times): of many equal rounds, the middle one of each run stands for all.

    The time of a round grows by the same amount from each round to the next.
    """
    whole = tokens // step
    run = -(-whole // SAMPLES) or 1
    for first in range(0, whole, run):
        count = min(run, whole - first)
        yield int(step * (first + (count - 1) / 2)), step, count
    if tokens % step:
        yield whole * step, tokens % step, 1


def attend_on_ring(shape: ModelShape, rows: Sequence[Machine], links: Sequence[Link], layout: Layout) -> Reading:
    """Time of causal attention to a whole sequence in the attending layers, without a model around it."""
    ring = ring_of(rows, links)
    found = Reading()
    for kind in shape.attending:
        spans = list(layout.spans)
        sizes = Sizes(kind.key), kind.query
        strategy, demand = choose(spans, spans, Band.of(True, kind.window), *sizes)
        moved = sizes[strategy == "pass_q"]
        _add(found, kind.count, call_timing(ring, demand, moved, kind.pair_flops), ring.exchange())
        found.sent += kind.count * demand.bytes(moved)
        found.strategy = strategy
    return found


def _add(found: Reading, count: int, timing: Timing, others: float | np.ndarray) -> None:
    """Add the layers of one kind; `others` are the seconds of each rank beside attention."""
    found.seconds += count * float((timing.finish + others).max())
    most = int(np.argmax(timing.transfer))
    found.transfer += count * float(timing.transfer[most])
    waited = timing.finish[most] - timing.compute[most]
    found.exposed += count * float(min(waited, timing.transfer[most]))


def _round(
    part: ModelShape,
    rows: Sequence[Machine],
    ring: Ring,
    found: Reading,
    tokens: tuple[int, int],
    weights: Sequence[float],
) -> None:
    """Add a round of prefill after so many tokens, of so many new ones."""
    start, new = tokens
    layout = round_layout(start, new, tuple(weights), part.cost)
    lengths = np.array([layout.local_length(rank) for rank in range(ring.size)])
    linear = part.prompt_linear / part.depth * lengths / np.array([m.flops for m in rows])
    linear = linear + np.array([m.pack(part.read / part.depth) for m in rows])
    attended = 0
    for kind in part.prompt_attending:
        timing, strategy, sent = _attention(kind, ring, layout, start)
        _add(found, kind.count, timing, linear + ring.exchange())
        found.sent += kind.count * sent
        found.strategy = strategy
        attended += kind.count
    found.seconds += max(0, part.depth - attended) * (float(linear.max()) + ring.exchange())


def _attention(kind: Attending, ring: Ring, layout: Layout, start: int) -> tuple[Timing, str, int]:
    """Timing, strategy and bytes of one layer's attention in a round."""
    keys = _held(layout, start, kind.window)
    sizes = Sizes(kind.key), kind.query
    strategy, demand = choose(list(layout.spans), keys, Band.of(True, kind.window), *sizes)
    moved = sizes[strategy == "pass_q"]
    return call_timing(ring, demand, moved, kind.pair_flops), strategy, demand.bytes(moved)


def _held(layout: Layout, start: int, window: int | None) -> list[Spans]:
    """Keys of each rank after a round: equal parts of what was held before, and its chunk.

    Which rank holds which of the earlier tokens makes no difference: all new tokens see them. Layers with a window hold
    what it reaches; the parts are then those of the round before, which had the same lengths.
    """
    size = layout.size
    first = 0 if window is None else max(0, start - window + 1)
    cuts = [first + (start - first) * rank // size for rank in range(size + 1)]
    before = [((a, b),) if a < b else () for a, b in zip(cuts, cuts[1:])]
    return [old + new for old, new in zip(before, layout.spans)]


def _few(part: ModelShape, rows: Sequence[Machine], ring: Ring, held: int, new: int) -> float:
    """Seconds of a round with too few tokens to share: every rank computes all of them, as for new tokens."""
    slowest = min(rows, key=lambda machine: machine.flops)
    pairs = sum(kind.count * kind.pair_flops for kind in part.prompt_attending) * new * (held / ring.size + new)
    fixed = part.depth * ring.exchange() + slowest.pack(part.read)
    return part.prompt_linear * new / slowest.flops + pairs / slowest.attention + fixed


def _sum(found: Reading, shape: ModelShape, link: Link, tensor: int, rows: int, new: int) -> None:
    """Add the sums of a round over all rows, which nothing hides."""
    sums = 2 * (shape.depth - 1)  # none in the last layer; see `ModelShape.prompt_linear`
    seconds = sums * sum_seconds(link, tensor, shape.hidden * -(-new // rows))
    found.seconds += seconds
    found.transfer += seconds
    found.exposed += seconds
    found.sent += sums * 2 * (tensor - 1) * shape.hidden * new


def sum_seconds(link: Link, ranks: int, count: int) -> float:
    """Seconds of a sum of `count` bytes over a row: each part travels almost twice around (ring all-reduce)."""
    sent = 2 * (ranks - 1) / ranks * count
    return 2 * (ranks - 1) * link.latency + sent / link.bandwidth + 2 * link.work * sent


def read_through_pipeline(
    shape: ModelShape,
    stages: Sequence[Machine],
    links: Sequence[Link],
    tokens: int,
    chunk: int,
    shares: Sequence[float],
) -> Reading:
    """Time of chunks that stream through stages of layers, each on one machine, as in exo's pipelined prefill.

    Stage s works on a chunk when it has arrived and the chunk before is done. ``shares[s]`` is its part of the layers.
    """
    found = Reading()
    done = np.zeros(len(stages))
    for start in range(0, tokens, chunk):
        new = min(chunk, tokens - start)
        arrived = 0.0
        for s, machine in enumerate(stages):
            own = shares[s] * _alone(shape, machine, start, new)
            if s + 1 == len(stages):
                own -= _alone(shape, machine, start, new) - _alone(shape, machine, start, new, as_prompt=True)
            done[s] = max(done[s], arrived) + own
            if s + 1 < len(stages):
                arrived = done[s] + links[s].latency + new * shape.hidden / links[s].bandwidth
                found.sent += new * shape.hidden
    found.seconds = float(done[-1])
    slowest = min(links[: len(stages) - 1], key=lambda link: link.bandwidth, default=None)
    if slowest is not None:  # the last chunk's way through the stages is exposed
        found.transfer = slowest.latency * -(-tokens // chunk) + tokens * shape.hidden / slowest.bandwidth
        found.exposed = min(found.transfer, slowest.latency + min(chunk, tokens) * shape.hidden / slowest.bandwidth)
    found.strategy = "pipeline"
    return found


def _alone(shape: ModelShape, machine: Machine, start: int, new: int, as_prompt: bool = False) -> float:
    """Seconds of all layers for a chunk on one machine; `as_prompt`: without what a prompt does not need."""
    linear = shape.prompt_linear if as_prompt else shape.linear
    attending = shape.prompt_attending if as_prompt else shape.attending
    pairs = 0.0
    for kind in attending:
        before = start if kind.window is None else min(start, kind.window)
        own = new * (new + 1) / 2 if kind.window is None else new * min(new, kind.window) / 2
        pairs += kind.count * kind.pair_flops * (new * before + own)
    calls = (machine.call + machine.cut * new) * sum(kind.count for kind in attending)
    return linear * new / machine.flops + pairs / machine.attention + calls + machine.pack(shape.read)
