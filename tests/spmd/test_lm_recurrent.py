"""Models with recurrent layers over a ring of any size give the results of one process."""

from __future__ import annotations

import os

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from ringattn import Ring

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from families import BASE, RECURRENT, build
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from ringattn import lm
from ringattn.lm.sharding.forward_pass import flat

STEPS = (100, 1, 1, 3, 131, 5, 1)  # tokens of each call: chunks for all ranks, and few tokens on every rank
ULPS = 32  # of the largest logit, float32


def logits(model: nn.Module, ids: mx.array, steps: tuple[int, ...]) -> mx.array:
    """The logits of plain mlx-lm for `ids`, read in pieces of `steps` tokens."""
    cache = make_prompt_cache(model)
    starts = np.cumsum([0, *steps])
    return mx.concatenate([model(ids[:, a:b], cache=cache) for a, b in zip(starts, starts[1:])], axis=1)


@pytest.mark.parametrize("name", RECURRENT)
def test_logits(ring: Ring, rng: np.random.Generator, name: str) -> None:
    """The difference is below 32 ulps, or twice that of mlx-lm itself when it reads the prompt in other pieces."""
    model = build(name)
    ids = mx.array(rng.integers(0, BASE["vocab_size"], (1, sum(STEPS))))
    expected = logits(model, ids, STEPS)
    scale = mx.abs(expected).max().item()
    others = [logits(model, ids, steps) for steps in ((37, 63, 5, 131, 6), (1, 99, 71, 71))]
    own = max(mx.abs(other - expected).max().item() / scale for other in others)
    lm.shard(model, ring)
    cache = make_prompt_cache(model)
    start = 0
    for tokens in STEPS:
        found = model(ids[:, start : start + tokens], cache=cache)
        right = expected[:, start : start + tokens]
        step = next(iter(flat(cache))).step
        right = step.new.shard(right, ring.rank, axis=1) if step.shared else right
        assert found.shape == right.shape
        error = mx.abs(found - right).max().item() / scale
        assert error < max(ULPS * 2**-23, 2 * own), (tokens, error * 2**23, own * 2**23)
        start += tokens


@pytest.mark.parametrize("name", RECURRENT)
def test_greedy_tokens(ring: Ring, rng: np.random.Generator, name: str) -> None:
    """mlx-lm's own loop over the ring gives the tokens of one process for prompts of any length."""
    model = build(name, seed=1)
    prompts = [rng.integers(0, BASE["vocab_size"], n).tolist() for n in (1, 2, 37, 131)]
    expected = [[int(token) for token, _ in generate_step(mx.array(p), model, max_tokens=7)] for p in prompts]
    lm.shard(model, ring)
    for prompt, tokens in zip(prompts, expected):
        found = [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=7, prefill_step_size=50)]
        assert found == tokens
