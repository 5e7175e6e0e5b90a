"""Generating text where ranks do not do the same: an error on every rank, and a ring that still works."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from ringattn import ArgumentError, Ring

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

import mlx_lm
from families import BASE, build, words
from mlx_lm.models.cache import KVCache
from mlx_lm.sample_utils import make_sampler

from ringattn import lm

pytestmark = pytest.mark.two_ranks

LONG = list(range(1, 61)) * 4


@pytest.fixture(scope="module")
def model(ring: Ring) -> nn.Module:
    return lm.shard(build("llama"), ring)


def say(model: nn.Module, prompt: Any, **options: Any) -> list[int]:
    options = {"max_tokens": 3, "prefill_step_size": 40, **options}
    return [r.token for r in lm.stream_generate(model, words(), prompt, **options)]


def fails(*_: Any) -> Any:
    raise RuntimeError("only here")


@pytest.mark.parametrize(
    "make", [np.array, mx.array, lambda ids: np.array(ids, np.uint8), lambda ids: mx.array(ids, mx.int64), tuple]
)
def test_a_prompt_in_any_array(ring: Ring, model: nn.Module, make: Callable[[list[int]], Any]) -> None:
    expected = say(model, LONG)
    assert say(model, make(LONG) if ring.rank == 0 else None) == expected


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([1, 2, "three"], "prompt: <U21 of shape"),
        ([1.5], "prompt: float64 of shape"),
        ([[1, 2]], r"prompt: int64 of shape \(1, 2\), expected text or one row"),
        ([[1], [2, 3]], "prompt: list, expected text or one row of token ids"),
        (mx.array([1.0], mx.bfloat16), "prompt: array, expected text|prompt: float32 of shape"),
        (7, r"prompt: int64 of shape \(\), expected text or one row"),
        (None, r"prompt: object of shape \(\), expected text or one row"),
        ([2**40], f"prompt: token {2**40}, expected 0 to {BASE['vocab_size'] - 1}"),
        ([2**70], "prompt: object of shape|prompt: list, expected"),
        ([1, -1], "prompt: token -1, expected 0 to 60"),
        ([61], "prompt: token 61, expected 0 to 60"),
        ([], "prompt: no token"),
        ("", "prompt: no token"),
        ("w1 \ud800", r"prompt: '\\ud800' at index 3, expected Unicode text"),
    ],
)
def test_a_prompt_that_is_wrong_on_rank_0(ring: Ring, model: nn.Module, prompt: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^(rank 0: )?({message})[^\n]*$"):
        say(model, prompt if ring.rank == 0 else LONG)
    assert len(say(model, LONG[:9])) == 3


@pytest.mark.parametrize(
    "name", ["sampler", "stopped", "prompt_progress_callback", "logits_processors", "the last progress"]
)
@pytest.mark.parametrize("max_tokens", [1, 3])
def test_a_callback_that_fails_on_rank_0(ring: Ring, model: nn.Module, name: str, max_tokens: int) -> None:
    expected = say(model, LONG[:9])
    options = {name: [fails] if name == "logits_processors" else fails}
    if name == "the last progress":
        options = {"prompt_progress_callback": lambda done, total: done < total or fails()}
    with pytest.raises((RuntimeError, ArgumentError), match=r"^(rank 0: )?only here$"):
        say(model, LONG, max_tokens=max_tokens, **(options if ring.rank == 0 else {}))
    assert say(model, LONG[:9]) == expected


def test_a_progress_callback_that_fails_on_the_last_rank(ring: Ring, model: nn.Module) -> None:
    last = ring.size - 1
    with pytest.raises((RuntimeError, ArgumentError), match=rf"^(rank {last}: )?only here$"):
        say(model, LONG, prompt_progress_callback=fails if ring.rank == last else None)
    assert len(say(model, LONG[:9])) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prefill_step_size": 0}, "prefill_step_size: 0, expected at least 1"),
        ({"prefill_step_size": 41}, "stream_generate: prefill_step_size differs between ranks: 40 on rank"),
        ({"max_tokens": 4}, "stream_generate: max_tokens differs between ranks: 3 on rank"),
        ({"max_tokens": 0}, "max_tokens: 0, expected at least 1, or -1"),
        ({"kv_bits": 4}, "kv_bits: not supported over a ring"),
        ({"prompt_cache": [KVCache()]}, "prompt_cache: 1 KVCache, expected what the model's make_cache"),
        ({"prompt_cache": []}, "prompt_cache: nothing, expected"),
    ],
)
def test_an_option_that_is_wrong_on_one_rank(ring: Ring, model: nn.Module, options: dict, message: str) -> None:
    last = ring.size - 1
    if ring.size == 1 and "differs" in message:
        pytest.skip("one rank differs from none")
    with pytest.raises(ArgumentError, match=rf"^(rank {last}: )?{message}[^\n]*$"):
        say(model, LONG, **(options if ring.rank == last else {}))
    assert len(say(model, LONG[:9])) == 3


@pytest.mark.parametrize("family", ["llama", "falcon_h1"])
def test_a_cache_of_other_tokens_on_one_rank(ring: Ring, family: str) -> None:
    """The ranks have read different prompts of one length."""
    if ring.size == 1:
        pytest.skip("one rank differs from none")
    model = lm.shard(build(family), ring)
    first, second = model.make_cache(), model.make_cache()
    say(model, LONG, prompt_cache=first)
    say(model, LONG[::-1], prompt_cache=second)
    message = r"^stream_generate: prompt_cache differs between ranks: 243 tokens, digest [0-9a-f]{8} on [^\n]*$"
    with pytest.raises(ArgumentError, match=message):
        say(model, LONG[:9], prompt_cache=first if ring.rank else second)
    assert len(say(model, LONG[:9], prompt_cache=first)) == 3


@pytest.mark.parametrize("prompt", [LONG, LONG[:3]], ids=["long", "short"])
def test_a_text_that_rank_0_leaves_early(ring: Ring, model: nn.Module, prompt: list[int]) -> None:
    """Its next call is not taken for a part of the text that the others are in."""
    if ring.size == 1:
        pytest.skip("nobody is left behind")
    expected = say(model, LONG[:9])
    with pytest.raises(ArgumentError, match=r"^rank 0 called stream_generate, .* called decode_attention$"):
        for _ in lm.stream_generate(model, words(), LONG, max_tokens=5, prefill_step_size=40):
            if ring.rank == 0:
                break
        say(model, prompt)
    assert say(model, LONG[:9]) == expected


@pytest.mark.parametrize("tokens", [[5], [5, 6], LONG], ids=["one", "two", "many"])
def test_tokens_that_differ_between_ranks(ring: Ring, model: nn.Module, tokens: list[int]) -> None:
    """In a call of the model itself; the last token differs on the last rank."""
    if ring.size == 1:
        pytest.skip("one rank differs from none")
    other = [*tokens[:-1], tokens[-1] + (ring.rank == ring.size - 1)]
    with pytest.raises(ArgumentError, match=DIFFERENT):
        mx.eval(model(mx.array([other]), cache=model.make_cache()))
        ring.barrier()  # where ranks do not wait for each other in a call, a later one tells
    mx.eval(model(mx.array([tokens]), cache=model.make_cache()))
    ring.barrier()


DIFFERENT = (
    r"^(de|ring_at).*: the model's input differs between ranks: \[.*\] on .*: sample on one rank, as ringattn.lm"
)


def test_sampling_on_each_rank(ring: Ring, model: nn.Module) -> None:
    """mlx-lm's own loop: right with one seed, an error with several."""
    sampler = make_sampler(1.0)
    plain = build("llama")
    mx.random.seed(7)
    expected = mlx_lm.generate(plain, words(), LONG, max_tokens=12, sampler=sampler)
    mx.random.seed(7)
    assert mlx_lm.generate(model, words(), LONG, max_tokens=12, sampler=sampler) == expected
    if ring.size > 1:
        mx.random.seed(ring.rank)
        with pytest.raises(ArgumentError, match=DIFFERENT):
            mlx_lm.generate(model, words(), LONG, max_tokens=40, sampler=sampler)
            ring.barrier()
    assert len(say(model, LONG[:9])) == 3
