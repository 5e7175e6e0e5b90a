"""Reference for linear attention: the recurrence token by token in float64, and the error of the same in float32."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from .oracle import MANTISSA, error, to64


@dataclass
class LinearCase:
    """A recurrence over a whole sequence, as users give it (see `ringattn.linear_attention`)."""

    q: mx.array
    k: mx.array
    v: mx.array
    log_decay: mx.array | None = None
    beta: mx.array | None = None
    state: mx.array | None = None
    scale: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments."""
        return {name: getattr(self, name) for name in ("log_decay", "beta", "state", "scale")}

    def recur(self, dtype: Any = np.float64) -> tuple[np.ndarray, np.ndarray]:
        """`out` and the state after the last token, computed token by token in `dtype`."""
        heads = self.v.shape[1]
        q, k = (np.repeat(to64(x), heads // x.shape[1], 1).astype(dtype) for x in (self.q, self.k))
        v = to64(self.v).astype(dtype)
        batch, _, length, dim = q.shape
        decay = np.ones((batch, heads, length, 1), dtype)
        if self.log_decay is not None:
            given = to64(self.log_decay).astype(dtype)
            decay = np.exp(given if given.ndim == 4 else given[..., None])
        state = np.zeros((batch, heads, v.shape[3], dim), dtype)
        state = state if self.state is None else to64(self.state).astype(dtype)
        scale = dtype(dim**-0.5 if self.scale is None else self.scale)
        out = np.zeros(v.shape, dtype)
        for t in range(length):
            state = state * decay[:, :, t, None, :]
            added = v[:, :, t]
            if self.beta is not None:
                known = (state @ k[:, :, t, :, None])[..., 0]
                added = (added - known) * to64(self.beta).astype(dtype)[:, :, t, None]
            state = state + added[..., None] * k[:, :, t, None, :]
            out[:, :, t] = scale * (state @ q[:, :, t, :, None])[..., 0]
        return out, state

    @cached_property
    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """`out` and the last state in float64."""
        return self.recur()

    @cached_property
    def plain(self) -> tuple[np.ndarray, np.ndarray]:
        """`out` and the last state by the same recurrence in float32; `out` is rounded to q's dtype."""
        out, state = self.recur(np.float32)
        return to64(mx.array(out).astype(self.q.dtype)), state

    def ratios(self, out: mx.array, state: mx.array, rows: Any = slice(None)) -> tuple[float, float]:
        """Errors of `out` at the tokens `rows`, and of the last state, as fractions of the allowed errors.

        The allowed error is twice that of the plain recurrence, and four ulps of the largest value of the case.
        """
        pairs = ((out, self.exact[0][:, :, rows]), (state, self.exact[1]))
        budgets = (
            2 * error(plain, exact) + 4 * 2.0**-digits * float(np.abs(np.nan_to_num(exact)).max(initial=0.0)) + 1e-30
            for plain, exact, digits in zip(self.plain, self.exact, (MANTISSA[self.q.dtype], 23))
        )
        return tuple(error(to64(x), exact) / budget for (x, exact), budget in zip(pairs, budgets))  # type: ignore
