"""Generating text: mlx-lm's own loop, on every rank, with each token decided by one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..core.validation import check_int
from ..errors import ArgumentError
from ..transport.base import Ring
from ..transport.consensus import heard
from .shard import Sharded
from .sharded_cache import ShardedKVCache

CHUNK = 512  # tokens a rank computes in one round of prefill, on a CPU: one round is a few seconds' work
CHUNK_GPU = 8192  # and on a GPU: the longer, the less travels for each token

Sampler = Callable[[mx.array], mx.array]
Processor = Callable[[mx.array, mx.array], mx.array]  # (all tokens so far, logits) to logits


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | mx.array | Sequence[int],
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    chunk: int | None = None,
    stopped: Callable[[], bool] | None = None,
    logits_processors: Sequence[Processor] = (),
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    prompt_cache: Sequence[ShardedKVCache] | None = None,
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
            falls. Default: 512 on a CPU, 8192 on a GPU.
        stopped: Asked on rank 0 before each round of prefill and for each token; True ends the text on every rank. The
            cache then holds what was read and said so far, and may hold one token more than was given out.
        logits_processors: mlx-lm's; those of rank 0 are used.
        prompt_progress_callback: mlx-lm's; a rank may have its own.
        prompt_cache: What the model's `make_cache` or `load_cache` gave, to go on from. Default: a new one.
        **options: mlx-lm has more, which are refused by name.

    Yields:
        mlx-lm's `GenerationResponse`, on every rank the same but for the `logprobs`, which logits processors change on
        rank 0 alone.

    Raises:
        ArgumentError: The model is not sharded, the prompt is empty, or there is no such option here.
    """
    import mlx_lm

    if not isinstance(model, Sharded):
        raise ArgumentError("model: not sharded, expected one that went through ringattn.lm.shard")
    ring = model.ring
    for name in options:
        instead = ", expected chunk: tokens of a rank" if name == "prefill_step_size" else ""
        raise ArgumentError(f"{name}: not supported over a ring{instead}")
    if chunk is not None:
        check_int("chunk", chunk, 1)
    else:
        chunk = CHUNK if mx.default_device().type == mx.DeviceType.cpu else CHUNK_GPU
    ids = shared_prompt(ring, tokenizer, prompt)
    if not ids.size:
        raise ArgumentError("prompt: no token, expected at least one")
    choice = Choice(ring, sampler or _likeliest, stopped, prompt_progress_callback)
    try:
        for response in mlx_lm.stream_generate(
            model,
            tokenizer,
            ids,
            max_tokens=max_tokens,
            sampler=choice.token,
            logits_processors=[heard(ring, "broadcast")(one) for one in logits_processors if ring.rank == 0],
            prompt_progress_callback=choice.progress,
            prefill_step_size=chunk * ring.size,
            prompt_cache=prompt_cache,
        ):
            if choice.ended:
                return
            yield response
    except _Stopped:
        return


def shared_prompt(ring: Ring, tokenizer: Any, prompt: str | mx.array | Sequence[int]) -> mx.array:
    """The ids of rank 0's prompt, int32, on every rank."""
    if ring.rank:
        return ring.broadcast(None)
    if isinstance(prompt, str):
        special = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
        prompt = tokenizer.encode(prompt, add_special_tokens=special)
    return ring.broadcast(mx.array(prompt if isinstance(prompt, mx.array) else list(prompt), mx.int32))


class _Stopped(Exception):  # noqa: N818  (a way out, no error)
    """The text ends in the middle of its prompt."""


class Choice:
    """What rank 0 decides for all: each token, and whether there is to be another one.

    Attributes:
        ended: Whether the text has ended before its time.
    """

    def __init__(
        self,
        ring: Ring,
        sampler: Sampler,
        stopped: Callable[[], bool] | None,
        progress: Callable[[int, int], None] | None,
    ):
        self.ended = False
        self._ring, self._sampler, self._stopped, self._progress = ring, sampler, stopped, progress

    def token(self, logprobs: mx.array) -> mx.array:
        """Rank 0's sample ``[1]``, on every rank."""
        own: mx.array | None = None
        if self._ring.rank == 0:
            with heard(self._ring, "broadcast"):
                own = mx.concatenate([self._sampler(logprobs).astype(mx.int32), self._end()])
        told = self._ring.broadcast(own)
        self.ended = bool(told[1].item())
        return told[:1]

    def progress(self, done: int, total: int) -> None:
        """mlx-lm's call after each round of prefill: the place to end it."""
        if self._progress is not None:
            self._progress(done, total)
        if done < total and self._ring.broadcast(None if self._ring.rank else self._end()).item():
            raise _Stopped

    def _end(self) -> mx.array:
        return mx.array([self._stopped is not None and self._stopped()], mx.int32)


def _likeliest(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)
