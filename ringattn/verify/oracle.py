"""Reference for every result: attention in float64, and the error of a plain formula in the inputs' dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
MANTISSA = {mx.float32: 23, mx.float16: 10, mx.bfloat16: 7}


def to64(x: mx.array) -> np.ndarray:
    """Values of `x` as a float64 NumPy array."""
    return np.array(x.astype(mx.float32)).astype(np.float64)


@dataclass
class Case:
    """Attention problem of a whole sequence: arrays, and the positions of their tokens."""

    q: mx.array
    k: mx.array
    v: mx.array
    q_pos: np.ndarray
    k_pos: np.ndarray
    options: dict = field(default_factory=dict)  # scale, mask, window, softcap, sinks, segments as users give them

    @property
    def visible(self) -> np.ndarray:
        """Visible pairs, bool ``[B, Hq, Lq, Lk]``, by brute force. Written from the documentation alone."""
        shape = (*self.q.shape[:3], self.k.shape[2])
        i = self.q_pos[:, None].astype(int)
        j = self.k_pos[None, :].astype(int)
        seen = np.ones(shape, bool)
        mask, window, segments = (self.options.get(name) for name in ("mask", "window", "segments"))
        if isinstance(mask, str):
            seen &= j <= i
        elif mask is not None:
            allowed = np.array(mask) if mask.dtype == mx.bool_ else to64(mask) != -np.inf
            seen &= np.broadcast_to(allowed, shape)
        if isinstance(window, int):
            seen &= (j <= i) & (j > i - window)
        elif window is not None:
            seen &= (j >= i - window[0]) & (j <= i + window[1])
        if segments is not None:
            q_ids, k_ids = (np.array(ids)[:, None] for ids in segments)
            seen &= (q_ids[..., :, None] == k_ids[..., None, :]) & (q_ids[..., :, None] >= 0)
        return seen

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """`out` and `lse` in float64."""
        return _softmax(self, to64(self.q), to64(self.k), to64(self.v), np.float64)

    def budget(self) -> tuple[float, float]:
        """Allowed errors of `out` and `lse`: twice those of the plain formula, and a few ulps of the largest value."""
        dtype = self.q.dtype
        out, lse = self.exact()
        plain = [np.array(x.astype(mx.float32)) for x in plain_formula(self)]
        ulp = 2.0 ** -MANTISSA[dtype]
        largest = float(np.abs(np.nan_to_num(out)).max(initial=0.0))
        sizes = np.abs(lse[np.isfinite(lse)]).max(initial=1.0)
        return (
            2 * error(plain[0], out) + 4 * ulp * largest + 1e-30,
            2 * error(plain[1], lse) + 8 * 2.0**-23 * max(1.0, float(sizes)),
        )


@dataclass
class GradientCase:
    """Attention problem with the gradients of a loss by its results."""

    case: Case
    dout: mx.array  # in q's dtype
    dlse: mx.array  # float32

    @classmethod
    def random(cls, case: Case, seed: int = 0) -> GradientCase:
        """Draw random gradients. Those by an lse of -inf (rows that see no key) count as 0."""
        r = np.random.default_rng(seed)
        shape = (*case.q.shape[:3], case.v.shape[3])
        dout = mx.array(r.standard_normal(shape).astype(np.float32)).astype(case.q.dtype)
        return cls(case, dout, mx.array(r.standard_normal(shape[:3]).astype(np.float32)))

    @property
    def differentiable(self) -> dict[str, mx.array]:
        """Arrays that have a gradient: q, k, v, and sinks and an additive mask if they are given."""
        options = {name: self.case.options.get(name) for name in ("sinks", "mask")}
        arrays = {"q": self.case.q, "k": self.case.k, "v": self.case.v, **options}
        return {name: x for name, x in arrays.items() if isinstance(x, mx.array) and x.dtype != mx.bool_}

    def exact(self) -> dict[str, np.ndarray]:
        """Gradients by the closed form in float64 (see `ringattn.core.gradients`), with the whole weight matrix."""
        return self._sums(lambda x: x)

    def sizes(self) -> dict[str, float]:
        """Largest sums without cancellation: of absolute values of all products, also inside delta and ds."""
        return {name: float(x.max(initial=0.0)) for name, x in self._sums(np.abs).items()}

    def _sums(self, term: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
        """Closed form, with `term` applied to every summand."""
        case = self.case
        options = case.options
        q, k, v = to64(case.q), to64(case.k), to64(case.v)
        heads = q.shape[1]
        group = heads // k.shape[1]
        k, v = (np.repeat(x, group, 1) for x in (k, v))
        _, lse = case.exact()
        scale, cap, mask = (options.get(name) for name in ("scale", "softcap", "mask"))
        s = (q @ k.swapaxes(-1, -2)) * (scale := q.shape[-1] ** -0.5 if scale is None else scale)
        slope = np.full(s.shape, scale)
        if cap is not None:
            s = cap * np.tanh(s / cap)
            slope *= 1 - (s / cap) ** 2
        if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
            s = s + to64(mask)
        seen = case.visible
        p = np.where(seen, np.exp(np.where(seen, s, 0) - np.where(lse == -np.inf, 0, lse)[..., None]), 0)
        dout = term(to64(self.dout))
        dlse = np.where(lse == -np.inf, 0, to64(self.dlse))
        delta = (dout * (p @ term(v))).sum(-1) + term(-dlse)
        ds = p * (dout @ term(v).swapaxes(-1, -2) + term(-delta)[..., None])
        by_qk = term(ds * slope)
        shared = (q.shape[0], heads // group, group)
        sums = {
            "q": by_qk @ term(k),
            "k": (by_qk.swapaxes(-1, -2) @ term(q)).reshape(*shared, *k.shape[2:]).sum(2),
            "v": (p.swapaxes(-1, -2) @ dout).reshape(*shared, *v.shape[2:]).sum(2),
        }
        if "sinks" in self.differentiable:
            weights = np.where(lse == -np.inf, 0, np.exp(to64(options["sinks"])[:, None] - lse))
            sums["sinks"] = (weights * term(-delta)).sum((0, 2))
        if "mask" in self.differentiable:
            sums["mask"] = _summed_to(term(ds), options["mask"].shape)
        return sums

    def _score_terms(self) -> float:
        """Largest sum of the absolute products that make a visible score, scaled."""
        q = np.abs(to64(self.case.q))
        k = np.abs(np.repeat(to64(self.case.k), q.shape[1] // self.case.k.shape[1], 1))
        scale = self.case.options.get("scale")
        terms = (q @ k.swapaxes(-1, -2)) * abs(q.shape[-1] ** -0.5 if scale is None else scale)
        return float(terms[self.case.visible].max(initial=0.0))

    def plain(self) -> dict[str, np.ndarray]:
        """Gradients that MLX derives from the textbook formula in the dtype of the inputs."""
        named = self.differentiable
        seen = np.asarray(self.case.visible.any(-1) | (self.case.options.get("sinks") is not None))

        def formula(*arrays: mx.array) -> list[mx.array]:
            given = dict(zip(named, arrays))
            q, k, v = (given.pop(name) for name in "qkv")
            changed = Case(q, k, v, self.case.q_pos, self.case.k_pos, {**self.case.options, **given})
            out, lse = plain_formula(changed, self.case.visible | ~seen[..., None])
            return [out * mx.array(seen[..., None]).astype(out.dtype), lse * mx.array(seen)]

        outputs, gradients = mx.vjp(formula, list(named.values()), [self.dout, self.dlse])
        return {name: np.array(x.astype(mx.float32)) for name, x in zip(named, gradients)}

    def ratios(self, gradients: dict[str, Any]) -> dict[str, float]:
        """Errors of the gradients as fractions of the allowed errors.

        The allowed error is the sum of twice the error of the plain formula, four ulps of the largest value, and a
        floor for the rounding of float32. Let u = 2^-24, half an ulp of 1. The saved lse is rounded by up to u |lse|,
        which changes each weight exp(score - lse) by that fraction. So does the score itself, a sum of products q_d
        k_d: the gradient computes it anew, in another order of summation than the forward pass where the matrix product
        has another shape, and each partial sum is rounded by up to u times the sum of |q_d k_d|. The exponential, the
        saved `out`, the products and their sums add a few u more; 4 u are allowed. These are errors of the terms, which
        remain when the terms cancel: delta, which is dout . out - dlse, may be near zero while its error is u times the
        sum of |dout| |out|. The floor is therefore (4 u + u max |lse| + u max sum |q_d k_d| scale) times `sizes`. For
        sinks, whose gradient sums a saved `out` over all rows, it is at least two ulps of the dtype of `out` times
        `sizes`.
        """
        exact = self.exact()
        plain = self.plain()
        sizes = self.sizes()
        fractions = {}
        lse = self.case.exact()[1]
        known = 2 * 2.0**-23 + 2.0**-24 * (float(np.abs(lse[np.isfinite(lse)]).max(initial=1.0)) + self._score_terms())
        rounded = max(known, 2 * 2.0 ** -MANTISSA[self.case.q.dtype])
        for name, x in gradients.items():
            ulp = 2.0 ** -MANTISSA[self.differentiable[name].dtype]
            largest = float(np.abs(exact[name]).max(initial=0.0))
            floor = 4 * ulp * largest + sizes[name] * (rounded if name == "sinks" else known)
            budget = 2 * error(plain[name], exact[name]) + floor + 1e-30
            fractions[name] = error(np.array(x.astype(mx.float32)), exact[name]) / budget
        return fractions


def _summed_to(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum of `x` over the axes along which an array of `shape` was broadcast."""
    wide = (1,) * (x.ndim - len(shape)) + tuple(shape)
    axes = tuple(i for i, n in enumerate(wide) if n == 1 and x.shape[i] != 1)
    return x.sum(axes, keepdims=True).reshape(shape)


