"""Linear attention on one device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import mlx.core as mx

from .core.validation import check_flag, check_out_dtype
from .linear.arguments import LinearOptions, check_recurrence, check_state
from .linear.engine import run

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def linear_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    return_state: Literal[False] = False,
    **options: Unpack[LinearOptions],
) -> mx.array: ...
@overload
def linear_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    return_state: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[mx.array, mx.array]: ...
@overload
def linear_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    return_state: bool,
    **options: Unpack[LinearOptions],
) -> mx.array | tuple[mx.array, mx.array]: ...
def linear_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    log_decay: mx.array | None = None,
    beta: mx.array | None = None,
    state: mx.array | None = None,
    scale: float | None = None,
    return_state: bool = False,
    out_dtype: mx.Dtype | None = None,
) -> mx.array | tuple[mx.array, mx.array]:
    """Causal attention without softmax, as a recurrence with a state ``S`` of fixed size for each head.

    With ``d = exp(log_decay)``, each token decays the state, writes to it and reads from it:

        S_t = S_{t-1} diag(d_t) + v_t k_t^T                                      without beta
        S_t = S_{t-1} diag(d_t) + beta_t (v_t - S_{t-1} diag(d_t) k_t) k_t^T     with beta, the delta rule
        out_t = scale * S_t q_t

    These are the gated delta rule of Qwen3-Next (arXiv 2412.06464) with beta and one decay for each head, Kimi delta
    attention (arXiv 2510.26692) with beta and a decay for each channel, and without beta gated linear attention (arXiv
    2312.06635), the SSD layer of Mamba 2 (arXiv 2405.21060) and lightning attention (arXiv 2401.04658). Keys are taken
    as they are; models with a delta rule normalise them first.

    Tokens are computed in chunks by matrix products in float32. Memory grows linearly with the tokens. The error is at
    most twice that of the recurrence token by token in float32, plus a few ulps of the largest value. With beta above 1
    and keys that repeat it can be larger by the length of a chunk (64), because writes of alternating signs cancel. The
    call is made of MLX's operations, so all its transformations (mx.grad, mx.vmap, mx.compile) apply.

    Args:
        q: Queries ``[batch, key heads, tokens, key dim]`` in float16, bfloat16 or float32.
        k: Keys, in q's shape and dtype.
        v: Values ``[batch, value heads, tokens, value dim]`` in q's dtype; value heads is a multiple of key heads.
        log_decay: Natural logarithms of the decays, at most 0, of a float dtype: ``[batch, value heads, tokens]``, or
            ``[batch, value heads, tokens, key dim]`` for a decay of each channel. ``-inf`` forgets the state. Default:
            no decay.
        beta: Strengths of the delta rule ``[batch, value heads, tokens]`` of a float dtype, usually from 0 to 1 (2 for
            negative eigenvalues).
        state: The state before the first token ``[batch, value heads, value dim, key dim]``, float32. Default: zeros.
        scale: The factor of the outputs. Default ``key dim ** -0.5``.
        return_state: Also return the state after the last token.
        out_dtype: The dtype of the output. Default: q's.

    Returns:
        `out` ``[batch, value heads, tokens, value dim]``; with `return_state` the pair ``(out, state)``, the state
        float32. NaN or infinity in a token reaches the outputs of its head from this token on.

    Raises:
        ArgumentError: If an argument is wrong. The message names it, its value and the expectation.
    """
    recurrence = check_recurrence(q, k, v, log_decay=log_decay, beta=beta, scale=scale)
    state = check_state(state, recurrence.state_shape)
    return_state = check_flag("return_state", return_state)
    span = run(recurrence, state)
    out = span.out.astype(check_out_dtype(out_dtype, q.dtype))
    return (out, span.step.offset) if return_state else out
