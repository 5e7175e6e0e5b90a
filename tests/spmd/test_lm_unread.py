"""A prompt's tokens but the last are read for the caches alone: nothing is attended to after the last cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from ringattn import Ring

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from families import BASE, build, words

from ringattn import lm
from ringattn.lm.sharding import attention, elementwise_recurrences, sparse
from ringattn.lm.sharding.forward_pass import flat

pytestmark = pytest.mark.two_ranks

CHUNK = 24  # tokens of a rank in a round
NEW = 2
# Layers of a model that attend, and those of them that do so after the last cache is written.
ATTENDING = {
    "llama": (4, 1),
    "gemma2": (4, 1),
    "gemma3": (4, 1),
    "gpt_oss": (4, 1),
    "gemma4, shared keys": (4, 3),  # the last two layers have no caches of their own
    "deepseek_v3": (4, 1),
    "longcat_flash": (4, 1),
    "deepseek_v32": (4, 1),
    "llama4": (4, 1),
    "qwen3_5": (1, 0),  # the last layers are recurrent
    "lfm2": (2, 1),
    "falcon_h1": (2, 1),
    "kimi_linear": (1, 0),
    "rwkv7": (0, 0),
    "jamba": (2, 1),
    "recurrent_gemma": (1, 0),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of queries in each call of a ring's attention."""
    found: list[int] = []

    def counted(plain: Callable) -> Callable:
        def call(q: mx.array, *arrays: mx.array, **options: Any) -> Any:
            found.append(q.shape[2])
            return plain(q, *arrays, **options)

        return call

    for module in (attention, sparse):
        for name in ("ring_attention", "decode_attention"):
            monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return found


def read_all(model: nn.Module, ids: mx.array, step: int) -> tuple[list[mx.array], list[Any]]:
    """Greedy log-probabilities and the cache of calls of the model itself, whose logits count in every round."""
    cache = model.make_cache()
    for leaf in flat(cache):
        leaf.expect_prompt(ids.size)
    for at in range(0, ids.size - 1, step):
        model(ids[None, at : min(at + step, ids.size - 1)], cache=cache)
        mx.eval([c.state for c in cache])
    found = []
    token = ids[-1:]
    for _ in range(NEW + 1):  # mlx-lm begins with the next token before it returns one
        logits = model(token[None], cache=cache)[:, -1, :]
        found.append((logits - mx.logsumexp(logits, keepdims=True)).squeeze(0))
        token = mx.argmax(found[-1], keepdims=True)
    return found, cache


@pytest.mark.parametrize("name", ATTENDING)
@pytest.mark.parametrize("rounds", [1, 2], ids="rounds={}".format)
def test_answers_are_those_of_all_layers(ring: Ring, rng: np.random.Generator, name: str, rounds: int) -> None:
    model = lm.shard(build(name), ring)
    step = CHUNK * ring.size
    ids = mx.array(rng.integers(0, BASE["vocab_size"], rounds * step + 1))
    expected, whole = read_all(model, ids, step)
    cache = model.make_cache()
    options = {"max_tokens": NEW, "prefill_step_size": CHUNK}
    responses = list(lm.stream_generate(model, words(), ids.tolist(), **options, prompt_cache=cache))
    for response, logprobs in zip(responses, expected):
        assert response.token == int(mx.argmax(logprobs))
        assert mx.array_equal(response.logprobs, logprobs)
    assert len(responses) == NEW
    for found, other in zip(flat(cache), flat(whole)):
        assert found.size() == other.size() == ids.size + NEW
        assert all(mx.array_equal(x, y) for x, y in zip(found.state, other.state, strict=True))


@pytest.mark.parametrize("name", ATTENDING)
def test_calls_of_attention(ring: Ring, rng: np.random.Generator, calls: list[int], name: str) -> None:
    model = lm.shard(build(name), ring)
    ids = rng.integers(0, BASE["vocab_size"], 2 * CHUNK * ring.size + 1)
    many, few = [], []
    for response in lm.stream_generate(model, words(), ids, max_tokens=1, prefill_step_size=CHUNK):
        many = [queries for queries in calls if queries > 1]
        few = [queries for queries in calls if queries == 1]
        assert response.token >= 0
    attending, skipped = ATTENDING[name]
    assert len(many) == 2 * (attending - skipped)
    assert len(few) == 2 * attending


def test_outputs_of_the_last_recurrence(ring: Ring, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lm.shard(build("mamba"), ring)
    layers = len(model.layers)
    found: list[int] = []
    read = elementwise_recurrences._read
    monkeypatch.setattr(elementwise_recurrences, "_read", lambda *given: (found.append(1), read(*given))[1])
    model(mx.zeros((1, CHUNK * ring.size), mx.int32), cache=model.make_cache())
    of_a_layer = len(found) // layers
    ids = rng.integers(0, BASE["vocab_size"], CHUNK * ring.size + 1)
    list(lm.stream_generate(model, words(), ids, max_tokens=1, prefill_step_size=CHUNK))
    assert len(found) == of_a_layer * (2 * layers - 1) > 0
