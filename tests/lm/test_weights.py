"""Dividing weights: what a model's own ``shard`` would round away is refused."""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from ringattn.errors import UnsupportedModelError
from ringattn.lm.sharding.weights import check_no_pipeline, shard_weights


class Two:
    """A group of two ranks, as far as its size is asked for."""

    def size(self) -> int:
        return 2


class Odd(nn.Module):
    """A model whose `shard` keeps the first half of its rows and heads, rounded down."""

    model_type = "odd"

    def __init__(self, rows: int, heads: int):
        super().__init__()
        self.part = nn.Linear(4, rows, bias=False)
        self.n_heads = heads

    def shard(self, group: Any) -> None:
        self.part.weight = self.part.weight[: self.part.weight.shape[0] // group.size()]
        self.n_heads //= group.size()


@pytest.mark.parametrize(
    ("rows", "heads", "told"),
    [
        (7, 4, "tensor: 2, expected a divisor of the sizes of part.weight of odd"),
        (8, 3, "tensor: 2, expected a divisor of 3, the n_heads of odd"),
    ],
)
def test_rounding_is_refused(rows: int, heads: int, told: str) -> None:
    with pytest.raises(UnsupportedModelError, match=told):
        shard_weights(Odd(rows, heads), Two())  # type: ignore[arg-type]


def test_an_exact_division_is_accepted() -> None:
    model = Odd(8, 4)
    shard_weights(model, Two())  # type: ignore[arg-type]
    assert model.part.weight.shape == (4, 4) and model.n_heads == 2


def test_errors_of_mlx_lm_are_one_line() -> None:
    model = Odd(8, 4)

    def refuse(group: Any) -> None:
        raise AssertionError("group size 2 must divide\nvocab_size 61")

    object.__setattr__(model, "shard", refuse)
    with pytest.raises(
        UnsupportedModelError, match="mlx-lm cannot divide odd by it: group size 2 must divide vocab_size"
    ):
        shard_weights(model, Two())  # type: ignore[arg-type]


def test_pipelines_are_refused() -> None:
    model = Odd(8, 4)
    check_no_pipeline(model)
    model.part.pipeline_size = 3
    with pytest.raises(UnsupportedModelError, match="the layers of odd are divided into 3 stages by pipeline"):
        check_no_pipeline(model)
    mx.eval(model.parameters())
