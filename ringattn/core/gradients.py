"""The gradient of attention, from the results of its forward pass.

With scores s_ij of the visible pairs, p_ij = exp(s_ij - lse_i), out_i = sum_j p_ij v_j and the incoming gradients
dout and dlse (FlashAttention-2, arXiv 2307.08691; the term of dlse follows from d lse_i / d s_ij = p_ij):

    delta_i = dout_i . out_i - dlse_i          ds_ij = p_ij (dout_i . v_j - delta_i)
    dq_i = sum_j ds_ij ds/dqk k_j     dk_j = sum_i ds_ij ds/dqk q_i     dv_j = sum_i p_ij dout_i     dmask_ij = ds_ij

where ds/dqk = scale, times 1 - (s / c)^2 under a softcap c. A sink is a score with a zero value vector: its gradient is
-sum_i exp(sink - lse_i) delta_i. All sums run over keys or queries, so the sums of disjoint blocks add up. A row that
sees no key (lse = -inf) has no gradient: it gets lse = inf, which makes all its p_ij zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

from .rules import ScoreRules


class Rows(NamedTuple):
    """Values of each query row that the gradient needs.

    Attributes:
        dout: ``[B, Hq, Lq, Dv]``, the gradient of the loss with respect to `out`, in any float dtype.
        lse: ``[B, Hq, Lq]``, float32; inf for rows that see no key.
        delta: ``[B, Hq, Lq]``, float32.
    """

    dout: Any
    lse: Any
    delta: Any

    @classmethod
    def of(cls, out: mx.array, lse: mx.array, dout: mx.array, dlse: mx.array) -> Rows:
        """Compute the rows from the forward results and the gradients of the loss with respect to them."""
        delta = (dout.astype(mx.float32) * out.astype(mx.float32)).sum(axis=-1) - dlse
        empty = lse == -mx.inf
        return cls(dout, mx.where(empty, mx.inf, lse), mx.where(empty, 0.0, delta))

    def sinks_gradient(self, sinks: mx.array) -> mx.array:
        """Compute the gradient with respect to `sinks` ``[Hq]``, from these rows alone."""
        weights = mx.exp(sinks.astype(mx.float32)[None, :, None] - self.lse)
        return -(weights * self.delta).sum(axis=(0, 2))


class Gradients(NamedTuple):
    """Running sums of the gradients with respect to q, k, v and an additive mask, float32, in their shapes.

    `mask` is ``None`` where there is no additive mask.
    """

    q: Any
    k: Any
    v: Any
    mask: Any = None

    @classmethod
    def zeros(cls, q: mx.array, k: mx.array, v: mx.array, rules: ScoreRules) -> Gradients:
        """Zeros in the shapes of the inputs."""
        additive = None if rules.mask is None or rules.mask.dtype == mx.bool_ else mx.zeros(rules.mask.shape)
        return cls(mx.zeros(q.shape), mx.zeros(k.shape), mx.zeros(v.shape), additive)
