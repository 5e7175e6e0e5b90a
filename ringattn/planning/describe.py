"""Shapes of language models, from a loaded or an unread model of mlx-lm, or from a folder or repository."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from ..errors import ArgumentError, RingAttentionError
from ..extras import require
from ..lm import mlx_lm_compat as compat
from ..lm import shard
from ..lm.gguf import find_smollm2, load_gguf
from ..lm.limits import context_limit
from ..lm.load import SMOLLM2
from ..reporting.hub import why_not_found
from ..ring.schedule import Sizes
from ..transport import init
from .shape import Attending, ModelShape

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def read_shape(path: str, dtype: str | None = None) -> ModelShape:
    """The shape of a model of which no weight is read.

    Args:
        path: A ``config.json`` of mlx-lm, a folder with one, the name of a repository on Hugging Face (only its
            configuration is fetched), a GGUF file, or ``"smollm2"``.
        dtype: The type that all weights are converted to, as in `ringattn.lm.load`.

    Raises:
        ArgumentError: There is no such model, or mlx-lm or ringattn cannot run it.
    """
    require("mlx_lm", "ringattn[lm]")
    file = find_smollm2() if path == SMOLLM2 else Path(path)
    try:
        model = _model(file, path)
        if dtype is not None:
            model = compat.dequantize_model(model)
            model.update(tree_map(lambda x: _cast(x, DTYPES[dtype]), model.parameters()))
        return shape_of(Path(path).name, model)
    except RingAttentionError as error:
        raise ArgumentError(f"--model: {path}: {error}") from None
    except Exception as error:  # mlx-lm raises anything for a configuration that it does not know
        raise ArgumentError(f"--model: {path}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from None


def _model(file: Path, path: str) -> nn.Module:
    """The model of a file or a folder, or one with the configuration of `path`. No weight is read."""
    if file.suffix == ".gguf":
        return load_gguf(file, None)[0]
    if next(file.glob("model*.safetensors"), None) is not None:
        model: nn.Module = compat.load_model(file, lazy=True)[0]
        return model
    return unread_model(_config(path))


def unread_model(config: Mapping[str, Any]) -> nn.Module:
    """A model of mlx-lm with this configuration, whose weights are not evaluated."""
    kind, arguments = compat.model_classes(dict(config))
    model: nn.Module = kind(arguments.from_dict(dict(config)))
    name = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
    dtype = DTYPES.get(name, mx.bfloat16)
    model.update(tree_map(lambda x: _cast(x, dtype), model.parameters()))
    quantization = config.get("quantization")
    if quantization:
        nn.quantize(
            model,
            group_size=quantization["group_size"],
            bits=quantization["bits"],
            mode=quantization.get("mode", "affine"),
            class_predicate=lambda path, part: quantization.get(path, hasattr(part, "to_quantized")),
        )
    return model


def shape_of(name: str, model: nn.Module) -> ModelShape:
    """The shape of a model of mlx-lm. The model is spread over one rank, as by `ringattn.lm.shard`.

    Raises:
        UnsupportedModelError: The model cannot be spread over a ring.
    """
    sharded: Any = shard(model, init("solo"))
    args = _main_args(model)
    heads = getattr(args, "num_attention_heads", None) or 1
    depth = len(model.layers)
    footprint = sharded.footprint
    kinds = Counter(footprint.layers)
    attending = kinds.total()
    pair = sharded.cost.attention * depth / attending if attending else 0.0
    leaves: Any = tree_flatten(model.parameters())
    inside = sum(x.nbytes for path, x in leaves if ".layers." in f".{path}")
    item = _item(model)
    dim = pair / 4 / heads
    query = Sizes(int(heads * dim * item), int(heads * (dim + 2) * 4))
    hidden = getattr(args, "hidden_size", 0) * item
    outside = footprint.weights - inside
    linear = sharded.cost.linear * depth
    return ModelShape(
        name=name,
        depth=depth,
        attending=tuple(
            Attending(count, pair, layer.token_bytes, query, layer.heads, layer.window)
            for layer, count in kinds.items()
        ),
        hidden=hidden,
        linear=linear,
        divided=inside,
        whole=outside,
        read=int(inside * _active(sharded, linear)),
        head=outside if getattr(args, "tie_word_embeddings", False) else outside // 2,
        heads=heads,
        states=footprint.states,
        activations=footprint.activations,
        can_divide=hasattr(model, "shard"),
        positions=context_limit(model),
    )


def _active(model: Any, linear: float) -> float:
    """The part of the layers' weights that one token meets: below 1 where there are experts."""
    whole = 0.0
    for layer in model.layers:
        for part in layer.modules() if layer is not None else ():
            weight = part.get("weight") if isinstance(part, dict) else None
            if isinstance(weight, mx.array) and weight.ndim >= 2:
                whole += 2.0 * weight.size * (32 // part.bits if hasattr(part, "bits") else 1)
    return min(1.0, linear / whole) if whole else 1.0


def _main_args(model: nn.Module) -> Any:
    described = (compat.model_args(part) for part in (model, *model.modules()))
    return next((args for args in described if hasattr(args, "num_attention_heads")), None)


def _item(model: nn.Module) -> int:
    """Bytes of an element of the hidden state: those of the norms."""
    leaves: Any = tree_flatten(model.parameters())
    return int(next((x.dtype.size for _, x in leaves if x.ndim == 1), 2))


def _cast(x: mx.array, dtype: mx.Dtype) -> mx.array:
    return x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) else x


def _config(path: str) -> dict[str, Any]:
    """The configuration of a file, a folder or a repository."""
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
        if not file.is_file():
            raise ArgumentError("expected a folder with a model's config.json")
    if not file.exists():
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise ArgumentError("no such file or folder")
        file = _downloaded(path)
    try:
        config = json.loads(file.read_text())
    except ValueError:  # of JSON or of Unicode
        config = None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ArgumentError("expected a config.json of mlx-lm: a JSON object with model_type, or a folder with one")
    return config


def _downloaded(name: str) -> Path:
    """The configuration of a repository on Hugging Face."""
    from huggingface_hub import snapshot_download

    try:
        # Without a network, the download of one file alone retries for 23 s and prints each failure.
        file = Path(snapshot_download(name, allow_patterns=["config.json"]), "config.json")
    except Exception as error:  # of the network, of the name, of the disk
        raise ArgumentError(why_not_found(error, " ".join(str(error).split())[:300])) from None
    if not file.exists():
        raise ArgumentError("the repository has no config.json")
    return file
