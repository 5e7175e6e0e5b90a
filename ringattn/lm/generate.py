"""Generating text: mlx-lm's own loop, on every rank, with each token decided by one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..core.validation import check_int
from ..errors import ArgumentError
from ..transport.consensus import raise_on_all_ranks
from ..transport.interface import Transport
from .choice import BEGIN, NEXT, Choice, Sampler, StoppedError, agreed
from .prompt import Prompt, prompt_ids, warn_of_length
from .shard import Sharded
from .sharded_cache import ShardedKVCache

CHUNK = 512  # tokens a rank computes in one round of prefill, on a CPU: one round is a few seconds' work
CHUNK_GPU = 8192  # and on a GPU: the longer, the less travels for each token

Processor = Callable[[mx.array, mx.array], mx.array]  # (all tokens so far, logits) to logits


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    chunk: int | None = None,
    stopped: Callable[[], bool] | None = None,
    logits_processors: Sequence[Processor] | None = None,
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
        prompt: Text, or token ids as an MLX or NumPy array ``[tokens]`` or a list; at least one token. What ranks but 0
            give is not looked at.
        max_tokens: Tokens to generate, the same on every rank; -1 for no limit.
        sampler: Log-probabilities ``[1, vocabulary]`` to a token ``[1]``, as mlx-lm's. Default: the likeliest.
        chunk: Tokens that a rank computes in one round of prefill: its memory grows with them, and what travels
            falls. Default: 512 on a CPU, 8192 on a GPU.
        stopped: Asked on rank 0 before each round of prefill and for each token; True ends the text on every rank. The
            cache then holds what was read and said so far, and may hold one token more than was given out.
        logits_processors: mlx-lm's; those of rank 0 are used. They see the tokens of `prompt_cache` too, as if all had
            come in one prompt.
        prompt_progress_callback: mlx-lm's; a rank may have its own.
        prompt_cache: What the model's `make_cache` or `load_cache` gave, to go on from. Default: a new one.
        **options: mlx-lm has more, which are refused by name.

    Yields:
        mlx-lm's `GenerationResponse`, on every rank the same but for the `logprobs`, which logits processors change on
        rank 0 alone.

    Raises:
        ArgumentError: The model is not sharded, the prompt has no token or one that the model does not know, there is
            no such option here, or an option that is to be the same on every rank differs. What goes wrong on one rank
            (also in `sampler`, `stopped`, a logits processor or `prompt_progress_callback`) is raised on every rank,
            and the ring still works. A rank that leaves the text early, which the others go on with, gets the error
            from its next call.

    Warns:
        ContextWarning: On rank 0, where the prompt passes the longest context that the model knows.
    """
    import mlx_lm

    if not isinstance(model, Sharded):
        raise ArgumentError("model: not sharded, expected one that went through ringattn.lm.shard")
    ring = model.ring
    ids: np.ndarray | None = None
    with raise_on_all_ranks(ring, BEGIN):
        chunk = _checked_chunk(chunk, options)
        _check_max_tokens(max_tokens)
        held = _checked_tokens(model, prompt_cache)
        if ring.rank == 0:
            ids = prompt_ids(tokenizer, prompt, model)
            warn_of_length(model, held.size, ids.size)
    told = (("max_tokens", str(max_tokens)), ("chunk", str(chunk)), ("prompt_cache", f"{held.size} tokens"))
    agreed(ring, BEGIN, told)
    choice = Choice(ring, sampler or _likeliest, stopped, prompt_progress_callback)
    try:
        for response in mlx_lm.stream_generate(
            model,
            tokenizer,
            ring.broadcast(None if ids is None else mx.array(ids)),
            max_tokens=max_tokens,
            sampler=choice.token,
            logits_processors=[_whole(ring, held, one) for one in logits_processors or () if ring.rank == 0],
            prompt_progress_callback=choice.progress,
            prefill_step_size=chunk * ring.size,
            prompt_cache=prompt_cache,
        ):
            if choice.ended:
                return
            yield response
    except StoppedError:
        return


def _checked_chunk(chunk: int | None, options: dict[str, Any]) -> int:
    for name in options:
        instead = ", expected chunk: tokens of a rank" if name == "prefill_step_size" else ""
        raise ArgumentError(f"{name}: not supported over a ring{instead}")
    if chunk is not None:
        return check_int("chunk", chunk, 1)
    return CHUNK if mx.default_device().type == mx.DeviceType.cpu else CHUNK_GPU


def _check_max_tokens(max_tokens: int) -> None:
    if check_int("max_tokens", max_tokens, -1) == 0:
        raise ArgumentError("max_tokens: 0, expected at least 1, or -1 for no limit")


def _checked_tokens(model: Sharded, cache: Sequence[ShardedKVCache] | None) -> np.ndarray:
    """The ids of the tokens that a cache of the model holds."""
    if cache is None:
        return np.zeros(0, np.int32)
    kinds = [type(layer).__name__ for layer in cache]
    if kinds != [ShardedKVCache.__name__] * len(model.windows):
        raise ArgumentError(
            f"prompt_cache: {', '.join(dict.fromkeys(kinds)) or 'nothing'} in {len(kinds)} layers, expected what the "
            f"model's make_cache or load_cache gives: ShardedKVCache in {len(model.windows)} layers"
        )
    return cache[0].tokens.reshape(-1)


def _whole(ring: Transport, held: np.ndarray, processor: Processor) -> Processor:
    """`processor`, given the tokens `held` before those of the prompt. What goes wrong in it is heard on all ranks."""
    before = mx.array(held)

    @raise_on_all_ranks(ring, NEXT)
    def whole(tokens: mx.array, logits: mx.array) -> mx.array:
        return processor(mx.concatenate([before, tokens]), logits)

    return whole


def _likeliest(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)
