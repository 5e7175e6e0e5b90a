"""Shapes of models: what a plan knows of a model is what its ranks find when they run it."""

from __future__ import annotations

import os

import pytest

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from families import FAMILIES, build

from ringattn import init, lm
from ringattn.planning.describe import shape_of, unread_model

LLAMA = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize("name", [*FAMILIES][::4])
def test_memory_is_that_of_the_loaded_model(name: str) -> None:
    shape = shape_of(name, build(name))
    found = lm.shard(build(name), init("solo")).footprint
    promised = shape.footprint()
    for tokens in (0, 1, 5000):
        assert promised.needed(tokens, 0.5, 64) == found.needed(tokens, 0.5, 64)
    assert shape.linear > 0 and 0 < shape.read <= shape.divided


def test_a_large_model_is_described_without_its_weights() -> None:
    """The numbers of Llama 3 70B, from its published configuration."""
    shape = shape_of("70b", unread_model(LLAMA))
    (kind,) = shape.attending
    assert (kind.count, kind.kv_heads, kind.key) == (80, 8, 2 * 8 * 128 * 2)
    assert kind.pair_flops == 4 * 64 * 128
    assert shape.divided + shape.whole == pytest.approx(2 * 70.55e9, rel=0.001)
    assert shape.linear == pytest.approx(2 * 68.45e9, rel=0.001)
    assert shape.positions == 131072


def test_a_quantised_model() -> None:
    whole = shape_of("70b", unread_model(LLAMA))
    packed = shape_of("70b", unread_model({**LLAMA, "quantization": {"group_size": 64, "bits": 4}}))
    assert packed.divided == pytest.approx(whole.divided * 4.5 / 16, rel=0.001)
    assert packed.linear == pytest.approx(whole.linear)
    assert packed.attending == whole.attending


def test_a_token_reads_the_experts_that_work_on_it() -> None:
    name = next(name for name in FAMILIES if "moe" in name)
    shape = shape_of(name, build(name))
    assert shape.read < 0.9 * shape.divided
