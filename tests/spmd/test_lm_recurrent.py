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
from mlx.utils import tree_map
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU

from ringattn import lm
from ringattn.lm.sharding.forward_pass import flat

STEPS = (100, 1, 1, 3, 131, 5, 1)  # tokens of each call: chunks for all ranks, and few tokens on every rank
ULPS = 32  # of the largest logit, float32


def logits(model: nn.Module, ids: mx.array, steps: tuple[int, ...]) -> mx.array:
    """The logits of plain mlx-lm for `ids`, read in pieces of `steps` tokens."""
    cache = make_prompt_cache(model)
    starts = np.cumsum([0, *steps])
    return mx.concatenate([model(ids[:, a:b], cache=cache) for a, b in zip(starts, starts[1:])], axis=1)


def tolerance(model: nn.Module, ids: mx.array, expected: mx.array, *others: tuple[int, ...]) -> float:
    """The difference that is allowed: 32 ulps, or twice that of mlx-lm itself when it reads `ids` in other pieces."""
    own = max(mx.abs(logits(model, ids, steps) - expected).max().item() for steps in others)
    return max(ULPS * 2**-23 * mx.abs(expected).max().item(), 2 * own)


@pytest.mark.parametrize("name", RECURRENT)
def test_logits(ring: Ring, rng: np.random.Generator, name: str) -> None:
    """Calls of many and of few tokens give the logits of one process."""
    model = build(name)
    ids = mx.array(rng.integers(0, BASE["vocab_size"], (1, sum(STEPS))))
    expected = logits(model, ids, STEPS)
    allowed = tolerance(model, ids, expected, (25,) * 9 + (17,), (1,) * 100 + (142,))
    lm.shard(model, ring)
    cache = make_prompt_cache(model)
    start = 0
    for tokens in STEPS:
        found = model(ids[:, start : start + tokens], cache=cache)
        right = expected[:, start : start + tokens]
        step = next(iter(flat(cache))).step
        right = step.new.shard(right, ring.rank, axis=1) if step.shared else right
        assert found.shape == right.shape
        error = mx.abs(found - right).max().item()
        assert error < allowed, (tokens, error, allowed)
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


@pytest.mark.parametrize("name", RECURRENT)
def test_one_token_of_many(ring: Ring, rng: np.random.Generator, monkeypatch, name: str) -> None:
    """A rank may have one token of a long prompt. Layers that run another code for one token give the same result."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)  # with the CPU as device no kernel of Metal runs
    model = build(name).eval()
    ids = mx.array(rng.integers(0, BASE["vocab_size"], (1, 80)))
    expected = logits(model, ids, (80,))
    allowed = tolerance(model, ids, expected, (20,) * 4, (1,) * 80)
    lm.shard(model, ring, weights=[1e-3] * (ring.size - 1) + [1])
    cache = make_prompt_cache(model)
    found = model(ids, cache=cache)
    layout = next(iter(flat(cache))).step.new
    assert layout.local_length(0) == (80 if ring.size == 1 else 1)
    error = mx.abs(found - layout.shard(expected, ring.rank, axis=1)).max().item()
    assert error < allowed


@pytest.mark.parametrize("name", RECURRENT)
def test_bfloat16(ring: Ring, rng: np.random.Generator, name: str) -> None:
    """Results have mlx-lm's dtype. The error against float32 is at most twice that of mlx-lm, plus a few ulps."""
    model = build(name)
    if any(isinstance(part, SwitchGLU) for part in model.modules()):
        pytest.skip("MLX mixes experts on a CPU in float32 only")
    model.set_dtype(mx.bfloat16)
    ids = mx.array(rng.integers(0, BASE["vocab_size"], (1, 102)))
    steps = (100, 1, 1)
    plain = logits(model, ids, steps)
    wide = build(name)
    wide.update(tree_map(lambda x: x.astype(mx.float32), model.parameters()))
    exact = logits(wide, ids, steps)
    allowed = 2 * mx.abs(plain - exact).max().item() + 4 * 2**-7 * mx.abs(exact).max().item()
    lm.shard(model, ring)
    cache = make_prompt_cache(model)
    start = 0
    for tokens in steps:
        found = model(ids[:, start : start + tokens], cache=cache)
        step = next(iter(flat(cache))).step
        right = exact[:, start : start + tokens]
        right = step.new.shard(right, ring.rank, axis=1) if step.shared else right
        assert found.dtype == plain.dtype
        assert mx.abs(found - right).max().item() <= allowed
        start += tokens
