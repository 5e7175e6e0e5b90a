"""Short causal convolution over a sequence that is spread over the ranks of a ring."""

from __future__ import annotations

from typing import Any, Literal, overload

import mlx.core as mx

from .core.intervals import locate
from .core.validation import check_flag
from .errors import ArgumentError, ArgumentTypeError
from .layout import Layout
from .linear.arguments import check_float, check_state
from .ring.call import check_layout, check_ring
from .ring.states import chain_inputs
from .transport.base import Ring
from .transport.consensus import raise_on_all_ranks

WHAT = "ring_short_conv"


@overload
def ring_short_conv(
    x: mx.array,
    weight: mx.array,
    *,
    ring: Ring,
    layout: Layout,
    bias: mx.array | None = None,
    state: mx.array | None = None,
    return_state: Literal[False] = False,
) -> mx.array: ...
@overload
def ring_short_conv(
    x: mx.array,
    weight: mx.array,
    *,
    ring: Ring,
    layout: Layout,
    bias: mx.array | None = None,
    state: mx.array | None = None,
    return_state: Literal[True],
) -> tuple[mx.array, mx.array]: ...
@overload
def ring_short_conv(
    x: mx.array,
    weight: mx.array,
    *,
    ring: Ring,
    layout: Layout,
    bias: mx.array | None = None,
    state: mx.array | None = None,
    return_state: bool,
) -> mx.array | tuple[mx.array, mx.array]: ...
def ring_short_conv(
    x: mx.array,
    weight: mx.array,
    *,
    ring: Ring,
    layout: Layout,
    bias: mx.array | None = None,
    state: mx.array | None = None,
    return_state: bool = False,
) -> mx.array | tuple[mx.array, mx.array]:
    """Causal depthwise convolution over the tokens of all ranks. Collective: every rank calls it.

    It stands before linear attention in Mamba 2, Qwen3-Next and Kimi Linear. Each output is a weighted sum of its own
    input and the ``kernel - 1`` inputs before it. One exchange gives all ranks the last inputs of each span. The result
    on each rank is that of ``mx.conv1d`` on the whole sequence. The call is differentiable (mx.grad, mx.vjp). The
    gradient is collective too, and that of the sum of all ranks' losses: each rank gets its part of the gradients of
    `weight`, `bias` and `state`.

    Args:
        x: This rank's inputs ``[batch, local tokens, channels]``, in the order of ``layout.positions(rank)``, in
            float16, bfloat16 or float32.
        weight: The weights ``[channels, kernel, 1]`` in x's dtype, as in `mlx.nn.Conv1d` with one group a channel.
            The last one belongs to the token itself.
        ring: The ring, from `init`.
        layout: The positions of each rank's tokens; any layout.
        bias: ``[channels]`` in x's dtype, added to every output.
        state: The inputs before the whole sequence ``[batch, kernel - 1, channels]`` in x's dtype, equal on all ranks.
            Default: zeros.
        return_state: Also return the last ``kernel - 1`` inputs of the whole sequence.

    Returns:
        `out`, in x's shape and dtype; with `return_state` the pair ``(out, state)``, the state equal on all ranks.

    Raises:
        ArgumentError: If an argument is wrong on any rank, or differs between ranks. Raised on every rank, before any
            data moves; the ring still works.
        RingError: If a rank died, stalled or left, or another thread is using the ring.
        TransformError: If mx.compile, mx.vmap, mx.jvp or a second derivative is applied. They are not supported.
    """
    ring = check_ring(ring)
    with ring.call(WHAT):
        with raise_on_all_ranks(ring, WHAT):
            _check(x, weight, bias)
            layout = check_layout("layout", layout, ring, {"x": x.shape[1]})
            state = check_state(state, (x.shape[0], weight.shape[1] - 1, x.shape[2]), x.dtype)
            return_state = check_flag("return_state", return_state)
        fields = (("x", f"{x.dtype} of batch {x.shape[0]}"), ("weight", str(weight.shape)))
        before, after = chain_inputs(ring, WHAT, layout, state, x, fields)
    held = layout.spans[ring.rank]
    outs = [after[:, :0]]  # the exchange is part of every rank's gradient, also where `out` does not need it
    for span, inputs in zip(held, before):
        ((start, stop),) = locate((span,), held)
        own = mx.concatenate([inputs, x[:, start:stop]], 1)
        outs.append(mx.conv1d(own, weight, groups=x.shape[2]))
    out = mx.concatenate(outs, 1)
    out = out if bias is None else out + bias
    return (out, after) if return_state else out


def _check(x: Any, weight: Any, bias: Any) -> None:
    check_float("x", x)
    if x.ndim != 3 or x.shape[2] == 0:
        raise ArgumentError(f"x: shape {x.shape}, expected 3 dimensions [batch, tokens, channels]")
    given = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    for name, array in given.items():
        check_float(name, array)
        if array.dtype != x.dtype:
            raise ArgumentTypeError(f"{name}: {array.dtype}, expected {x.dtype} as x")
    channels = x.shape[2]
    if weight.ndim != 3 or weight.shape[::2] != (channels, 1) or weight.shape[1] == 0:
        raise ArgumentError(f"weight: shape {weight.shape}, expected ({channels}, kernel, 1) for {channels} channels")
    if bias is not None and bias.shape != (channels,):
        raise ArgumentError(f"bias: shape {bias.shape}, expected ({channels},)")
