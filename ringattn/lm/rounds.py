"""The rounds in which the ranks read a prompt: how many, for a given prompt and given memory.

In a round each rank computes a chunk of the prompt, and the keys of all earlier rounds are sent again. With fewer and
longer rounds the ranks send fewer bytes, but a round needs more memory, takes longer until it can be stopped, and its
first rank holds more of the keys: the first tokens of a causal prompt cost less, so its chunk is longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from ..transport.consensus import agree, raise_on_all_ranks
from ..transport.interface import Transport
from .host_memory import memory_of_rank
from .sharding.partition import LEAST, Cost, round_layout

WHAT = "the rounds of a prompt"
SHORTEST = 512  # tokens of a rank in a round; where these do not fit in memory, the prompt is refused
ALONE = 2048  # tokens of a round on one rank, which sends nothing: mlx-lm's
UNEVEN = 1.1  # the most that a rank holds of the context, times its share
ROOM = 2  # chunks for which there must be memory: a round takes half of what the context leaves
OPERATIONS = {False: 2e12, True: 4e14}  # of a rank in a round, on a CPU and on a GPU: about 20 s

Fits = Callable[[Sequence[int], Sequence[int]], bool]  # (tokens held, tokens of the longest chunk) of each rank


def count_rounds(start: int, tokens: int, weights: Sequence[float], cost: Cost, operations: float, fits: Fits) -> int:
    """The smallest number of rounds that leaves enough memory, divides the context evenly, and has no long round.

    Args:
        start: Tokens of context before the prompt.
        tokens: Tokens of the prompt.
        weights: The ranks' speeds.
        cost: Operations of all layers on a token.
        operations: The most operations of a rank in a round.
        fits: Function that says whether the memory is enough.
    """
    size = len(weights)
    most = max(1, -(-tokens // (SHORTEST * size)))
    work = tokens * (cost.linear + cost.attention * (start + tokens / 2)) / size
    least = max(1, int(work / operations), -(-tokens // ALONE) if size == 1 else 1)
    for count in _growing(least, most - 1):  # where the shortest rounds do not fit, the prompt is refused
        held, chunks = divide(start, tokens, weights, cost, count)
        if _even(held, weights) and fits(held, chunks):
            return count
    return most


def divide(start: int, tokens: int, weights: Sequence[float], cost: Cost, count: int) -> tuple[list[int], list[int]]:
    """Tokens that each rank holds after `count` rounds, and the tokens of its longest chunk."""
    total = sum(weights)
    held = [int(start * weight / total) for weight in weights]
    chunks = [0] * len(weights)
    step = -(-tokens // count)
    for done in range(0, tokens, step):
        new = min(step, tokens - done)
        if new < LEAST * len(weights):
            continue  # every rank computes them, and one holds them
        layout = round_layout(start + done, new, tuple(weights), cost)
        lengths = [layout.local_length(rank) for rank in range(layout.size)]
        held = [a + b for a, b in zip(held, lengths)]
        chunks = [max(a, b) for a, b in zip(chunks, lengths)]
    return held, chunks


def agree_on_round(model: Any, everyone: Transport, start: int, tokens: int) -> int:
    """Tokens of a round of all ranks, for a prompt of `tokens` after `start` others. Collective.

    Args:
        model: A sharded model.
        everyone: All ranks.
        start: Tokens of context before the prompt.
        tokens: Tokens of the prompt.
    """
    with raise_on_all_ranks(everyone, WHAT):
        own = _own_rounds(model, memory_of_rank(everyone), start, tokens)
    with everyone.call(WHAT):
        replies = agree(everyone, WHAT, payload=[memoryview(own.to_bytes(8, "little"))])
    return -(-tokens // max(int.from_bytes(reply, "little") for reply in replies))


def _own_rounds(model: Any, available: int, start: int, tokens: int) -> int:
    """`count_rounds` of a sharded model for the memory of this rank."""
    rank = model.ring.rank
    context = start + tokens
    layers = len(model.layers)
    cost = Cost(model.cost.linear * layers, model.cost.attention * layers)
    gpu = mx.default_device().type == mx.DeviceType.gpu

    def fits(held: Sequence[int], chunks: Sequence[int]) -> bool:
        return model.footprint.needed(context, held[rank] / context, ROOM * chunks[rank]) <= available

    return count_rounds(start, tokens, model.weights, cost, OPERATIONS[gpu], fits)


def _growing(first: int, last: int) -> Iterator[int]:
    count = first
    while count <= last:
        yield count
        count += 1 + count // 4


def _even(held: Sequence[int], weights: Sequence[float]) -> bool:
    shares = [weight * sum(held) / sum(weights) for weight in weights]
    return all(own <= UNEVEN * share + LEAST for own, share in zip(held, shares))