def _softmax(case: Case, q, k, v, dtype):
    group = q.shape[1] // k.shape[1]
    options = case.options
    seen = case.visible
    k, v = (np.repeat(x, group, 1) for x in (k, v))
    scale = options.get("scale")
    s = (q @ k.swapaxes(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    cap, mask, sinks = (options.get(name) for name in ("softcap", "mask", "sinks"))
    if cap is not None:
        s = cap * np.tanh(s / cap)
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        s = s + to64(mask)
    s = np.where(seen, s, -np.inf)
    sink = np.full(s.shape[:3], -np.inf) if sinks is None else np.broadcast_to(to64(sinks)[:, None], s.shape[:3])
    m = np.maximum(s.max(-1, initial=-np.inf), sink)
    base = np.where(m == -np.inf, 0, m)
    p = np.where(seen, np.exp(s - base[..., None]), 0)
    total = p.sum(-1) + np.exp(sink - base)
    out = (p @ v) / np.where(total == 0, 1, total)[..., None]
    with np.errstate(divide="ignore"):
        return out.astype(dtype), np.where(total == 0, -np.inf, base + np.log(total))


def plain_formula(case: Case, visible: np.ndarray | None = None) -> tuple[mx.array, mx.array]:
    """Textbook formula by MLX operations on one device, with scores and softmax in the dtype of the inputs."""
    visible = case.visible if visible is None else visible
    q, k, v = case.q, case.k, case.v
    options = case.options
    dtype = q.dtype
    group = q.shape[1] // k.shape[1]
    k, v = (mx.repeat(x, group, 1) for x in (k, v))
    scale = options.get("scale")
    s = (q * mx.array(q.shape[-1] ** -0.5 if scale is None else scale, dtype)) @ k.swapaxes(-1, -2)
    cap, mask, sinks = (options.get(name) for name in ("softcap", "mask", "sinks"))
    if cap is not None:
        s = mx.tanh(s / cap) * cap
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        s = (s + mask).astype(dtype)
    s = mx.where(mx.array(visible), s, -mx.inf)
    if sinks is not None:
        column = mx.broadcast_to(sinks.astype(dtype)[:, None, None], (*s.shape[:3], 1))
        s = mx.concatenate([s, column], -1)
        v = mx.concatenate([v, mx.zeros((*v.shape[:2], 1, v.shape[3]), dtype)], 2)
    if s.size == 0:
        return mx.zeros((*s.shape[:3], v.shape[3]), dtype), mx.full(s.shape[:3], -mx.inf)
    lse = mx.logsumexp(s, axis=-1)
    p = mx.where(mx.isnan(p_ := mx.softmax(s, axis=-1)), mx.zeros_like(p_), p_)
    return p @ v, mx.where(mx.isnan(lse), -mx.inf, lse)


def error(x: np.ndarray, exact: np.ndarray) -> float:
    """Largest difference from `exact`; infinite unless -inf and NaN are in the same places."""
    x = np.asarray(x, np.float64)
    assert x.shape == exact.shape, f"{x.shape=} {exact.shape=}"
    same = (x == exact) | (np.isnan(x) & np.isnan(exact))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(x - exact))
    return float(np.where(np.isnan(difference), np.inf, difference).max(initial=0.0))


def ratios(case: Case, out: mx.array, lse: mx.array, rows: Any = slice(None)) -> tuple[float, float]:
    """Errors of `out` and `lse`, for the queries `rows`, as fractions of the whole case's budget."""
    exact_out, exact_lse = case.exact()
    out_budget, lse_budget = case.budget()
    out_error = error(np.array(out.astype(mx.float32)), exact_out[:, :, rows])
    return out_error / out_budget, error(np.array(lse), exact_lse[:, :, rows]) / lse_budget


def check(case: Case, out: mx.array, lse: mx.array, *, rows: Any = slice(None), what: str = "") -> None:
    """Assert that `out` and `lse` of the queries `rows` are within the budget of the whole case."""
    assert lse.dtype == mx.float32, lse.dtype
    out_ratio, lse_ratio = ratios(case, out, lse, rows)
    assert out_ratio <= 1, f"{what} out: error is {out_ratio:.3g} of the budget"
    assert lse_ratio <= 1, f"{what} lse: error is {lse_ratio:.3g} of the budget"


LENGTHS = (0, 1, 7, 40, 113, 300)


def random_case(seed: int, *, q_len: int | None = None, k_len: int | None = None, lengths=LENGTHS) -> Case:
    """Draw a small problem with a random choice of every feature. The same seed gives the same problem everywhere."""
    r = np.random.default_rng(seed)
    batch = int(r.integers(1, 3))
    kv_heads = int(r.integers(1, 3))
    group = int(r.integers(1, 4))
    dim = int(r.choice([8, 64, 80]))
    v_dim = int(r.choice([8, 32, 64]))
    q_len = int(r.choice(lengths)) if q_len is None else q_len
    k_len = q_len + int(r.choice([0, 0, 5, 77])) if k_len is None else k_len
    dtype = FLOATS[int(r.integers(0, 3))]

    def normal(*shape: int, size: float = 1.0) -> mx.array:
        return (mx.array(r.standard_normal(shape).astype(np.float32)) * size).astype(dtype)

    heads = kv_heads * group
    peak = float(r.choice([1.0, 1.0, 6.0]))
    q = normal(batch, heads, q_len, dim, size=peak)
    k = normal(batch, kv_heads, k_len, dim)
    v = normal(batch, kv_heads, k_len, v_dim)
    offset = k_len - q_len
    positions = np.arange(offset, offset + q_len, dtype=np.int32), np.arange(k_len, dtype=np.int32)
    return Case(q, k, v, *positions, _random_options(r, batch, heads, q_len, k_len))


def _random_options(r, batch: int, heads: int, q_len: int, k_len: int) -> dict:
    options: dict = {}
    kind = int(r.integers(0, 4))
    shape = (int(r.choice([1, batch])), int(r.choice([1, heads])), q_len, k_len)
    if kind == 1:
        options["mask"] = "causal"
    elif kind == 2:
        options["mask"] = mx.array(r.random(shape) < 0.7)
    elif kind == 3:
        hidden = r.random(shape) < 0.3
        options["mask"] = mx.array(np.where(hidden, -np.inf, r.standard_normal(shape)).astype(np.float32))
    if r.random() < 0.5:
        options["window"] = [3, 50, (2, 4), (0, 0), (60, 9)][int(r.integers(0, 5))]
    if r.random() < 0.4:
        k_ids = np.sort(r.integers(-1, 3, (batch, k_len)), 1).astype(np.int32)
        options["segments"] = (mx.array(k_ids[:, k_len - q_len :]), mx.array(k_ids))
    if r.random() < 0.3:
        options["softcap"] = float(r.choice([2.0, 30.0]))
    if r.random() < 0.4:
        options["sinks"] = mx.array(r.standard_normal(heads).astype(np.float32))
    if r.random() < 0.2:
        options["scale"] = float(r.choice([0.3, -0.1]))
    return options
