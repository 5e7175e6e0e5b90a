"""Ways to generate text, by name. Each returns a function ``(ids, new tokens) -> (token, log-probabilities) ...``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ringattn as ra  # before MLX, for its BLAS
from ringattn import lm

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip

CHUNK = 512  # tokens that a stage of the pipelined prefill computes at once; the other ways have their own defaults

Generate = Callable[[mx.array, int], Iterator[tuple[int, mx.array]]]


class Peers:
    """The ranks of a way. `logits_on` is the rank whose log-probabilities count."""

    rank = 0
    logits_on = 0

    def barrier(self) -> None:
        """Wait for all ranks."""


class Group(Peers):
    """Ranks joined by the ring backend of `mx.distributed`."""

    def __init__(self) -> None:
        self.group = mx.distributed.init(strict=True, backend="ring")
        self.rank = self.group.rank()

    def barrier(self) -> None:
        """Wait for all ranks."""
        mx.eval(mx.distributed.all_sum(mx.zeros(1), group=self.group))


class RingPeers(Peers):
    """Ranks of a ring of ringattn."""

    def __init__(self) -> None:
        self.ring = ra.init()
        self.rank = self.ring.rank
        self.barrier = self.ring.barrier  # type: ignore[method-assign]


def prepare(way: str, model: nn.Module, tokenizer: Any) -> tuple[Generate, Peers]:
    """Join the ranks and divide the model by `way`.

    Ways: ``"one"``, ``"tensor"`` and ``"pipeline"`` of mlx-lm, ``"pipelined"`` of this package, ``"ring"`` of ringattn.
    """
    if way == "one":
        return _mlx_lm(model), Peers()
    if way == "ring":
        peers = RingPeers()
        lm.shard(model, peers.ring)
        return _ringattn(model, tokenizer), peers
    group = Group()
    if way == "tensor":
        model.shard(group.group)
        return _mlx_lm(model), group
    if way == "pipeline":
        if not hasattr(model.model, "pipeline"):  # the words of mlx_lm.utils.sharded_load
            raise ValueError("The model does not support pipelining but a pipeline_group was provided")
        model.model.pipeline(group.group)
        return _mlx_lm(model), group
    from .pipelined import Pipeline

    pipeline = Pipeline(model, group.group)
    group.logits_on = group.group.size() - 1
    return (lambda ids, new: pipeline.generate(ids, new, CHUNK)), group


def _mlx_lm(model: nn.Module) -> Generate:
    from mlx_lm.generate import generate_step

    return lambda ids, new: generate_step(ids, model, max_tokens=new)


def _ringattn(model: nn.Module, tokenizer: Any) -> Generate:
    def generate(ids: mx.array, new: int) -> Iterator[tuple[int, mx.array]]:
        for response in lm.stream_generate(model, tokenizer, ids, max_tokens=new):
            yield response.token, response.logprobs

    return generate
