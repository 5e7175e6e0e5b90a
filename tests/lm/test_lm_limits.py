"""Limits from a model's configuration on its input."""

from __future__ import annotations

import os
import warnings
from types import SimpleNamespace as Namespace
from typing import Any

import families
import mlx.nn as nn
import pytest

from ringattn import init

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from ringattn import lm
from ringattn.lm.limits import context_limit, vocabulary


def configured(**fields: Any) -> nn.Module:
    model = nn.Module()
    model.args = Namespace(**fields)
    return model


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    "fields, limit",
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024, "n_ctx": 2048}, 1024),
        ({"max_position_embeddings": 32768, "rope_scaling": YARN}, 131072),
        ({"max_position_embeddings": 163840, "rope_scaling": YARN}, 163840),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.0}}, 4096),
        ({"max_position_embeddings": None}, None),
        ({}, None),
    ],
)
def test_the_longest_context(fields: dict, limit: int | None) -> None:
    assert context_limit(configured(**fields)) == limit


def test_numbers_of_an_inner_model() -> None:
    outer = configured(model_type="x")
    outer.language_model = configured(vocab_size=61, max_position_embeddings=64)
    assert (context_limit(outer), vocabulary(outer)) == (64, 61)


def test_the_vocabulary_where_no_configuration_says_it() -> None:
    model = nn.Module()
    model.words = nn.Embedding(61, 8)
    model.places = nn.Embedding(32, 8)
    assert vocabulary(model) == 61


def test_a_prompt_beyond_the_limit_warns_once() -> None:
    """The warning comes where the context passes the limit, and not again at later turns."""
    model = lm.shard(families.build("llama", max_position_embeddings=64), init("solo"))
    cache = model.make_cache()

    def read(tokens: int) -> None:
        list(lm.stream_generate(model, families.words(), [1] * tokens, max_tokens=1, prompt_cache=cache))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(40)
    with pytest.warns(
        lm.ContextWarning, match=r"^prompt: 71 tokens with those in the cache, expected at most 64: [^\n]*$"
    ):
        read(30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(30)
