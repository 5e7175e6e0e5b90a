"""Caches of recurrent layers: states that ranks disagree on, states to go back to, and their bytes."""

from __future__ import annotations

import os

import mlx.core as mx
import numpy as np
import pytest

from ringattn import ArgumentError, Ring

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from families import BASE, build, words
from plain_lm import greedy

from ringattn import lm
from ringattn.lm.sharding import recurrent_cache
from ringattn.lm.sharding.forward_pass import flat, restorable, size_of, trim_to
from ringattn.lm.sharding.recurrent_cache import LONG_TAIL, TAIL, RecurrentCache
from ringattn.lm.sharding.sharded_cache import contents, held_bytes


@pytest.mark.parametrize("name", ["qwen3_5", "falcon_h1", "lfm2"])
def test_states_that_differ_between_ranks(ring: Ring, name: str) -> None:
    """They are an error on all ranks at the next prompt that they share, and the ring still works."""
    if ring.size == 1:
        pytest.skip("one rank")
    model = lm.shard(build(name), ring)
    cache = model.make_cache()
    prompt = [7] * (16 * ring.size + TAIL + 1)
    assert len(list(lm.stream_generate(model, words(), prompt, max_tokens=3, prompt_cache=cache))) == 3
    layer = next(leaf for leaf in flat(cache) if isinstance(leaf, RecurrentCache))
    at = len(layer.arrays) - 1  # a state, or the inputs of a layer that has nothing else
    if ring.rank == ring.size - 1:
        layer.arrays[at] = layer.arrays[at] * 1.25
    held = size_of(cache)
    for _ in range(2):  # the first error leaves the cache as it was
        with pytest.raises(ArgumentError, match=r"^a (recurrent|short) [a-z]+: [a-z ]+ differ between [^\n]*$"):
            list(lm.stream_generate(model, words(), prompt, max_tokens=3, prompt_cache=cache))
        assert [leaf.size() for leaf in flat(cache)] == [held] * len(flat(cache))
    assert len(list(lm.stream_generate(model, words(), prompt, max_tokens=3))) == 3


@pytest.mark.two_ranks
@pytest.mark.parametrize("name", ["qwen3_5", "falcon_h1"])
def test_states_to_go_back_to(ring: Ring, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Before the last prompt, some tokens before its end, and before the last token: each gives the right tokens."""
    monkeypatch.setattr(recurrent_cache, "LONG_TAIL", 50)
    model = build(name)
    first, second, third = (rng.integers(0, BASE["vocab_size"], n).tolist() for n in (70, 90, 5))
    answers = {}
    for kept in (70, 160 - 50, 160 - TAIL, 161, 162):
        context = [*first, *second][:kept] + [3, 4][: max(0, kept - 160)]
        answers[kept] = greedy(model, [*context, *third], 3)
    lm.shard(model, ring)
    sampler = lambda logprobs: mx.array([next(tokens)])  # noqa: E731
    for kept, expected in answers.items():
        cache = model.make_cache()
        model(mx.array([first]), cache=cache)
        tokens = iter([3, 4, 5])
        list(lm.stream_generate(model, words(), second, max_tokens=2, prompt_cache=cache, sampler=sampler))
        found = [n for n in range(163) if restorable(cache, n) == n]
        assert found == [0, 70, 160 - 50, 160 - TAIL, 161, 162]
        assert restorable(cache, kept + 1 if kept < 161 else kept) == kept
        trim_to(cache, kept)
        answer = lm.stream_generate(model, words(), third, max_tokens=3, prompt_cache=cache)
        assert [r.token for r in answer] == expected
        trim_to(cache, 0)
        answer = lm.stream_generate(model, words(), [*first, *second][:kept], max_tokens=1, prompt_cache=cache)
        assert len(list(answer)) == 1


@pytest.mark.two_ranks
@pytest.mark.parametrize("name", ["qwen3_5", "falcon_h1"])
def test_bytes_are_those_of_all_states_that_are_kept(ring: Ring, name: str) -> None:
    model = lm.shard(build(name), ring)
    cache = model.make_cache()
    list(lm.stream_generate(model, words(), [5] * 1100, max_tokens=2, prompt_cache=cache))
    for layer in (leaf for leaf in flat(cache) if isinstance(leaf, RecurrentCache)):
        state = sum(x.nbytes for x in layer.arrays)
        assert list(layer.states) == [1100 - LONG_TAIL, 1100 - TAIL, 1101, 1102]
        assert layer.nbytes == layer.held_bytes == 4 * state
    assert contents(cache) == "keys, values and states"
    assert held_bytes(cache) == sum(leaf.held_bytes for leaf in flat(cache))
