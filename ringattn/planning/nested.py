"""Time of a prompt on rings of rings: blocks go around a ring of neighbours, and then to the next ring.

The form of double-ring attention (Gu et al., LoongTrain, arXiv 2406.18485). ringattn does not run it; the prediction
says what it would gain.
"""

from __future__ import annotations

from collections.abc import Sequence

from .links import Link
from .machines import Machine
from .prediction import Arrangement
from .prefill import Reading
from .shape import ModelShape


def read_on_rings(
    shape: ModelShape,
    machines: Sequence[Machine],
    links: tuple[Link, Link],
    arrangement: Arrangement,
    tokens: int,
    step: int,
) -> Reading:
    """Time of rounds on equal parts of the tokens, at the pace of the slowest machine.

    In each of `groups` turns a ring computes with the blocks of one ring. Meanwhile its blocks travel around it, and
    the blocks that it has go to the next ring.

    Args:
        shape: The model.
        machines: The machines.
        links: Link within a ring, and link between rings.
        arrangement: Rings of rings.
        tokens: Tokens of the prompt.
        step: Tokens of all ranks in a round.
    """
    inner, outer = links
    size, groups = arrangement.ring, arrangement.groups
    flops = min(m.flops for m in machines)
    attention = min(m.attention for m in machines)
    ranks = size * groups
    found = Reading(strategy="pass_kv")
    done = 0
    while done < tokens:
        new = min(step, tokens - done)
        linear = shape.prompt_linear * new / ranks / flops
        for kind in shape.prompt_attending:
            held = done + new
            seen = held if kind.window is None else min(held, kind.window + new / ranks)
            pairs = new / ranks * (done + new / 2 if kind.window is None else min(done + new / 2, kind.window))
            turn = pairs * kind.pair_flops / attention / groups
            block = seen / ranks * kind.key
            around = (size - 1) * (inner.latency + block / inner.bandwidth / (2 if inner.duplex and size > 2 else 1))
            across = outer.latency + block / outer.bandwidth
            last = max(turn, around)
            seconds = (groups - 1) * max(turn, around, across) + last
            transfer = groups * around + (groups - 1) * across
            found.seconds += kind.count * seconds
            found.transfer += kind.count * transfer
            found.exposed += kind.count * (seconds - groups * turn)
            found.sent += kind.count * block * ranks * (groups * (size - 1) + groups - 1)
        found.seconds += linear
        done += new
    return found
