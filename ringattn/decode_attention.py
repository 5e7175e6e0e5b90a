"""Attention of a few new tokens, equal on every rank, to a cache that is spread over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import mlx.core as mx
import numpy as np

from . import backends
from .autograd.custom_function import custom_op
from .autograd.evaluation import start_evaluation
from .core.arrays import view
from .core.intervals import kept_positions
from .core.online_softmax import State, finish, merge_states, normalise
from .core.options import Options, SharedOptions
from .core.validation import check_flag, check_int, check_qkv
from .kernels.interface import Kernel, KernelInputs, OutputSpec
from .layout import Layout
from .ring.blocks import raw
from .ring.call import check_layout, check_ring
from .transport.base import Ring
from .transport.consensus import Fields, agree, agree_in_graph, fits_in_graph, raise_on_all_ranks
from .transport.interface import Transport

if TYPE_CHECKING:
    from typing_extensions import Unpack

WHAT = "decode_attention"


class _Options(SharedOptions, total=False):
    start: int | None
    segments: tuple[mx.array, mx.array] | None


@overload
def decode_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    ring: Ring,
    kv_layout: Layout,
    return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> mx.array: ...
@overload
def decode_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    ring: Ring,
    kv_layout: Layout,
    return_lse: Literal[True],
    **options: Unpack[_Options],
) -> tuple[mx.array, mx.array]: ...
@overload
def decode_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    ring: Ring,
    kv_layout: Layout,
    return_lse: bool,
    **options: Unpack[_Options],
) -> mx.array | tuple[mx.array, mx.array]: ...
def decode_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    ring: Ring,
    kv_layout: Layout,
    start: int | None = None,
    scale: float | None = None,
    mask: str | mx.array | None = "causal",
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    segments: tuple[mx.array, mx.array] | None = None,
    return_lse: bool = False,
    out_dtype: mx.Dtype | None = None,
    backend: str | None = None,
) -> mx.array | tuple[mx.array, mx.array]:
    """Attention of a few new tokens, equal on every rank, to a cache of which each rank holds a part. Collective.

    Each rank attends to its own keys. Then one exchange gives every rank all states, and every rank merges them to the
    same bits. Options without a description here are those of `attention`.

    A caller that holds some of the heads passes these, with the ring of the ranks that hold the same heads.

    Args:
        q: The new queries ``[batch, heads, q tokens, head_dim]``, equal on every rank.
        k: This rank's keys ``[batch, kv heads, local tokens, head_dim]``, in the order of `kv_layout`. May be empty.
        v: This rank's values ``[batch, kv heads, local tokens, value head_dim]``.
        ring: The ring, from `init`.
        kv_layout: The positions of each rank's keys. May be uneven.
        start: The position of query 0. Default ``kv_layout.stop - q tokens``: the new tokens' own keys are already in
            the cache.
        mask: ``"causal"`` (by positions), ``None``, or an array whose columns are the keys of all ranks, in global
            order.
        scale, window, softcap, sinks, out_dtype, backend: As in `attention`.
        segments: The ids of the queries ``[batch, q tokens]``, equal on every rank, and of this rank's keys.
        return_lse: Also return the log-sum-exp.

    Returns:
        `out` ``[batch, heads, q tokens, value head_dim]``, equal on every rank, or ``(out, lse)``.

    Raises:
        ArgumentError: If an argument is wrong on any rank, or differs between ranks. Raised on every rank; the ring
            still works.
        RingError: If a rank died, stalled or left, or another thread is using the ring.
        TransformError: If mx.grad, mx.compile, mx.vmap or mx.jvp is applied. They are not supported.
    """
    ring = check_ring(ring)
    with ring.call(WHAT):
        with raise_on_all_ranks(ring, WHAT):
            check_qkv(q, k, v)
            check_layout("kv_layout", kv_layout, ring, {"k": k.shape[2]})
            options = Options.checked(
                q,
                k,
                columns=kv_layout.length,
                scale=scale,
                mask=mask,
                window=window,
                softcap=softcap,
                sinks=sinks,
                segments=segments,
                out_dtype=out_dtype,
            )
            check_flag("return_lse", return_lse)
            first = kv_layout.stop - q.shape[2] if start is None else check_int("start", start)
            check_int("start + q tokens", first + q.shape[2])
            call = _DecodeCall(ring, kv_layout, first, options, backends.select(backend))
        out, lse = custom_op(WHAT, call.run, (q, k, v, *options.arrays))
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class _DecodeCall:
    """One checked call on this rank."""

    ring: Transport
    kv_layout: Layout
    start: int
    options: Options
    kernel: Kernel

    def run(self, q: mx.array, k: mx.array, v: mx.array, *arrays: mx.array) -> tuple[mx.array, mx.array]:
        """Attend to this rank's keys, exchange states, merge. The agreement is the head of the exchanged message."""
        options = self.options.bind(arrays)
        if self.ring.size == 1:
            return self._alone(q, k, v, options)
        fits = fits_in_graph(self.ring, 4 * q.shape[0] * q.shape[1] * q.shape[2] * (v.shape[3] + 2))
        lazy = fits and self.kernel.lazy
        with raise_on_all_ranks(self.ring, WHAT):
            state = self._attend(q, k, v, options, lazy)
            fields = self._fields(q, k, v, options)
            payload = [] if lazy else [raw(x) for x in state]
        if lazy:
            rows = agree_in_graph(self.ring, WHAT, fields, mx.concatenate([x.reshape(-1) for x in state]))
            return finish(merge_states(*(_unpack_state(row, state) for row in rows)), options.sinks, options.out_dtype)
        # Other ranks may exchange in MLX's graph, where all messages have one size.
        apart = self.ring.in_graph_bytes > 0 and not fits
        replies = agree(self.ring, WHAT, fields, payload=payload, apart=apart)
        sinks = None if options.sinks is None else view(options.sinks.astype(mx.float32))
        with np.errstate(all="ignore"):
            # The states are small and on the host: NumPy is faster than an MLX dispatch.
            rows_of_all = (np.frombuffer(reply, np.float32) for reply in replies)
            out, lse = normalise(merge_states(*(_unpack_state(row, state) for row in rows_of_all)), sinks)
        return mx.array(out).astype(options.out_dtype), mx.array(lse)

    def _alone(self, q: mx.array, k: mx.array, v: mx.array, options: Options) -> tuple[mx.array, mx.array]:
        """Attend on a ring of one rank. There is nothing to exchange, so the result may stay lazy."""
        with self.ring.tracer.span("compute", 0):
            start_evaluation(q, k, v, *options.arrays)  # raises under a transformation
            output = OutputSpec(options.out_dtype, True, options.sinks)
            out, lse = self.kernel.finish(self._inputs(q, k, v, options), output)
        assert lse is not None
        return out, lse

    def _inputs(self, q: mx.array, k: mx.array, v: mx.array, options: Options) -> KernelInputs:
        q_pos = kept_positions(((self.start, self.start + q.shape[2]),))
        k_pos = kept_positions(self.kv_layout.spans[self.ring.rank])
        columns = None if options.mask is None else k_pos - self.kv_layout.start
        return KernelInputs(q, k, v, q_pos, k_pos, options.rules(columns))

    def _attend(self, q: mx.array, k: mx.array, v: mx.array, options: Options, lazy: bool) -> State:
        with self.ring.tracer.span("compute", 0):
            state: State = self.kernel.forward(self._inputs(q, k, v, options))
            if lazy:
                # Raise here under a transformation. Without this, no rank would check the exchange.
                start_evaluation(q, k, v, *options.arrays)
            else:
                mx.eval(*state)
        return state

    def _fields(self, q: mx.array, k: mx.array, v: mx.array, options: Options) -> Fields:
        shapes = (("q", f"{q.dtype} {q.shape}"), ("heads of k", str(k.shape[1])), ("head_dim of v", str(v.shape[3])))
        return (*shapes, ("kv_layout", self.kv_layout.summary), ("start", str(self.start)), *options.fields)


def _unpack_state(row: Any, like: State) -> State:
    """Unpack a rank's state from flat numbers. The ranks have agreed on the shapes, which are those of `like`."""
    arrays = []
    at = 0
    for x in like:
        arrays.append(row[at : at + x.size].reshape(x.shape))
        at += x.size
    return State(*arrays)
