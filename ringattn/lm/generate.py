"""Generating text: mlx-lm's own loop on every rank, with each token sampled by rank 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..core.validation import check_int
from ..errors import ArgumentError
from ..transport.consensus import agree, raise_on_all_ranks
from ..transport.interface import Transport
from .choice import BEGIN, NEXT, Choice, Sampler, StoppedError
from .limits import check_memory, room_of
from .prompt import Prompt, prompt_ids, warn_of_length
from .rounds import SHORTEST, agree_on_round
from .shard import Sharded, everyone_of, sharded
from .sharding.cache_kinds import check_caches
from .sharding.forward_pass import ShardedCache

Processor = Callable[[mx.array, mx.array], mx.array]  # (all tokens so far, logits) -> logits


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    prefill_step_size: int | None = None,
    stopped: Callable[[], bool] | None = None,
    logits_processors: Sequence[Processor] | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    prompt_cache: Sequence[ShardedCache] | None = None,
    **options: Any,
) -> Iterator[Any]:
    """Generate text as `mlx_lm.stream_generate` does, on a model that went through `shard`. Collective.

    All ranks use rank 0's prompt and the tokens that rank 0 samples, so ranks on different machines never diverge.

    Args:
        model: A sharded model.
        tokenizer: Its tokenizer.
        prompt: Text, or token ids as an MLX or NumPy array ``[tokens]`` or a list; at least one token. Only rank 0's is
            used.
        max_tokens: Tokens to generate, the same on every rank; -1 for no limit. Memory for so many is reserved, and
            without a limit for the prompt alone.
        sampler: mlx-lm's: a function of log-probabilities ``[1, vocabulary]`` that returns a token ``[1]``. Default:
            the likeliest token.
        prefill_step_size: Tokens that each rank computes in one round of prefill; in mlx-lm, tokens of the whole round.
            With more tokens a rank needs more memory and sends fewer bytes in all. Default: as many as the memory
            allows, while the ranks hold about equal parts and a round takes no more than about 20 s; at least 512. The
            older name `chunk` works too.
        stopped: Called on rank 0 before each round of prefill and for each token; True ends the text on every rank. The
            cache then holds the tokens read and generated so far, and may hold one token that was not yielded.
        logits_processors: mlx-lm's; those of rank 0 are used. They get the tokens of `prompt_cache` too, as if all were
            one prompt.
        prompt_progress_callback: mlx-lm's; each rank may have its own.
        prompt_cache: A cache to continue, from the model's `make_cache` or from `load_cache`. Default: a new one.
        **options: Other options of mlx-lm, which are refused by name.

    Yields:
        mlx-lm's `GenerationResponse`, the same on every rank, except that logits processors change `logprobs` on rank 0
        only.

    Raises:
        ArgumentError: The model is not sharded, the prompt has no token or an unknown one, an option is not supported,
            an option differs between ranks, or a rank has too little memory for the context and an answer of
            `max_tokens`, which is checked before the prompt is read. An error on one rank (also in `sampler`,
            `stopped`, a logits processor or `prompt_progress_callback`) is raised on every rank, and the ring still
            works afterwards. A rank that leaves the text before the others gets the error from its next call.

    Warns:
        ContextWarning: On rank 0, where the prompt is longer than the model's longest context.
    """
    import mlx_lm

    ring = everyone_of(known := sharded(model))
    ids: np.ndarray | None = None
    with raise_on_all_ranks(ring, BEGIN):
        prefill_step_size = checked_prefill_step_size(prefill_step_size, options)
        _check_max_tokens(max_tokens)
        empty = known.make_cache()
        cache = empty if prompt_cache is None else prompt_cache
        leaves = check_caches("prompt_cache", cache, empty)
        held = leaves[0].tokens.reshape(-1)
        if ring.rank == 0:
            ids = prompt_ids(tokenizer, prompt, model)
            warn_of_length(model, held.size, ids.size)
        longest = room_of(known, ring, prefill_step_size or SHORTEST).longest
    shared_ids, step = _agree(known, held, ids, longest, max_tokens, prefill_step_size)
    for leaf in leaves:
        leaf.unread = held.size + shared_ids.size - 1  # mlx-lm reads all tokens but the last one for the caches alone
        if prompt_cache is not None:
            leaf.expect_prompt(shared_ids.size)
    choice = Choice(ring, sampler or _likeliest, stopped, prompt_progress_callback)
    try:
        for response in mlx_lm.stream_generate(
            model,
            tokenizer,
            shared_ids,
            max_tokens=max_tokens,
            sampler=choice.token,
            logits_processors=[_with_history(ring, held, one) for one in logits_processors or () if ring.rank == 0],
            prompt_progress_callback=choice.progress,
            prefill_step_size=step,
            prompt_cache=cache,
        ):
            if choice.ended:
                return
            yield response
    except StoppedError:
        return
    finally:
        for leaf in leaves:
            leaf.marks = ()
            leaf.unread = 0


def _agree(
    model: Sharded, held: np.ndarray, ids: np.ndarray | None, longest: int, max_tokens: int, step: int | None
) -> tuple[mx.array, int]:
    """Agree on a text, and check that all ranks have the memory for it. Collective.

    Args:
        model: The sharded model.
        held: The ids of the tokens in its cache.
        ids: The prompt, on rank 0.
        longest: The longest context for which this rank has memory.
        max_tokens: The tokens to generate.
        step: The tokens of a rank in one round of prefill, if they are given.

    Returns:
        The prompt, and the tokens of all ranks in one round.
    """
    ring = everyone_of(model)
    cached = f"{held.size} tokens, digest {blake2b(held.tobytes(), digest_size=4).hexdigest()}"
    fields = {"max_tokens": max_tokens, "prefill_step_size": step, "prompt_cache": cached}
    numbers = np.array([longest, 0 if ids is None else ids.size], np.int64)
    described = tuple((name, str(value)) for name, value in fields.items())
    with ring.call(BEGIN):
        replies = agree(ring, BEGIN, described, payload=[memoryview(numbers.tobytes())])
    table = np.array([np.frombuffer(reply, np.int64) for reply in replies])
    context = held.size + int(table[0, 1])
    check_memory(model, ring, context, int(table[:, 0].min()), step or SHORTEST, answer=max(0, max_tokens))
    shared = ring.broadcast(None if ids is None else mx.array(ids))
    return shared, (step or 0) * model.ring.size or agree_on_round(model, ring, held.size, shared.size)


def checked_prefill_step_size(size: int | None, options: dict[str, Any] | None = None) -> int | None:
    """The tokens of a rank in one round, if they are given; `options` may have nothing but its older name."""
    options = options or {}
    name = "prefill_step_size"
    if size is None and "chunk" in options:
        name = "chunk"
        size = options.pop(name)
    if options:
        raise ArgumentError(f"{next(iter(options))}: not supported over a ring")
    return None if size is None else check_int(name, size, 1)


def _check_max_tokens(max_tokens: int) -> None:
    if check_int("max_tokens", max_tokens, -1) == 0:
        raise ArgumentError("max_tokens: 0, expected at least 1, or -1 for no limit")


def _with_history(ring: Transport, held: np.ndarray, processor: Processor) -> Processor:
    """A `processor` that also gets the tokens `held` before the prompt. Its errors are raised on all ranks."""
    before = mx.array(held)

    @raise_on_all_ranks(ring, NEXT)
    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        return processor(mx.concatenate([before, tokens]), logits)

    return process


def _likeliest(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)
