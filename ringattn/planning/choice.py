"""Predictions for all arrangements of a cluster, and the best of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..layout import Layout
from ..lm.rounds import OPERATIONS, ROOM, SHORTEST, count_rounds
from ..lm.sharding.partition import Cost
from .decode import token_on_ring, token_through_pipeline
from .links import Link
from .machines import Machine
from .nested import read_on_rings
from .prediction import Arrangement, Prediction, divisors
from .prefill import Reading, attend_on_ring, read_on_ring, read_through_pipeline, ring_of
from .shape import ModelShape

CHUNKS = 4  # of a pipeline's prompt for each stage


@dataclass(frozen=True)
class Cluster:
    """Machines in the order of the ring, and their links.

    Attributes:
        machines: The machines.
        link: Link between neighbours.
        island: Machines in a group of neighbours that `link` joins; 0: all.
        outer: Link between groups.
        row: Link of sums over a row; ``None``: `link`.
    """

    machines: tuple[Machine, ...]
    link: Link
    island: int = 0
    outer: Link | None = None
    row: Link | None = None

    @property
    def size(self) -> int:
        """Number of machines."""
        return len(self.machines)

    def links(self, stride: int = 1) -> tuple[Link, ...]:
        """Link of every `stride`-th machine to the next one of them, around the ring."""
        if not self.island or self.outer is None:
            return (self.link,) * (self.size // stride)
        firsts = range(0, self.size, stride)
        ends = [(first, (first + stride) % self.size) for first in firsts]
        return tuple(self.link if a // self.island == b // self.island else self.outer for a, b in ends)

    def first(self, count: int) -> Cluster:
        """The first `count` machines."""
        return replace(self, machines=self.machines[:count])


@dataclass(frozen=True)
class Job:
    """A prompt and an answer.

    Attributes:
        context: Tokens of the prompt.
        answer: Tokens of the answer.
        chunk: Tokens that a rank computes in a round of prefill; ``None``: as many as `lm.rounds` gives it.
        pipeline_chunk: The most tokens of a chunk in a pipeline; mlx-lm's 2,048.
        gpu: Whether the ranks compute on GPUs, whose rounds may have more work.
    """

    context: int
    answer: int = 256
    chunk: int | None = None
    pipeline_chunk: int = 2048
    gpu: bool = True


def best(found: Sequence[Prediction], answer: int) -> Prediction | None:
    """The fastest prediction that fits; ``None`` where none fits."""
    return min((one for one in found if one.fits), key=lambda one: one.seconds(answer), default=None)


def predictions(shape: ModelShape, cluster: Cluster, job: Job) -> list[Prediction]:
    """Predictions of all arrangements that use all machines, the fastest first."""
    found = [_predict(shape, cluster, job, one) for one in arrangements(shape, cluster)]
    return sorted(found, key=lambda one: (not one.fits, one.seconds(job.answer)))


def arrangements(shape: ModelShape, cluster: Cluster) -> Iterator[Arrangement]:
    """Arrangements of all machines of a cluster.

    A row stays within an island. Attention alone has no weights to divide, and no layers to put in stages.
    """
    size = cluster.size
    rows = cluster.island or size
    for tensor in shape.tensor_sizes(size):
        if rows % tensor == 0:
            yield Arrangement(ring=size // tensor, tensor=tensor)
    if 1 < size <= shape.depth and not shape.is_attention_only:
        yield Arrangement(stages=size)
    groups = [size // cluster.island] if cluster.island else [n for n in divisors(size) if 1 < n < size and size > 8]
    for count in groups:
        if 1 < count < size:
            yield Arrangement(ring=size // count, groups=count)


def _predict(shape: ModelShape, cluster: Cluster, job: Job, arrangement: Arrangement) -> Prediction:
    if arrangement.kind == "pipeline":
        return _pipeline(shape, cluster, job, arrangement)
    tensor = arrangement.tensor
    rows = [_slowest(cluster.machines[i : i + tensor]) for i in range(0, cluster.size, tensor)]
    return min(
        (_on_ring(shape, cluster, job, arrangement, rows, weights) for weights in _divisions(shape, job, rows, tensor)),
        key=lambda one: (not one.fits, one.seconds(job.answer)),
    )


def _divisions(shape: ModelShape, job: Job, rows: Sequence[Machine], tensor: int) -> list[tuple[float, ...]]:
    """Weights of the rows to compare: by speed, and by the memory that the weights of the model leave."""
    if len({(row.flops, row.attention, row.memory) for row in rows}) == 1:
        return [(1.0,) * len(rows)]
    part = shape.part(tensor)
    cost = part.cost
    mean = job.context / 2
    speeds = [1 / (cost.linear / row.flops + cost.attention * mean / row.attention) for row in rows]
    fixed = part.footprint().needed(0)
    rooms = [max(row.memory - fixed, 1.0) for row in rows]
    return [_scaled(speeds), _scaled(rooms)]


def _scaled(values: Sequence[float]) -> tuple[float, ...]:
    """Values divided by their mean, with two decimals, as a user would give them to ``--weights``."""
    mean = sum(values) / len(values)
    return tuple(max(0.01, round(value / mean, 2)) for value in values)


def _on_ring(
    shape: ModelShape,
    cluster: Cluster,
    job: Job,
    arrangement: Arrangement,
    rows: Sequence[Machine],
    weights: tuple[float, ...],
) -> Prediction:
    tensor = arrangement.tensor
    row_link = cluster.row or cluster.link
    links = cluster.links(tensor)
    step = round_tokens(shape.part(tensor), job, rows, weights)
    reading: Reading
    if shape.is_attention_only and arrangement.groups == 1:
        layout = Layout.zigzag(job.context, len(rows)) if len(set(weights)) == 1 else None
        layout = layout or Layout.weighted(job.context, list(weights))
        reading = attend_on_ring(shape, rows, links, layout)
    elif arrangement.groups > 1:
        outer = cluster.outer or cluster.link
        reading = read_on_rings(shape, rows, (cluster.link, outer), arrangement, job.context, step)
    else:
        reading = read_on_ring(shape, rows, links, job.context, step, weights, tensor, row_link)
    token = token_on_ring(shape, rows, ring_of(rows, links), job.context, weights, tensor, row_link, job.gpu)
    footprint = shape.part(tensor).footprint()
    total = sum(weights)
    needs = []
    for row, weight in zip(rows, weights):
        share = weight / total
        chunk = min(int((job.chunk or SHORTEST) * share * len(rows)), job.context)
        needed = footprint.needed(job.context, share, chunk)
        needs.append((row.memory - needed, needed, row.memory, footprint.longest(int(row.memory), share, chunk)))
    _, memory, available, _ = min(needs)
    longest = min(one[3] for one in needs)
    first = reading.seconds + (0.0 if shape.is_attention_only else token)
    sent = reading.sent / job.context
    return Prediction(
        arrangement, memory, available, longest, first, token, reading.hidden, sent, reading.strategy, weights
    )


def round_tokens(part: ModelShape, job: Job, rows: Sequence[Machine], weights: Sequence[float]) -> int:
    """Tokens that all rows together compute in a round; `part` is the model of one rank of a row.

    Attention alone has no rounds.
    """
    if part.is_attention_only:
        return job.context
    if job.chunk is not None:
        return job.chunk * len(rows)
    cost = Cost(part.cost.linear * part.depth, part.cost.attention * part.depth)
    footprint = part.footprint()

    def fits(held: Sequence[int], chunks: Sequence[int]) -> bool:
        needs = (footprint.needed(job.context, own / job.context, ROOM * chunk) for own, chunk in zip(held, chunks))
        return all(need <= row.memory for need, row in zip(needs, rows))

    return -(-job.context // count_rounds(0, job.context, weights, cost, OPERATIONS[job.gpu], fits))


def pipeline_chunk(job: Job, stages: int) -> int:
    """Tokens of a chunk in a pipeline: short enough that all stages work for most of the time."""
    return max(SHORTEST, min(job.pipeline_chunk, job.context // (CHUNKS * stages)))


def _pipeline(shape: ModelShape, cluster: Cluster, job: Job, arrangement: Arrangement) -> Prediction:
    """A stage of layers on each machine, in proportion to their speeds."""
    machines = cluster.machines
    speeds = [machine.flops for machine in machines]
    shares = _layers(shape.depth, speeds)
    links = cluster.links()
    chunk = pipeline_chunk(job, len(machines))
    reading = read_through_pipeline(shape, machines, links, job.context, chunk, shares)
    token = token_through_pipeline(shape, machines, links, job.context, shares)
    chunk = min(chunk, job.context)
    footprints = [shape.footprint(share) for share in shares]
    needs = [
        (machine.memory - one.needed(job.context, 1.0, chunk), one.needed(job.context, 1.0, chunk), machine.memory)
        for machine, one in zip(machines, footprints)
    ]
    longest = min(one.longest(int(machine.memory), 1.0, chunk) for machine, one in zip(machines, footprints))
    _, memory, available = min(needs)
    sent = reading.sent / job.context
    return Prediction(
        arrangement, memory, available, longest, reading.seconds + token, token, reading.hidden, sent, "none", shares
    )


def _layers(depth: int, speeds: Sequence[float]) -> tuple[float, ...]:
    """Parts of the layers of each stage, whole layers and at least one, in proportion to the speeds."""
    total = sum(speeds)
    counts = [max(1, int(depth * speed / total)) for speed in speeds]
    while sum(counts) > depth:
        counts[int(np.argmax(counts))] -= 1
    while sum(counts) < depth:
        counts[int(np.argmin([count / speed for count, speed in zip(counts, speeds)]))] += 1
    return tuple(count / depth for count in counts)


def _slowest(row: Sequence[Machine]) -> Machine:
    """A machine with the smallest rates and memory of a row."""
    first = row[0]
    return replace(
        first,
        flops=min(m.flops for m in row),
        attention=min(m.attention for m in row),
        bandwidth=min(m.bandwidth for m in row),
        memory=min(m.memory for m in row),
    )
