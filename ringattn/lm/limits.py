"""Limits of a model's input: its configuration's token ids and positions, and the memory of the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import mlx.nn as nn

from ..errors import ArgumentError
from ..transport.consensus import agree, raise_on_all_ranks
from ..transport.interface import Transport
from .host_memory import MEMORY, memory_of_rank
from .memory import Footprint
from .mlx_lm_compat import model_args

POSITIONS = ("max_position_embeddings", "n_positions", "model_max_length", "n_ctx")  # names for the longest context
GIB = 1 << 30
SHORTEN = "Shorten the prompt, add ranks"
DIVIDE = "The weights leave no room: divide them among ranks (--tensor)"


def vocabulary(model: nn.Module) -> int:
    """The number of token ids that the model knows."""
    sizes = [config["vocab_size"] for config in _configurations(model) if isinstance(config.get("vocab_size"), int)]
    if sizes:
        return sizes[0]
    tables = [part.weight for part in model.modules() if isinstance(part, nn.Embedding | nn.QuantizedEmbedding)]
    return max(int(table.shape[0]) for table in tables)


def context_limit(model: nn.Module) -> int | None:
    """The tokens of context that the model was made for, with those that its rope's scaling adds; ``None``: unknown."""
    for config in _configurations(model):
        limits = [config[name] for name in POSITIONS if isinstance(config.get(name), int)]
        if limits:
            return max(limits[0], _stretched(config))
    return None


def longest_context(model: Any, everyone: Transport, chunk: int) -> tuple[int, int]:
    """Tokens of context for which the memory of a rank is enough, and that memory in bytes.

    Args:
        model: A sharded model.
        everyone: All ranks.
        chunk: Tokens that a rank computes in a round of prefill.
    """
    available = memory_of_rank(everyone)
    return _longest(model.footprint, available, *_share(model, chunk)), available


def agree_on_longest(model: Any, everyone: Transport, chunk: int) -> int:
    """The smallest of all ranks' `longest_context`. Collective."""
    what = "the longest context"
    with raise_on_all_ranks(everyone, what):
        own, _ = longest_context(model, everyone, chunk)
    with everyone.call(what):
        replies = agree(everyone, what, payload=[memoryview(own.to_bytes(8, "little"))])
    return min(int.from_bytes(reply, "little") for reply in replies)


def check_memory(model: Any, everyone: Transport, tokens: int, longest: int, chunk: int) -> None:
    """Raise on every rank if the context does not fit in the memory of one. Collective where it does not.

    Args:
        model: A sharded model.
        everyone: All ranks.
        tokens: Tokens of the context.
        longest: The smallest of all ranks' `longest_context`.
        chunk: As in `longest_context`.

    Raises:
        ArgumentError: `tokens` is above `longest`.
    """
    if tokens <= longest:
        return
    with raise_on_all_ranks(everyone, "stream_generate"):
        own, available = longest_context(model, everyone, chunk)
        if own < tokens:
            needed = model.footprint.needed(tokens, *_share(model, chunk))
            raise ArgumentError(
                f"prompt: {tokens:,} tokens of context need {needed / GIB:.2f} GiB on rank {everyone.rank} "
                f"({everyone.hosts[everyone.rank]}), which has {available / GIB:.2f} GiB; {longest:,} tokens fit. "
                f"{SHORTEN if longest else DIVIDE}, or set {MEMORY} if the rank may use more"
            )
    agree(everyone, "stream_generate")


@lru_cache(maxsize=16)
def _longest(footprint: Footprint, available: int, share: float, chunk: int) -> int:
    return footprint.longest(available, share, chunk)


def _share(model: Any, chunk: int) -> tuple[float, int]:
    """The part of the context that this rank holds, and the tokens that it computes in a round of prefill."""
    share = model.weights[model.ring.rank] / sum(model.weights)
    return share, int(chunk * share * len(model.weights))


def _configurations(model: nn.Module) -> Iterator[Mapping[str, Any]]:
    """The configurations of the model and its parts, the outermost first."""
    for part in (model, *model.modules()):
        args = model_args(part)
        if hasattr(args, "__dict__"):
            yield vars(args)


def _stretched(config: Mapping[str, Any]) -> int:
    """The context that the rope's scaling allows; 0 where the configuration has no factor and original length."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(scaling, Mapping):
        return 0
    factor = scaling.get("factor")
    original = scaling.get("original_max_position_embeddings")
    if not isinstance(factor, int | float) or not isinstance(original, int | float):
        return 0
    return int(factor * original)
