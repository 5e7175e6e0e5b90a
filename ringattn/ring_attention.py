"""Attention over a sequence that is spread over the ranks of a ring."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal, overload

import mlx.core as mx

from .autograd.custom_function import custom_op
from .autograd.untraced import untraced
from .core.options import SharedOptions
from .layout import Layout
from .ring import loop
from .ring.backward import backward
from .ring.call import RingCall, check_ring
from .ring.loop import WHAT
from .transport.base import Ring
from .transport.consensus import raise_on_all_ranks

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Options(SharedOptions, total=False):
    kv_layout: Layout | None
    segments: mx.array | tuple[mx.array, mx.array] | None
    strategy: str | None


@overload
def ring_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    ring: Ring,
    layout: Layout,
    return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> mx.array: ...
@overload
def ring_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    ring: Ring,
    layout: Layout,
    return_lse: Literal[True],
    **options: Unpack[_Options],
) -> tuple[mx.array, mx.array]: ...
@overload
def ring_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    ring: Ring,
    layout: Layout,
    return_lse: bool,
    **options: Unpack[_Options],
) -> mx.array | tuple[mx.array, mx.array]: ...
def ring_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    ring: Ring,
    layout: Layout,
    kv_layout: Layout | None = None,
    scale: float | None = None,
    mask: str | mx.array | None = None,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    segments: mx.array | tuple[mx.array, mx.array] | None = None,
    strategy: str | None = None,
    return_lse: bool = False,
    out_dtype: mx.Dtype | None = None,
    backend: str | None = None,
) -> mx.array | tuple[mx.array, mx.array]:
    """Exact attention of this rank's queries to the keys of all ranks. Collective: every rank calls it.

    Key and value blocks (or queries and their states) travel around the ring while each rank computes on the block that
    it holds. A rank needs memory for its own tensors and two travelling blocks. The result is that of `attention` on
    the whole sequence, with the same bits on every run. Options without a description here are those of `attention`.

    Each head is computed by itself. A caller that holds some of the heads passes these (and their sinks), with the ring
    of the ranks that hold the same heads; `grid` makes such rings.

    The call is differentiable (mx.grad, mx.vjp) in q, k, v, sinks and an additive mask, through `out` and through the
    lse. The gradient is collective too. It is that of the sum of all ranks' losses: each rank gets the gradients of its
    own q, k and v, and its queries' part of the gradient of sinks. If the loss of a rank does not use the result, the
    other ranks wait for it; `ringattn.training.mean_loss` avoids this.

    Args:
        q: This rank's queries ``[batch, heads, local tokens, head_dim]``, in the order of ``layout.positions(rank)``.
        k: This rank's keys ``[batch, kv heads, local tokens, head_dim]``, in the order of `kv_layout`.
        v: This rank's values ``[batch, kv heads, local tokens, value head_dim]``.
        ring: The ring, from `init`.
        layout: The positions of each rank's queries. Equal on every rank, like all other options that are not arrays.
        kv_layout: The positions of each rank's keys. Default: `layout`. It differs where new queries attend to a
            longer cached prefix; `layout` then starts at the prefix's length.
        scale, window, softcap, sinks, out_dtype, backend: As in `attention`. Windows count positions.
        mask: ``"causal"`` (by positions), or an array whose rows are this rank's queries and whose columns are the
            keys of all ranks in global order.
        segments: The ids of this rank's tokens ``[batch, local tokens]``, or a pair of arrays for queries and keys.
        strategy: ``"pass_kv"`` moves keys and values; ``"pass_q"`` moves queries and returns their states, which
            is less for few new queries and a long cache; ``"gather"`` collects all keys that this rank's queries see
            and computes once, so that its memory grows with the whole sequence. ``None`` chooses the one of the first
            two that moves fewer bytes.
        return_lse: Also return the log-sum-exp.

    Returns:
        `out` ``[batch, heads, local tokens, value head_dim]`` for this rank's queries, or ``(out, lse)``. Where blocks
        travel from GPU to GPU, these may still be computed when this returns, as results of other operations of MLX.

    Raises:
        ArgumentError: If an argument is wrong on any rank, or differs between ranks. Raised on every rank, before any
            data moves; the ring still works.
        RingError: If a rank died, stalled or left, or another thread is using the ring.
        TransformError: If mx.compile, mx.vmap, mx.jvp or a second derivative is applied. They are not supported.
    """
    ring = check_ring(ring)
    with ring.call(WHAT):
        with raise_on_all_ranks(ring, WHAT):
            call = RingCall.checked(
                ring,
                layout,
                kv_layout,
                q,
                k,
                v,
                strategy=strategy,
                return_lse=return_lse,
                backend=backend,
                scale=scale,
                mask=mask,
                window=window,
                softcap=softcap,
                sinks=sinks,
                segments=segments,
                out_dtype=out_dtype,
            )
        out, lse = custom_op(
            WHAT,
            lambda *arrays: untraced(lambda *own: loop.forward(call.bind(own)), arrays, ring.fail),
            call.arrays,
            gradient=lambda *arrays: untraced(partial(_gradient, call), arrays, ring.fail),
        )
    return (out, lse) if return_lse else out


def _gradient(call: RingCall, *arrays: mx.array) -> list[mx.array]:
    """Compute the gradient from the call's arrays, the gradients with respect to the results, and the results."""
    *own, dout, dlse, out, lse = arrays
    return backward(call.bind(tuple(own)), dout, dlse, out, lse)
