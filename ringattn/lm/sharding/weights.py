"""Dividing a model's weights among the ranks of a row, by the model's own ``shard`` of mlx-lm."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ...errors import UnsupportedModelError
from ..mlx_lm_compat import model_args, model_name


def shard_weights(model: nn.Module, group: mx.distributed.Group) -> None:
    """Keep this rank's part of the weights of `model`, in place. Nothing is evaluated.

    Raises:
        UnsupportedModelError: The family has no ``shard`` in mlx-lm, or its heads or layers cannot be divided.
    """
    name = model_name(model)
    size = group.size()
    if not hasattr(model, "shard"):
        raise UnsupportedModelError(f"model: mlx-lm cannot divide the weights of {name} (no shard), expected tensor=1")
    heads = getattr(model_args(model), "num_attention_heads", None)
    if isinstance(heads, int) and heads % size:
        raise UnsupportedModelError(f"tensor: {size}, expected a divisor of {heads}, the attention heads of {name}")
    before = _integers(model)
    whole = _sizes(model)
    try:
        model.shard(group)
    except (ValueError, AttributeError, TypeError, RuntimeError, AssertionError) as error:
        why = " ".join(str(error).split())
        raise UnsupportedModelError(f"tensor: {size}, and mlx-lm cannot divide {name} by it: {why}") from None
    for where, value in _integers(model).items():
        # mlx-lm rounds: three heads over two ranks would be one head a rank, of another size.
        if where in before and before[where] not in (value, value * size):
            raise UnsupportedModelError(
                f"tensor: {size}, expected a divisor of {before[where]}, the {where[1]} of {name}"
            )
    for path, own in _sizes(model).items():
        if path in whole and whole[path] not in (own, own * size):  # values would be lost
            raise UnsupportedModelError(f"tensor: {size}, expected a divisor of the sizes of {path} of {name}")


def group_of(model: nn.Module) -> mx.distributed.Group | None:
    """The group over which the weights of `model` are divided; ``None`` where each rank has all of them."""
    values = (value for part in model.modules() for value in vars(part).values())
    groups = (value for value in values if isinstance(value, mx.distributed.Group))
    return next((group for group in groups if group.size() > 1), None)


def check_no_pipeline(model: nn.Module) -> None:
    """Raise UnsupportedModelError if mlx-lm's ``pipeline`` has divided the layers among ranks."""
    stages = max((getattr(part, "pipeline_size", 1) for part in model.modules()), default=1)
    if stages > 1:
        raise UnsupportedModelError(
            f"model: the layers of {model_name(model)} are divided into {stages} stages by pipeline, expected all "
            "layers on every rank: divide the weights with ringattn.grid instead"
        )


def evaluate_weights(model: nn.Module) -> None:
    """Read or compute the weights one after the other, so that memory holds at most one that is not divided yet."""
    leaves: Any = tree_flatten(model.parameters())
    for _, weight in leaves:
        mx.eval(weight)
        mx.clear_cache()  # MLX would keep the memory of the whole tensor for later arrays


def _sizes(model: nn.Module) -> dict[str, int]:
    """The number of values of each weight, by its name."""
    leaves: Any = tree_flatten(model.parameters())
    return {path: weight.size for path, weight in leaves}


def _integers(model: nn.Module) -> dict[tuple[str, str], int]:
    """All integers among the attributes of the model's parts, by the part's path and the attribute's name."""
    return {
        (path, name): value
        for path, part in model.named_modules()
        for name, value in vars(part).items()
        if type(value) is int and "heads" in name
    }
