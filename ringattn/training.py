"""Helpers for a training loop over a ring.

    layout = ra.Layout.zigzag(tokens.shape[1], ring.size)
    batch = shard_batch(tokens, layout, ring, segments=documents)

    def loss(model):
        losses = nn.losses.cross_entropy(model(batch), batch.targets)
        return mean_loss(losses, ring, weights=batch.weights)

    value, gradients = nn.value_and_grad(model, loss)(model)
    optimizer.update(model, sum_gradients(gradients, ring))

Every rank has the same weights and its own tokens. The gradient of a rank is that of its share of the mean loss. The
sum over the ranks is the gradient of the mean over all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from .autograd.checkpointing import ResultRecord
from .core.validation import check_array, check_int
from .errors import ArgumentError
from .layout import Layout
from .ring.call import check_layout, check_ring
from .transport.base import Ring
from .transport.consensus import agree, raise_on_all_ranks

__all__ = ["Batch", "checkpoint", "mean_loss", "shard_batch", "sum_gradients"]

BUCKET_BYTES = 32 << 20


class Batch(NamedTuple):
    """Part of a batch of sequences on this rank, in the order of ``layout.positions(rank)``.

    Attributes:
        tokens: Integers ``[batch, local tokens]``.
        targets: The next token in the whole sequence for each token, in the same shape.
        positions: The positions of the tokens in the sequence, int32 ``[local tokens]``.
        weights: float32 ``[batch, local tokens]``: 0 for tokens without a target (the end of a document or of the
            sequence, and padding), else 1.
        segments: Document ids ``[batch, local tokens]`` for `ring_attention`, or ``None``.
    """

    tokens: mx.array
    targets: mx.array
    positions: mx.array
    weights: mx.array
    segments: mx.array | None


def shard_batch(tokens: mx.array, layout: Layout, ring: Ring, *, segments: mx.array | None = None) -> Batch:
    """Cut this rank's part out of a batch that every rank has whole. Not collective.

    Args:
        tokens: Integers ``[batch, layout.length]``.
        layout: The positions of each rank.
        ring: The ring.
        segments: Integer ids of packed documents ``[batch, layout.length]``. The tokens of a document are contiguous.
            A negative id is padding. The last token of a document has no target.

    Raises:
        ArgumentError: If shapes or dtypes do not fit.
    """
    ring = check_ring(ring)
    check_array("tokens", tokens)
    if tokens.ndim != 2 or not mx.issubdtype(tokens.dtype, mx.integer):
        raise ArgumentError(f"tokens: {tokens.dtype} {tokens.shape}, expected integers [batch, tokens]")
    if segments is not None:
        _check_like("segments", segments, "tokens", tokens)
    if tokens.shape[1] != layout.length:
        raise ArgumentError(f"tokens: {tokens.shape[1]} tokens, expected {layout.length}, the length of layout")
    check_layout("layout", layout, ring, {})
    ids = np.zeros(tokens.shape, np.int64) if segments is None else np.array(segments)
    weights = np.zeros(tokens.shape, np.float32)
    weights[:, :-1] = (ids[:, 1:] == ids[:, :-1]) & (ids[:, :-1] >= 0)
    targets = mx.concatenate([tokens[:, 1:], tokens[:, :1]], 1)  # the last token has no target, and weight 0
    mine = [layout.shard(x, ring.rank, axis=1) for x in (tokens, targets, mx.array(weights))]
    own = None if segments is None else layout.shard(segments, ring.rank, axis=1)
    return Batch(mine[0], mine[1], mx.array(layout.positions(ring.rank)), mine[2], own)


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    """List the leaves of a tree by name."""
    named = tree_flatten(tree)
    assert isinstance(named, list)
    return named


def _check_like(name: str, x: Any, other: str, like: mx.array) -> None:
    check_array(name, x)
    if tuple(x.shape) != tuple(like.shape):
        raise ArgumentError(f"{name}: shape {tuple(x.shape)}, expected {tuple(like.shape)}, that of {other}")


def mean_loss(losses: mx.array, ring: Ring, *, weights: mx.array | None = None) -> mx.array:
    """Compute the weighted mean over all ranks' tokens, equal on every rank. Collective.

    Its gradient is that of this rank's share. `losses` stay in the graph even where all weights of this rank are 0. So
    a rank without targets still takes part in the collective gradient of `ring_attention`, and no rank waits for it.

    Args:
        losses: The loss of each token of this rank, in any shape, computed from the model's output.
        ring: The ring.
        weights: The weight of each token, in the same shape, not negative. Default: all 1.

    Returns:
        A float32 scalar: the sum of losses times weights, divided by the sum of weights; 0 if that sum is 0.

    Raises:
        ArgumentError: If shapes differ. Raised on every rank.
    """
    ring = check_ring(ring)
    with ring.call("mean_loss"), raise_on_all_ranks(ring, "mean_loss"):
        check_array("losses", losses)
        if weights is not None:
            _check_like("weights", weights, "losses", losses)
    weights = mx.ones(losses.shape) if weights is None else weights.astype(mx.float32)
    own = (mx.where(weights == 0, 0.0, losses.astype(mx.float32)) * weights).sum()
    total, count = ring.all_reduce(mx.stop_gradient(mx.stack([own, weights.sum()])))
    count = mx.where(count == 0, 1.0, count)
    share = own / count
    return total / count + (share - mx.stop_gradient(share))


def sum_gradients(gradients: Any, ring: Ring, *, bucket_bytes: int = BUCKET_BYTES) -> Any:
    """Sum all ranks' parameter gradients, to the same bits on every rank. Collective.

    With `mean_loss`, which gives every rank its share, the sum is the gradient of the mean over all tokens.

    Args:
        gradients: A tree of arrays, of the same structure and shapes on every rank.
        ring: The ring.
        bucket_bytes: The largest size of a bucket. Arrays of one dtype are sent together in buckets: many small arrays
            take as few messages as a large one, and never are all arrays copied at once.

    Returns:
        A tree of the same structure.

    Raises:
        ArgumentError: If the ranks' trees differ. Raised on every rank.
    """
    ring = check_ring(ring)
    named = _leaves(gradients)
    with ring.call("sum_gradients"):
        with raise_on_all_ranks(ring, "sum_gradients"):
            bucket_bytes = check_int("bucket_bytes", bucket_bytes, 1)
            for name, x in named:
                check_array(f"gradients: {name}", x)
            tree = blake2b(repr([(name, str(x.dtype), x.shape) for name, x in named]).encode()).hexdigest()
        agree(ring, "sum_gradients", (("bucket_bytes", str(bucket_bytes)), ("digest of the tree", tree)))
    summed: dict[str, mx.array] = {}
    for bucket in _buckets(named, bucket_bytes):
        whole = ring.all_reduce(mx.concatenate([x.reshape(-1) for _, x in bucket]))
        at = 0
        for name, x in bucket:
            summed[name] = whole[at : at + x.size].reshape(x.shape)
            at += x.size
    return tree_unflatten([(name, summed[name]) for name, _ in named])


def _buckets(named: list[tuple[str, mx.array]], most: int) -> Iterator[list[tuple[str, mx.array]]]:
    """Yield runs of arrays of one dtype with at most `most` bytes, or of one array. Equal trees give equal runs."""
    bucket: list[tuple[str, mx.array]] = []
    size = 0
    for name, x in named:
        if bucket and (x.dtype != bucket[0][1].dtype or size + x.nbytes > most):
            yield bucket
            bucket = []
            size = 0
        bucket.append((name, x))
        size += x.nbytes
    if bucket:
        yield bucket


def checkpoint(module: nn.Module, fn: Callable | None = None) -> Callable:
    """Run `module`, or `fn`, without keeping intermediate results: the gradient recomputes them.

    Like ``mlx.nn.utils.checkpoint``, but it keeps the results (`out` and lse) of `ring_attention` and `attention`, so
    that the ring's forward pass does not run twice.

    Args:
        module: The module. The gradient is with respect to its trainable parameters.
        fn: The function to run, by default the module. It must depend on its arguments and the module's parameters
            alone.

    Returns:
        A function of the same arguments, arrays and trees of them.
    """
    run = module if fn is None else fn

    def checkpointed(*arguments: Any) -> Any:
        given = _leaves({"parameters": module.trainable_parameters(), "arguments": list(arguments)})
        names = [name for name, _ in given]
        arrays = [x for _, x in given]
        at = [i for i, x in enumerate(arrays) if isinstance(x, mx.array)]
        record = ResultRecord()
        result_tree = _ResultTree()

        def flat(*some: mx.array) -> list[mx.array]:
            whole = list(arrays)
            for i, x in zip(at, some):
                whole[i] = x
            tree = tree_unflatten(list(zip(names, whole)))
            module.update(tree.get("parameters", {}))
            return result_tree.flatten(run(*tree.get("arguments", [])))

        def compute(*some: mx.array) -> list[mx.array]:
            with record.recording():
                return flat(*some)

        def backward(primals, cotangents, outputs) -> list[mx.array]:
            with record.replaying():
                return mx.vjp(flat, list(primals), list(cotangents))[1]

        function: Any = mx.custom_function(compute)
        function.vjp(backward)
        parameters = module.trainable_parameters()
        try:
            return result_tree.restore(function(*(arrays[i] for i in at)))
        finally:
            module.update(parameters)  # instead of those of the transformation

    return checkpointed


class _ResultTree:
    """Structure of a function's result, known after its first run."""

    def flatten(self, result: Any) -> list[mx.array]:
        """Store the structure of `result` and return its arrays."""
        named = _leaves({"result": result})
        self._names = [name for name, _ in named]
        return [x for _, x in named]

    def restore(self, arrays: Any) -> Any:
        """Rebuild a result from its arrays."""
        arrays = [arrays] if isinstance(arrays, mx.array) else arrays
        return tree_unflatten(list(zip(self._names, arrays)))["result"]
