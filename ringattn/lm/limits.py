"""Limits that a model's configuration sets for its input: the token ids, and the number of positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.nn as nn

from .mlx_lm_compat import model_args

POSITIONS = ("max_position_embeddings", "n_positions", "model_max_length", "n_ctx")  # names for the longest context


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
