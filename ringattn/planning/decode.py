"""Time of a new token: weights and keys are read once, and the ranks exchange states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..lm.sharding.partition import LEAST_HEAD
from .hops import Ring
from .links import Link
from .machines import Machine
from .prefill import sum_seconds
from .shape import ModelShape

LOGIT = 4  # bytes


def token_on_ring(
    shape: ModelShape,
    rows: Sequence[Machine],
    ring: Ring,
    tokens: int,
    weights: Sequence[float],
    tensor: int = 1,
    row_link: Link | None = None,
    gpu: bool = True,
) -> float:
    """Seconds of one new token after `tokens` of context; the arguments are those of `prefill.read_on_ring`.

    Each rank reads its weights and its keys; in each attending layer all states go to all ranks of the ring. Without a
    `gpu`, each rank reads a part of a large output layer, and its logits go to all ranks.
    """
    part = shape.part(tensor)
    exchanges = sum(kind.count * ring.exchange(kind.query.result) for kind in part.attending)
    if not gpu and ring.size > 1 and shape.head >= LEAST_HEAD:
        logits = LOGIT * shape.head / shape.hidden
        part = replace(part, head=part.head // ring.size)
        exchanges += ring.exchange(int(logits / ring.size))
    total = sum(weights)
    slowest = max(_read(part, machine, tokens * weight / total) for machine, weight in zip(rows, weights))
    sums = 2 * shape.depth * sum_seconds(row_link, tensor, shape.hidden) if tensor > 1 and row_link else 0.0
    return slowest + exchanges + sums


def token_through_pipeline(
    shape: ModelShape, stages: Sequence[Machine], links: Sequence[Link], tokens: int, shares: Sequence[float]
) -> float:
    """Seconds of one new token, which passes the stages one after the other and returns to the first."""
    own = sum(share * _read(shape, machine, tokens) for machine, share in zip(stages, shares))
    hops = sum(link.latency + shape.hidden / link.bandwidth for link in links[: len(stages) - 1])
    return own + hops + links[-1].latency


def _read(shape: ModelShape, machine: Machine, tokens: float) -> float:
    """Seconds of all layers of a token, which read the weights and the keys of so many tokens."""
    keys = sum(
        kind.count * kind.key * (tokens if kind.window is None else min(tokens, kind.window))
        for kind in shape.attending
    )
    weights = (shape.read + shape.head + shape.states) / machine.bandwidth
    return weights + keys / (machine.keys or machine.bandwidth) + shape.depth * machine.step
