"""Attention on one device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import mlx.core as mx

from . import backends
from .autograd.custom_function import custom_op
from .core.options import Options, SharedOptions
from .core.validation import Positions, check_flag, check_positions, check_qkv
from .kernels.interface import KernelInputs, OutputSpec

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Options(SharedOptions, total=False):
    offset: int | None
    positions: tuple[Positions, Positions] | None
    segments: tuple[mx.array, mx.array] | None


@overload
def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> mx.array: ...
@overload
def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    return_lse: Literal[True],
    **options: Unpack[_Options],
) -> tuple[mx.array, mx.array]: ...
@overload
def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    return_lse: bool,
    **options: Unpack[_Options],
) -> mx.array | tuple[mx.array, mx.array]: ...
def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float | None = None,
    mask: str | mx.array | None = None,
    offset: int | None = None,
    positions: tuple[Positions, Positions] | None = None,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    segments: tuple[mx.array, mx.array] | None = None,
    return_lse: bool = False,
    out_dtype: mx.Dtype | None = None,
    backend: str | None = None,
) -> mx.array | tuple[mx.array, mx.array]:
    """Scaled dot-product attention that can also return the log-sum-exp of every row.

    A query attends to the keys that mask, window and segments all allow. The score matrix is never in memory. A row
    that sees no key gives ``out = 0`` and ``lse = -inf``, and has no gradient. The call is differentiable (mx.grad,
    mx.vjp) in q, k, v, sinks and an additive mask, through `out` and through the lse.

    Args:
        q: Queries ``[batch, heads, q tokens, head_dim]`` in float16, bfloat16 or float32.
        k: Keys ``[batch, kv heads, k tokens, head_dim]`` in q's dtype; heads is a multiple of kv heads.
        v: Values ``[batch, kv heads, k tokens, value head_dim]`` in q's dtype.
        scale: The factor of the scores. Default ``head_dim ** -0.5``.
        mask: ``"causal"``, or a boolean (True = attend) or additive array that broadcasts to
            ``[batch, heads, q tokens, k tokens]``.
        offset: The position of query 0 minus that of key 0, any sign. Default ``k tokens - q tokens``, which
            aligns the last query with the last key, as MLX does. Give it where `k` is only a part of the keys, as
            in the example of `merge`. The default aligns the last query with the last key of that part.
        positions: ``(q_pos, k_pos)``, ascending int32, for tokens that are not contiguous; instead of `offset`.
        window: An int ``w``: each query sees itself and the ``w - 1`` positions before it, causal by that alone (as in
            mlx-lm). A pair ``(left, right)``: the numbers of positions on each side.
        softcap: ``c``: scores become ``c * tanh(score / c)`` before any mask (Gemma 2, arXiv 2408.00118).
        sinks: ``[heads]``: one more logit per query head in the softmax's denominator, and in the lse (gpt-oss).
        segments: Integer ids ``(q_ids [batch, q tokens], k_ids [batch, k tokens])``: tokens attend only within
            equal ids, and a negative id is padding. Padding sees nothing, is not seen, and may hold any bits.
        return_lse: Also return the log-sum-exp.
        out_dtype: The dtype of the output. Default: q's.
        backend: ``"host"`` (fused, compiled or in NumPy, on the CPU), ``"metal"`` (fused, on an Apple GPU),
            ``"cuda"`` (fused, on an NVIDIA GPU), ``"reference"`` (plain mx operations), or ``None`` for the best one on
            the default device.

    Returns:
        `out` ``[batch, heads, q tokens, value head_dim]``; with `return_lse` the pair ``(out, lse)`` with `lse`
        float32, natural log, ``[batch, heads, q tokens]``. Partials over disjoint keys merge with `merge`.

    Raises:
        ArgumentError: If an argument is wrong. The message names it, its value and the expectation.
        TransformError: If mx.compile, mx.vmap, mx.jvp or a second derivative is applied to a fused kernel.
    """
    check_qkv(q, k, v)
    options = Options.checked(
        q,
        k,
        columns=k.shape[2],
        scale=scale,
        mask=mask,
        window=window,
        softcap=softcap,
        sinks=sinks,
        segments=segments,
        out_dtype=out_dtype,
    )
    q_pos, k_pos = check_positions(offset, positions, q.shape[2], k.shape[2])
    return_lse = check_flag("return_lse", return_lse)
    kernel = backends.select(backend)

    def compute(q: mx.array, k: mx.array, v: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
        bound = options.bind(arrays)
        inputs = KernelInputs(q, k, v, q_pos, k_pos, bound.rules())
        out, lse = kernel.finish(inputs, OutputSpec(bound.out_dtype, True, bound.sinks))
        assert lse is not None
        return out, lse

    def gradient(*arrays: mx.array) -> list[mx.array]:
        q, k, v, *given = arrays[:-4]
        dout, dlse, out, lse = arrays[-4:]
        bound = options.bind(given)
        rows = kernel.rows(out, lse, dout, dlse)
        inputs = KernelInputs(q, k, v, q_pos, k_pos, bound.rules())
        return bound.gradients(kernel.gradients(inputs, rows), rows, q.dtype)

    arrays = (q, k, v, *options.arrays)
    if kernel.differentiable:
        out, lse = compute(*arrays)
    else:
        out, lse = custom_op(f"attention with backend {kernel.name!r}", compute, arrays, gradient)
    return (out, lse) if return_lse else out
