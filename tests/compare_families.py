"""Compare families of mlx-lm over a ring with one process: a program for all ranks.

    mpiexec -n 2 python tests/compare_families.py llama mamba

Rank 0 prints a line of JSON for each family: its name, a verdict and a detail.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from every_family import VOCABULARY, build
from mlx_lm.models.cache import make_prompt_cache

from ringattn import Ring, init, lm

STEPS = (71, 1, 1, 46, 1)  # tokens of each call: chunks for all ranks, and single tokens
ULPS = 32  # of the largest logit, float32
WORKS, REFUSED, UNBUILT, WRONG = "works", "refused", "not built", "WRONG"


def compared(name: str, ring: Ring) -> tuple[str, str]:
    """The verdict on a family, and its reason in one line. Collective."""
    try:
        model = build(name)
        ids = mx.array(np.random.default_rng(0).integers(0, VOCABULARY, (1, sum(STEPS))))
        expected = _logits(model, ids, STEPS)
        limit = max(ULPS * 2**-23, 2 * _own_difference(model, ids, expected, sum(STEPS) // 4))
    except (Exception, SystemExit) as error:
        return UNBUILT, _line(f"{type(error).__name__}: {error}")
    try:
        lm.shard(model, ring)
    except lm.UnsupportedModelError as error:
        return REFUSED, _line(str(error)).removeprefix("model: ").partition(" ")[2]
    worst = 0.0
    for ours, mine in zip(_logits(model, ids, STEPS), expected):
        own = _own(ours.shape[1], mine.shape[1], ring)
        worst = max(worst, float(mx.abs(ours - mine[:, own]).max() / mx.abs(mine).max()))
    worst = max(_of_all_ranks(worst, ring))
    if worst > limit:  # the loops of recurrent layers are the same in all chunks but those of one token
        limit = max(limit, 2 * _own_difference(build(name), ids, expected, 1))
    return (WORKS, "") if worst <= limit else (WRONG, f"the logits differ by {worst / limit:.1f} times the limit")


def _logits(model: nn.Module, ids: mx.array, steps: Sequence[int]) -> list[mx.array]:
    """The logits of each call where `ids` are read in `steps`."""
    cache = make_prompt_cache(model)
    found = [model(part, cache=cache) for part in mx.split(ids, list(accumulate(steps[:-1])), axis=1)]
    mx.eval(found)
    return found


def _own_difference(model: nn.Module, ids: mx.array, expected: Sequence[mx.array], chunk: int) -> float:
    """The largest difference of mlx-lm from itself where it reads in chunks of so many tokens, of the largest logit."""
    whole = mx.concatenate(expected, axis=1)
    other = mx.concatenate(_logits(model, ids, (chunk,) * (ids.shape[1] // chunk)), axis=1)
    return float(mx.abs(other - whole).max() / mx.abs(whole).max())


def _own(computed: int, tokens: int, ring: Ring) -> slice:
    """The tokens of a call whose logits this rank computed: all, or its chunk in the order of the ranks."""
    before = int(sum(_of_all_ranks(float(computed), ring)[: ring.rank]))
    return slice(before, before + computed) if computed < tokens else slice(None)


def _of_all_ranks(value: float, ring: Ring) -> list[float]:
    return ring.all_reduce(mx.array([value if rank == ring.rank else 0.0 for rank in range(ring.size)])).tolist()


def _line(text: str) -> str:
    return " ".join(text.split())


def main() -> None:
    mx.set_default_device(mx.cpu)
    with init(timeout=60) as ring:
        for name in sys.argv[1:]:
            verdict, detail = compared(name, ring)
            if ring.rank == 0:
                print(json.dumps([name, verdict, detail]), flush=True)


if __name__ == "__main__":
    main()
