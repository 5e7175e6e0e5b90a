"""Fingerprints of models, a few hundred bytes each: a cache is of use only to the model that made it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ...transport.collectives import broadcast_bytes, to_bytes
from ...transport.consensus import raise_on_all_ranks
from ...transport.interface import Transport
from ..mlx_lm_compat import model_args

SAMPLES = 8  # values along each axis of a parameter that the digest covers: cheap for any size


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Describe the model in JSON's types: the same for the same weights in every process and on every machine.

    Returns:
        The model's module, its configuration, the dtypes of its parameters, and a digest of their names, shapes and
        dtypes and of some of their values, as they are stored.
    """
    leaves: Any = tree_flatten(model.parameters())
    parameters: list[tuple[str, mx.array]] = sorted(leaves, key=lambda leaf: leaf[0])
    digest = blake2b(digest_size=16)
    for name, x in parameters:
        digest.update(f"{name} {x.shape} {x.dtype}\n".encode())
        digest.update(to_bytes(_sample(x)))
    config = json.dumps(model_args(model), default=_fields)
    return {
        "module": type(model).__module__,
        "config": json.loads(config) or {},
        "dtypes": sorted({str(x.dtype).rpartition(".")[2] for _, x in parameters}),
        "parameters": digest.hexdigest(),
    }


def shared_fingerprint(ring: Transport, model: nn.Module) -> dict[str, Any]:
    """Rank 0's fingerprint, on every rank: machines that converted weights may differ in the last bits."""
    own: bytes | None = None
    if ring.rank == 0:
        with raise_on_all_ranks(ring, "broadcast"):
            own = json.dumps(fingerprint(model)).encode()
    found: dict[str, Any] = json.loads(broadcast_bytes(ring, own))
    return found


def difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """Describe the first difference of two fingerprints; ``None`` where they are equal."""
    if found["module"] != expected["module"]:
        return f"module {found['module']}, expected {expected['module']}"
    for name in sorted(found["config"].keys() | expected["config"].keys()):
        one, other = (side["config"].get(name) for side in (found, expected))
        if one != other:
            return f"{name} {one!r}, expected {other!r}"
    if found["dtypes"] != expected["dtypes"]:
        return f"parameters of {' and '.join(found['dtypes'])}, expected {' and '.join(expected['dtypes'])}"
    if found["parameters"] != expected["parameters"]:
        return f"parameters with the digest {found['parameters']}, expected {expected['parameters']}"
    return None


def _sample(x: mx.array) -> mx.array:
    """Evenly spaced values of `x`."""
    return x[tuple(slice(None, None, max(1, n // SAMPLES)) for n in x.shape)] if x.ndim else x


def _fields(value: Any) -> Any:
    """Convert a value that `json` cannot: to its attributes, or to a text."""
    return vars(value) if hasattr(value, "__dict__") else str(value)
