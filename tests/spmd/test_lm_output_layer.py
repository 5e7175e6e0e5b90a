"""The logits of a new token, of which each rank computes a part, are those of the whole layer."""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from ringattn import Ring

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from families import build, words
from mlx_lm.models.cache import make_prompt_cache

from ringattn import lm
from ringattn.lm.sharding import output_layer
from ringattn.lm.sharding.output_layer import parts_of

VOCABULARY = 1000
WIDTH = 64  # a multiple of the group of a quantised layer


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of logits in each product of an output layer over a ring."""
    found: list[int] = []
    rows = output_layer._rows

    def counted(layer: Any, start: int, stop: int) -> Any:
        found.append(stop - start)
        return rows(layer, start, stop)

    monkeypatch.setattr(output_layer, "LEAST_HEAD", 0)
    monkeypatch.setattr(output_layer, "_rows", counted)
    return found


def make(name: str, tied: bool, bits: int) -> nn.Module:
    model = build(name, vocab_size=VOCABULARY, hidden_size=WIDTH, tie_word_embeddings=tied)
    if bits == 16:
        model.set_dtype(mx.bfloat16)
    if bits == 4:
        nn.quantize(model, 32, 4, class_predicate=lambda path, part: "lm_head" in path or "embed" in path)
    return model


@pytest.mark.parametrize("bits", [4, 16, 32])
@pytest.mark.parametrize("tied", [False, True], ids=["linear", "embedding"])
@pytest.mark.parametrize("name", ["llama", "falcon_h1"])
def test_logits(
    ring: Ring, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, computed: list[int], name, tied, bits
) -> None:
    model = lm.shard(make(name, tied, bits), ring)
    ids = mx.array(rng.integers(0, VOCABULARY, (1, 20 * ring.size)))
    steps = (ids, ids[:, :1], ids[:, :3], ids[:, 1:2])
    cache = make_prompt_cache(model)
    found = [model(step, cache=cache) for step in steps]
    parts = [parts_of(VOCABULARY, ring.size).local_length(ring.rank)] * 2  # of the two calls with one token
    assert computed == (parts if ring.size > 1 else [])
    monkeypatch.setattr(output_layer, "LEAST_HEAD", 1 << 40)
    cache = make_prompt_cache(model)
    for logits, step in zip(found, steps):
        assert mx.array_equal(logits, model(step, cache=cache))
    assert mx.array_equal(model(ids), lm.shard(make(name, tied, bits), ring)(ids))  # without a cache


def test_a_rank_with_a_gpu(ring: Ring, monkeypatch: pytest.MonkeyPatch, computed: list[int]) -> None:
    """All ranks then compute all logits."""
    monkeypatch.setattr(output_layer, "uses_gpu", lambda: ring.rank == ring.size - 1)
    model = lm.shard(make("llama", True, 32), ring)
    assert len(list(lm.stream_generate(model, words(), list(range(1, 50)), max_tokens=3))) == 3
    assert not computed


def test_generated_tokens(ring: Ring, monkeypatch: pytest.MonkeyPatch, computed: list[int]) -> None:
    model = lm.shard(make("llama", False, 32), ring)
    texts = []
    for least in (0, 1 << 40):
        monkeypatch.setattr(output_layer, "LEAST_HEAD", least)
        texts.append([r.token for r in lm.stream_generate(model, words(), list(range(1, 60)), max_tokens=6)])
    assert texts[0] == texts[1]
    assert bool(computed) == (ring.size > 1)


@pytest.mark.parametrize("rows", [1, 64, 65, 1000, 49152])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_parts(rows: int, size: int) -> None:
    layout = parts_of(rows, size)
    lengths = [layout.local_length(rank) for rank in range(size)]
    assert sum(lengths) == rows and max(lengths) - min(lengths) <= 2 * output_layer.RUN
