"""The output layer of a new token over a ring of CPUs: each rank computes the logits of a part of the vocabulary.

Every rank computes a new token, so without this every rank would read all weights of the layer, which in a model of a
few layers or with a large vocabulary are a good part of all weights. Then the ranks exchange their logits. A GPU reads
the weights in less time than the exchange takes, so all ranks compute all logits if one of them has a GPU.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...core.device import uses_gpu
from ...layout import Layout
from ...ring.parts import Part, gather_parts
from ...transport.consensus import agree
from ...transport.interface import Transport
from .forward_pass import current
from .partition import LEAST_HEAD

WHAT = "the output layer"
RUN = 64  # a rank's part begins at a multiple, so that products have the same bits as in the whole layer


def patch_output_layers(model: nn.Module) -> None:
    """Divide the output layer of `model` in later passes over a ring. The weights stay whole on every rank."""
    for path, part in model.named_modules():
        kind = LINEAR.get(type(part)) if path.endswith("lm_head") else None
        kind = kind or EMBEDDINGS.get(type(part))
        if kind is not None:
            part.__class__ = kind
        if isinstance(part, _Divided):
            part._is_divided = None  # the ring may be another one


class _Divided:
    """Part of the classes that `patch_output_layers` gives to output layers; a layer's arrays have a row a logit.

    Attributes:
        _is_divided: Whether the ranks divide the logits; ``None`` before they have agreed.
    """

    _is_divided: bool | None = None

    def _divide(self, x: mx.array, method: str) -> mx.array:
        """The logits of x ``[batch, tokens, hidden]`` by the `method` of the layer's own class."""
        layer: Any = self
        plain = getattr(type(layer).__mro__[2], method)
        ring = _ring_of_new_token()
        size = sum(weight.nbytes for weight in layer.values() if isinstance(weight, mx.array))
        if ring is None or size < LEAST_HEAD:
            logits: mx.array = plain(layer, x)
            return logits
        if self._is_divided is None:
            self._is_divided = _without_gpus(ring)
        return _divided(layer, x, plain, ring) if self._is_divided else plain(layer, x)


class RingLinear(_Divided, nn.Linear):
    """Linear output layer."""

    def __call__(self, x: mx.array) -> mx.array:
        return self._divide(x, "__call__")


class RingQuantizedLinear(_Divided, nn.QuantizedLinear):
    """Quantised linear output layer."""

    def __call__(self, x: mx.array) -> mx.array:
        return self._divide(x, "__call__")


class RingEmbedding(_Divided, nn.Embedding):
    """Embedding that is the output layer too."""

    def as_linear(self, x: mx.array) -> mx.array:
        return self._divide(x, "as_linear")


class RingQuantizedEmbedding(_Divided, nn.QuantizedEmbedding):
    """Quantised embedding that is the output layer too."""

    def as_linear(self, x: mx.array) -> mx.array:
        return self._divide(x, "as_linear")


LINEAR: dict[type, type] = {nn.Linear: RingLinear, nn.QuantizedLinear: RingQuantizedLinear}
EMBEDDINGS: dict[type, type] = {nn.Embedding: RingEmbedding, nn.QuantizedEmbedding: RingQuantizedEmbedding}


def _ring_of_new_token() -> Transport | None:
    """The ring of a pass of one token whose logits are read, if it has several ranks; ``None`` elsewhere."""
    if not current.caches or not current.is_read:
        return None
    first = current.caches[0]
    is_one = first.step is not None and first.step.new.length == 1
    return first.ring if is_one and first.ring.size > 1 else None


def _without_gpus(ring: Transport) -> bool:
    """Whether all ranks compute on CPUs. Collective."""
    with ring.call(WHAT):
        return not any(reply[0] for reply in agree(ring, WHAT, payload=[memoryview(bytes([uses_gpu()]))]))


def _divided(layer: Any, x: mx.array, plain: Any, ring: Transport) -> mx.array:
    """The logits of all ranks. Collective."""
    rows = parts_of(len(layer.weight), ring.size)
    ((start, stop),) = rows.spans[ring.rank] or ((0, 0),)
    own = plain(_rows(layer, start, stop), x)
    parts = [Part(rank, (*x.shape[:-1], rows.local_length(rank))) for rank in range(ring.size)]
    with ring.call(WHAT):
        return mx.concatenate(gather_parts(ring, WHAT, parts, [own]), axis=-1)


def parts_of(rows: int, size: int) -> Layout:
    """Equal parts of a layer's rows, in the order of the ranks; they begin at multiples of `RUN`."""
    runs = -(-rows // RUN)
    ends = [min(rows, runs * rank // size * RUN) for rank in range(size)] + [rows]
    return Layout(tuple(((start, stop),) for start, stop in zip(ends, ends[1:])))


def _rows(layer: Any, start: int, stop: int) -> Any:
    """A layer with some of the rows of `layer`, which are not copied."""
    part = copy(layer)
    for name, array in layer.items():
        if isinstance(array, mx.array):
            part[name] = array[start:stop]
    return part
