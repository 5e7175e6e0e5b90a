"""Reference for linear attention: the recurrence token by token in float64, and the error of the same in float32."""

from __future__ import annotations

from collections.abc import Mapping
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

    @property
    def tokens(self) -> dict[str, mx.array]:
        """The arrays that are given and have tokens, on axis 2."""
        named = {"q": self.q, "k": self.k, "v": self.v, "log_decay": self.log_decay, "beta": self.beta}
        return {name: x for name, x in named.items() if x is not None}

    def recur(
        self, dtype: Any = np.float64, values: Mapping[str, np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """`out` and the state after the last token, computed token by token in `dtype`.

        Also return the largest value that the state had on its way, decayed to the end: the rounding errors of such
        values are in the last state, even if the values are not.

        Args:
            dtype: The NumPy dtype of all arithmetic.
            values: Arrays in place of the case's own, by name.
        """
        given = self.tokens if self.state is None else {**self.tokens, "state": self.state}
        arrays = {name: to64(x) for name, x in given.items()}
        arrays = {name: x.astype(dtype) for name, x in {**arrays, **(values or {})}.items()}
        v = arrays["v"]
        q, k = (np.repeat(arrays[name], v.shape[1] // self.k.shape[1], 1) for name in "qk")
        log_decay = arrays.get("log_decay", np.zeros(v.shape[:3], dtype))
        decay = np.exp(log_decay if log_decay.ndim == 4 else log_decay[..., None])
        state = arrays.get("state", np.zeros((*v.shape[:2], v.shape[3], k.shape[3]), dtype))
        scale = dtype(k.shape[3] ** -0.5 if self.scale is None else self.scale)
        out = np.zeros(v.shape, dtype)
        size = np.abs(state).max((2, 3))
        for t in range(v.shape[2]):
            state = state * decay[:, :, t, None, :]
            added = v[:, :, t]
            if self.beta is not None:
                known = (state @ k[:, :, t, :, None])[..., 0]
                added = (added - known) * arrays["beta"][:, :, t, None]
            state = state + added[..., None] * k[:, :, t, None, :]
            out[:, :, t] = scale * (state @ q[:, :, t, :, None])[..., 0]
            size = np.maximum(size * decay[:, :, t].max(-1), np.abs(state).max((2, 3)))
        return out, state, float(np.nan_to_num(size).max())

    @cached_property
    def exact(self) -> tuple[np.ndarray, np.ndarray, float]:
        """`out`, the last state and the largest value of the state in float64."""
        return self.recur()

    @cached_property
    def plain(self) -> tuple[np.ndarray, np.ndarray]:
        """`out` and the last state by the same recurrence in float32; `out` is rounded to q's dtype."""
        out, state, _ = self.recur(np.float32)
        return to64(mx.array(out).astype(self.q.dtype)), state

    def ratios(self, out: mx.array, state: mx.array, rows: Any = slice(None)) -> tuple[float, float]:
        """Errors of `out` at the tokens `rows`, and of the last state, as fractions of the allowed errors.

        The allowed error is twice that of the plain recurrence, and four ulps of the largest value: of `out` in the
        dtype of q, and of the state on its way.
        """
        exact_out, exact_state, largest_state = self.exact
        plain_out, plain_state = self.plain
        largest_out = float(np.abs(np.nan_to_num(exact_out)).max(initial=0.0))
        out_budget = 2 * error(plain_out, exact_out) + 4 * 2.0 ** -MANTISSA[self.q.dtype] * largest_out + 1e-30
        state_budget = 2 * error(plain_state, exact_state) + 4 * 2.0**-23 * largest_state + 1e-30
        out_error = error(to64(out), exact_out[:, :, rows])
        return out_error / out_budget, error(to64(state), exact_state) / state_budget
