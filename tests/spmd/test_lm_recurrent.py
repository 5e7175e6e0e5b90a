"""Models with recurrent layers over a ring of any size give the results of one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ringattn import Ring

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from families import BASE, RECURRENT, build
from mlx.utils import tree_map
from mlx_lm.generate import generate_step
from mlx_lm.models import ssm
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU
from plain_lm import Tolerance, greedy, logits

from ringattn import lm
from ringattn.lm import mlx_lm_compat as compat
from ringattn.lm.sharding import partition, recurrences
from ringattn.lm.sharding.forward_pass import flat
from ringattn.lm.sharding.recurrent_cache import RecurrentCache
from ringattn.ring import parts

STEPS = (70, 1, 1, 3, 91, 5, 1)  # tokens of each call: chunks for all ranks, and few tokens on every rank
OTHERS = ((37, 63, 5, 67), (22,) * 7 + (18,), (1,) * 70 + (102,))  # pieces in which mlx-lm reads them too


@pytest.mark.parametrize(
    ("name", "kernel"), [*((name, False) for name in RECURRENT), ("qwen3_5", True), ("olmo_hybrid", True)]
)
def test_logits(ring: Ring, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str, kernel: bool) -> None:
    """Calls of many and of few tokens give the logits of one process."""
    monkeypatch.setattr(compat, "has_delta_kernel", lambda k: kernel)  # with a kernel: mlx-lm's function, here plain
    model = build(name)
    ids = mx.array(rng.integers(0, BASE["vocab_size"], (1, sum(STEPS))))
    expected = logits(model, ids, STEPS)
    allowed = Tolerance(lambda: build(name), ids, expected, *OTHERS)
    lm.shard(model, ring)
    cache = make_prompt_cache(model)
    start = 0
    for tokens in STEPS:
        found = model(ids[:, start : start + tokens], cache=cache)
        right = expected[:, start : start + tokens]
        step = next(iter(flat(cache))).step
        right = step.new.shard(right, ring.rank, axis=1) if step.shared else right
        allowed.check(found, right, tokens)
        start += tokens


@pytest.mark.two_ranks
@pytest.mark.parametrize("name", ["qwen3_5", "olmo_hybrid", "kimi_linear", "kimi_k3"])
def test_error_against_float64(ring: Ring, rng: np.random.Generator, name: str) -> None:
    """Chunks of tokens are at most twice as far from float64 as mlx-lm, which takes one token after the other."""
    wide, model = build(name), build(name)
    wide.set_dtype(mx.float64)
    ids = mx.array(rng.integers(0, BASE["vocab_size"], (1, 200)))
    exact = logits(wide, ids, (200,))
    plain = mx.abs(logits(model, ids, (200,)) - exact).max().item()
    lm.shard(model, ring)
    cache = make_prompt_cache(model)
    found = model(ids, cache=cache)
    own = flat(cache)[0].step.new.shard(exact, ring.rank, axis=1)
    assert mx.abs(found - own).max().item() < 2 * plain + 4 * 2**-23 * mx.abs(exact).max().item()


@pytest.mark.parametrize("name", ["qwen3_5", "mamba2", "lfm2"])
def test_work_and_bytes(ring: Ring, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The ranks together run over each token once. What a layer sends does not depend on the number of tokens."""
    done = {"tokens": 0, "bytes": 0}

    def counted(function: Callable[..., Any], what: str, count: Callable[..., int]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            done[what] += count(*args, **options)
            return function(*args, **options)

        return call

    def size(*_: Any, payload: Sequence[memoryview] = ()) -> int:
        return sum(part.nbytes for part in payload)

    monkeypatch.setattr(recurrences, "run", counted(recurrences.run, "tokens", lambda given, _: given.length))
    monkeypatch.setattr(ssm, "ssm_attn", counted(ssm.ssm_attn, "tokens", lambda x, *_, **__: x.shape[1]))
    monkeypatch.setattr(parts, "agree", counted(parts.agree, "bytes", size))
    model = lm.shard(build(name), ring)
    sent = []
    for length in (32 * ring.size, 96 * ring.size + 1):
        done.update(tokens=0, bytes=0)
        model(mx.zeros((1, length), mx.int32), cache=(cache := make_prompt_cache(model)))
        sent.append(done["bytes"])
        states = sum(slot.kind == "state" for kind in model.kinds for slot in getattr(kind, "slots", ()))
        assert ring.all_reduce(mx.array(float(done["tokens"]))).item() == states * length
    assert 0 < sent[0] == sent[1] <= 3 * sum(c.held_bytes for c in cache if isinstance(c, RecurrentCache))


@pytest.mark.two_ranks
@pytest.mark.parametrize("name", RECURRENT)
def test_greedy_tokens(ring: Ring, rng: np.random.Generator, name: str) -> None:
    """mlx-lm's own loop over the ring gives the tokens of one process for prompts of any length."""
    model = build(name, seed=1)
    prompts = [rng.integers(0, BASE["vocab_size"], n).tolist() for n in (1, 2, 37, 131)]
    expected = [greedy(model, prompt, 7) for prompt in prompts]
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
    allowed = Tolerance(lambda: build(name).eval(), ids, expected, (20,) * 4, (1,) * 80)
    lm.shard(model, ring, weights=[1e-3] * (ring.size - 1) + [1])
    cache = make_prompt_cache(model)
    found = model(ids, cache=cache)
    layout = next(iter(flat(cache))).step.new
    assert layout.local_length(0) == (80 if ring.size == 1 else 1)
    allowed.check(found, layout.shard(expected, ring.rank, axis=1))


@pytest.mark.parametrize("name", ["qwen3_5", "falcon_h1", "lfm2", "bailing_moe_linear"])
@pytest.mark.parametrize("weights", ["equal", "one fast rank"])
def test_rounds_of_few_tokens(
    ring: Ring, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str, weights: str
) -> None:
    """A rank may have fewer tokens than a convolution reads, and the context may be one token."""
    monkeypatch.setattr(partition, "LEAST", 1)
    size = ring.size
    steps = (1, size, 2 * size + 1, 1, size + 1, 3, 30, size)
    model = build(name)
    ids = mx.array(rng.integers(0, BASE["vocab_size"], (1, sum(steps))))
    expected = logits(model, ids, steps)
    allowed = Tolerance(lambda: build(name), ids, expected, (sum(steps),))
    lm.shard(model, ring, None if weights == "equal" else [1e3] + [1.0] * (size - 1))
    cache = make_prompt_cache(model)
    start = 0
    for tokens in steps:
        found = model(ids[:, start : start + tokens], cache=cache)
        right = expected[:, start : start + tokens]
        step = flat(cache)[0].step
        assert step.shared == (tokens >= size)
        right = step.new.shard(right, ring.rank, axis=1) if step.shared else right
        allowed.check(found, right, tokens)
        start += tokens


@pytest.mark.two_ranks
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
