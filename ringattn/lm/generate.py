"""Generating text: mlx-lm's own loop, on every rank, with each token decided by one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..comm.base import Ring
from ..errors import ArgumentError
from .model import Sharded

CHUNK = 2048  # tokens a rank computes in one round of prefill, on a CPU
CHUNK_GPU = 8192  # and on a GPU: the longer, the less travels for each token

Sampler = Callable[[mx.array], mx.array]


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | mx.array | Sequence[int],
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    chunk: int | None = None,
    **options: Any,
) -> Iterator[Any]:
    """As `mlx_lm.stream_generate`, on a model that went through `shard`. Collective.

    Rank 0's prompt is everybody's, and so is each token that rank 0 samples, so that ranks on different machines never
    part ways.

    Args:
        model: Sharded.
        tokenizer: Its tokenizer.
        prompt: Text or token ids, at least one; what ranks but 0 give is not looked at.
        max_tokens: Tokens to generate, the same on every rank.
        sampler: Log-probabilities ``[1, vocabulary]`` to a token ``[1]``, as mlx-lm's. Default: the likeliest.
        chunk: Tokens that a rank computes in one round of prefill: its memory grows with them, and what travels
            falls. Default: 2048 on a CPU, 8192 on a GPU.
        **options: Of mlx-lm's `generate_step`, the same on every rank: `prompt_cache`, `logits_processors`,
            `prompt_progress_callback` and so on.

    Yields:
        mlx-lm's `GenerationResponse`, on every rank the same.

    Raises:
        ArgumentError: The model is not sharded, or the prompt is empty.
    """
    import mlx_lm

    if not isinstance(model, Sharded):
        raise ArgumentError("model: not sharded, expected one that went through ringattn.lm.shard")
    ring = model.ring
    if chunk is None:
        chunk = CHUNK if mx.default_device().type == mx.DeviceType.cpu else CHUNK_GPU
    ids = shared_prompt(ring, tokenizer, prompt)
    if not ids.size:
        raise ArgumentError("prompt: no token, expected at least one")
    yield from mlx_lm.stream_generate(
        model,
        tokenizer,
        ids,
        max_tokens=max_tokens,
        sampler=decided(ring, sampler or _likeliest),
        prefill_step_size=chunk * ring.size,
        **options,
    )


def shared_prompt(ring: Ring, tokenizer: Any, prompt: str | mx.array | Sequence[int]) -> mx.array:
    """The ids of rank 0's prompt, int32, on every rank."""
    if ring.rank:
        return ring.broadcast(None)
    if isinstance(prompt, str):
        special = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
        prompt = tokenizer.encode(prompt, add_special_tokens=special)
    return ring.broadcast(mx.array(prompt if isinstance(prompt, mx.array) else list(prompt), mx.int32))


def decided(ring: Ring, sampler: Sampler) -> Sampler:
    """`sampler`, whose choice on rank 0 is that of every rank."""
    return lambda logprobs: ring.broadcast(None if ring.rank else sampler(logprobs))


def _likeliest(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)
