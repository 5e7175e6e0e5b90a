"""Linear attention over a sequence that is spread over the ranks of a ring."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import mlx.core as mx

from .core.intervals import locate
from .core.validation import check_flag, check_out_dtype
from .layout import Layout
from .linear.arguments import LinearOptions, check_recurrence, check_state
from .linear.engine import run
from .linear.recurrence import Recurrence, Span
from .ring import states
from .ring.call import check_layout, check_ring
from .transport.base import Ring
from .transport.consensus import Fields, raise_on_all_ranks

if TYPE_CHECKING:
    from typing_extensions import Unpack

WHAT = "ring_linear_attention"


@overload
def ring_linear_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    ring: Ring,
    layout: Layout,
    return_state: Literal[False] = False,
    **options: Unpack[LinearOptions],
) -> mx.array: ...
@overload
def ring_linear_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    ring: Ring,
    layout: Layout,
    return_state: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[mx.array, mx.array]: ...
@overload
def ring_linear_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    ring: Ring,
    layout: Layout,
    return_state: bool,
    **options: Unpack[LinearOptions],
) -> mx.array | tuple[mx.array, mx.array]: ...
def ring_linear_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    ring: Ring,
    layout: Layout,
    log_decay: mx.array | None = None,
    beta: mx.array | None = None,
    state: mx.array | None = None,
    scale: float | None = None,
    return_state: bool = False,
    out_dtype: mx.Dtype | None = None,
) -> mx.array | tuple[mx.array, mx.array]:
    """Linear attention to the tokens of all ranks. Collective: every rank calls it.

    A span of tokens is an affine map of the state. Each rank computes the maps of its spans and the outputs from a
    state of zeros. One exchange gives all maps to all ranks. Each rank then finds the states before its spans, and adds
    what its queries read of them (arXiv 2502.07563). The bytes do not depend on the number of tokens: for each head and
    span ``key dim * (value dim + key dim)`` float32 with beta, ``key dim * (value dim + 1)`` without.

    The result is that of `linear_attention` on the whole sequence. The call is differentiable (mx.grad, mx.vjp). The
    gradient is collective too, and that of the sum of all ranks' losses: each rank gets the gradients of its own
    tokens, and the rank with the first token that of `state`. Options without a description here are those of
    `linear_attention`.

    Args:
        q: This rank's queries ``[batch, key heads, local tokens, key dim]``, in the order of
            ``layout.positions(rank)``.
        k: This rank's keys, in q's shape and dtype.
        v: This rank's values ``[batch, value heads, local tokens, value dim]``.
        ring: The ring, from `init`.
        layout: The positions of each rank's tokens; any layout. One with few spans sends the least.
        log_decay: This rank's log-decays ``[batch, value heads, local tokens]`` or
            ``[batch, value heads, local tokens, key dim]``.
        beta: This rank's strengths of the delta rule ``[batch, value heads, local tokens]``.
        state: The state before the whole sequence, equal on all ranks.
        scale, out_dtype: As in `linear_attention`.
        return_state: Also return the state after the whole sequence.

    Returns:
        `out` ``[batch, value heads, local tokens, value dim]`` for this rank's tokens; with `return_state` the pair
        ``(out, state)``. The state has the same bits on all ranks of equal machines, so `linear_attention` continues
        from it on every rank without a message.

    Raises:
        ArgumentError: If an argument is wrong on any rank, or differs between ranks. Raised on every rank, before any
            data moves; the ring still works.
        RingError: If a rank died, stalled or left, or another thread is using the ring.
        TransformError: If mx.compile, mx.vmap, mx.jvp or a second derivative is applied. They are not supported.
    """
    ring = check_ring(ring)
    with ring.call(WHAT):
        with raise_on_all_ranks(ring, WHAT):
            recurrence = check_recurrence(q, k, v, log_decay=log_decay, beta=beta, scale=scale)
            layout = check_layout("layout", layout, ring, {"q": recurrence.length})
            state = check_state(state, recurrence.state_shape)
            return_state = check_flag("return_state", return_state)
            out_dtype = check_out_dtype(out_dtype, q.dtype)
            spans = _run_spans(recurrence, state, layout, ring.rank)
        fields = (*_fields(recurrence), ("out_dtype", str(out_dtype)))
        form = states.ChainCall(WHAT, layout, recurrence.transition_shape, beta is not None)
        inputs = [*recurrence.arrays, state]
        before, after = states.chain_states(ring, form, state, [span.step for span in spans], inputs, fields)
    # No token of the last state: the exchange is part of every rank's gradient, also where `out` does not need it.
    nothing = after.swapaxes(-1, -2)[:, :, :0]
    outs = [_finish(span, start) for span, start in zip(spans, before)]
    out = mx.concatenate([nothing, *outs], 2).astype(out_dtype)
    return (out, after) if return_state else out


def _run_spans(recurrence: Recurrence, state: mx.array, layout: Layout, rank: int) -> list[Span]:
    """Compute this rank's spans. Only the first span of the sequence knows the state before it."""
    held = layout.spans[rank]
    found = []
    for i, span in enumerate(held):
        ((start, stop),) = locate((span,), held)
        known = states.is_first(layout, rank, i)
        found.append(run(recurrence.tokens(start, stop), state if known else None))
    return found


def _finish(span: Span, state: mx.array) -> mx.array:
    """Add the part of the outputs that depends on the state before the span."""
    return span.out if span.reads is None else span.out + span.reads @ state.swapaxes(-1, -2)


def _fields(recurrence: Recurrence) -> Fields:
    """List the values that all ranks must agree on, besides the shapes of the maps."""
    q, v = recurrence.q, recurrence.v
    named = (
        ("batch", v.shape[0]),
        ("heads of k", q.shape[1]),
        ("heads of v", v.shape[1]),
        ("head_dim", q.shape[3]),
        ("head_dim of v", v.shape[3]),
        ("dtype", q.dtype),
        ("scale", recurrence.scale),
        ("log_decay", _kind(recurrence.log_decay)),
        ("beta", _kind(recurrence.beta)),
    )
    return tuple((name, str(value)) for name, value in named)


def _kind(x: mx.array | None) -> str:
    return "None" if x is None else f"{x.dtype} of {x.ndim} dimensions"
