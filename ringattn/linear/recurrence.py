"""The arrays of a linear recurrence, its results, and its step over one token.

S_t = S_{t-1} diag(d_t) + beta_t (v_t - S_{t-1} diag(d_t) k_t) k_t^T     the delta rule, with beta
S_t = S_{t-1} diag(d_t) + v_t k_t^T                                      without beta
out_t = scale S_t q_t
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from ..core.affine import AffineMap


@dataclass(frozen=True)
class Recurrence:
    """Arrays of any float dtype, with the tokens on axis 2.

    Attributes:
        q: Queries ``[B, Hk, T, Dk]``.
        k: Keys ``[B, Hk, T, Dk]``.
        v: Values ``[B, Hv, T, Dv]``; Hv is a multiple of Hk.
        log_decay: ``[B, Hv, T]``, ``[B, Hv, T, Dk]``, or ``None``.
        beta: ``[B, Hv, T]``, or ``None`` for no delta rule.
        scale: The factor of the outputs.
    """

    q: mx.array
    k: mx.array
    v: mx.array
    log_decay: mx.array | None
    beta: mx.array | None
    scale: float

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays that are given."""
        return [x for x in (self.q, self.k, self.v, self.log_decay, self.beta) if x is not None]

    @property
    def length(self) -> int:
        """The number of tokens."""
        return self.q.shape[2]

    @property
    def state_shape(self) -> tuple[int, ...]:
        """The shape of the state ``[B, Hv, Dv, Dk]``."""
        return *self.v.shape[:2], self.v.shape[3], self.k.shape[3]

    @property
    def transition_shape(self) -> tuple[int, ...]:
        """The shape of a transition: matrices with beta, else decays."""
        batch, heads, _, dim = self.state_shape
        channels = 1 if self.log_decay is None or self.log_decay.ndim == 3 else self.log_decay.shape[3]
        return (batch, heads, 1, channels) if self.beta is None else (batch, heads, dim, dim)

    def tokens(self, start: int, stop: int) -> Recurrence:
        """Cut out the tokens from `start` to `stop`."""
        return self.map(lambda x: x[:, :, start:stop])

    @property
    def decay(self) -> mx.array:
        """The decay of each token, float32 ``[B, Hv, T, 1 or Dk]``."""
        if self.log_decay is None:
            return mx.ones((*self.v.shape[:3], 1))
        log_decay = self.log_decay if self.log_decay.ndim == 4 else self.log_decay[..., None]
        return mx.exp(log_decay.astype(mx.float32))

    def in_float32(self) -> Recurrence:
        """Convert all arrays to float32."""
        return self.map(lambda x: x.astype(mx.float32))

    def after(self, earlier: mx.array) -> Recurrence:
        """Make the arrays wait for `earlier`. MLX may otherwise compute many groups of chunks at once.

        No token of it is appended: unlike mx.depends this allows all transformations.
        """
        nothing = earlier[..., :0].reshape(-1)
        return self.map(
            lambda x: mx.concatenate([x, nothing.astype(x.dtype).reshape(*x.shape[:2], 0, *x.shape[3:])], 2)
        )

    def bind(self, arrays: Sequence[mx.array]) -> Recurrence:
        """Replace the arrays that are given, in the order of `arrays`."""
        q, k, v, *rest = arrays
        log_decay = None if self.log_decay is None else rest.pop(0)
        beta = None if self.beta is None else rest.pop(0)
        return Recurrence(q, k, v, log_decay, beta, self.scale)

    def map(self, change: Callable[[mx.array], mx.array]) -> Recurrence:
        """Apply `change` to every array that is given."""
        return self.bind([change(x) for x in self.arrays])


class Span(NamedTuple):
    """Result over a span of tokens, float32.

    Where the state before the span was not known, `out` is that from a state of zeros, and the outputs from a state S
    are ``out + reads @ S^T``.

    Attributes:
        out: Outputs ``[B, Hv, T, Dv]``.
        step: The map of the state; without a transition where the state before the span was known.
        reads: ``[B, Hv, T, Dk]``; ``None`` where the state before the span was known.
    """

    out: mx.array
    step: AffineMap
    reads: mx.array | None = None


def single_step(token: Recurrence, state: mx.array) -> Span:
    """Compute one token from `state` ``[B, Hv, Dv, Dk]``, as in decoding."""
    token = token.in_float32()
    heads = token.k.shape[1]

    def grouped(x: mx.array) -> mx.array:
        """Give the heads of values two axes: the head of the keys, and the rest."""
        return x.reshape(x.shape[0], heads, -1, *x.shape[2:])

    state = grouped(state)
    k = token.k[:, :, None]
    v = grouped(token.v).swapaxes(-1, -2)
    state = state * grouped(token.decay)
    if token.beta is not None:
        v = (v - state @ k.swapaxes(-1, -2)) * grouped(token.beta)[..., None]
    state = state + v * k
    out = state @ (token.q[:, :, None] * token.scale).swapaxes(-1, -2)
    return Span(out.swapaxes(-1, -2).reshape(token.v.shape), AffineMap(None, state.reshape(token.state_shape)))
