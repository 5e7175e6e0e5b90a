"""mlx-lm's ways to run a model with ringattn's attention: as lazy as with MLX's own, and with the same answers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import pytest

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from families import BASE, build
from mlx_lm.generate import generate_step

import ringattn
from benchmarks.rivals.lm.models import use_fused_attention
from benchmarks.rivals.lm.pipelined import Pipeline

CHUNK = 20
PROMPT = mx.array([i % BASE["vocab_size"] for i in range(2 * CHUNK + 1)])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The queries of each call of ringattn's attention; the class of the model is restored at the end."""
    found: list[int] = []
    plain = ringattn.attention

    def attention(q: mx.array, *arrays: mx.array, **options: object) -> mx.array:
        found.append(q.shape[2])
        return plain(q, *arrays, **options)

    monkeypatch.setattr(ringattn, "attention", attention)
    module = sys.modules[type(build("qwen2")).__module__]
    monkeypatch.setattr(module, "scaled_dot_product_attention", module.scaled_dot_product_attention)
    return found


def by_chunks(model: nn.Module) -> Iterator[tuple[int, mx.array]]:
    return generate_step(PROMPT, model, max_tokens=1, prefill_step_size=CHUNK)


def pipelined(model: nn.Module) -> Iterator[tuple[int, mx.array]]:
    return Pipeline(model, mx.distributed.init()).generate(PROMPT, 1, CHUNK)


@pytest.mark.parametrize("read", [by_chunks, pipelined])
def test_a_prompt_has_no_attention_in_the_last_layer(calls: list[int], read) -> None:
    model = build("qwen2")
    ((token, expected),) = read(model)
    assert not calls
    use_fused_attention(model := build("qwen2"))
    ((found, logprobs),) = read(model)
    assert found == token
    assert mx.abs(logprobs - expected).max() < 1e-5 * mx.abs(expected).max()
    layers = BASE["num_hidden_layers"]
    assert [queries for queries in calls if queries > 1] == [CHUNK] * 2 * (layers - 1)
    assert calls.count(1) % layers == 0 < calls.count(1)
