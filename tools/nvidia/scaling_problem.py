"""The problems of `tools.nvidia.scaling`, and the errors of their answers in sampled rows."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

import ringattn as ra
from ringattn.transport import Ring
from ringattn.verify.oracle import Case, ratios

DIM = 128
ROWS = 8  # of a rank that are compared with float64

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Problem:
    """Causal attention over `tokens` tokens, with `heads` query and key/value heads."""

    heads: tuple[int, int]
    tokens: int

    def head(self, name: str, index: int, spans: Spans) -> mx.array:
        """The tokens at `spans` of one head of q, k, v or dout: the same numbers on every rank."""
        key = mx.random.key(1000 * "qkvd".index(name) + index)
        whole = mx.random.normal((self.tokens, DIM), key=key).astype(mx.bfloat16)
        return mx.concatenate([whole[start:stop] for start, stop in spans])

    def arrays(self, spans: Spans, names: str = "qkv") -> list[mx.array]:
        """The arrays of these names at `spans`."""
        made = []
        for name in names:
            x = []
            for index in range(self.heads[name in "kv"]):
                x.append(self.head(name, index, spans))
                mx.eval(x[-1])
            made.append(mx.stack(x).reshape(1, len(x), -1, DIM))
            mx.eval(made[-1])
        return made

    @property
    def group(self) -> int:
        """Query heads for each key/value head."""
        return self.heads[0] // self.heads[1]

    @property
    def sampled_heads(self) -> list[int]:
        """The first and the last key/value head."""
        return sorted({0, self.heads[1] - 1})

    def error(self, layout: ra.Layout, rank: int, out: mx.array, lse: mx.array) -> float:
        """The largest error of some rows of a rank, in sampled heads, as a fraction of the allowed."""
        rows = sampled_rows(out.shape[2])
        positions = layout.positions(rank)[rows]
        worst = 0.0
        for kv_head in self.sampled_heads:
            head = kv_head * self.group
            whole = ((0, int(positions[-1]) + 1),)
            k, v = (self.head(name, kv_head, whole)[None, None] for name in "kv")
            q = self.head("q", head, tuple((int(p), int(p) + 1) for p in positions))[None, None]
            case = Case(q, k, v, positions, np.arange(k.shape[2]), {"mask": "causal"})
            at = mx.array(rows)
            worst = max(worst, *ratios(case, out[:, head : head + 1, at], lse[:, head : head + 1, at]))
        return worst


def sampled_rows(count: int) -> np.ndarray:
    """Some of `count` rows, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, ROWS).astype(int))


def gradient_error(
    problem: Problem, ring: Ring, layout: ra.Layout, results: tuple[mx.array, mx.array], gradients: list[mx.array]
) -> float:
    """The largest error of dq, dk and dv in sampled rows of this rank, as a fraction of the largest number. Collective.

    The formulas of `ringattn.core.gradients` in float64, from the results ``(out, lse)`` of all ranks.
    """
    rows = sampled_rows(gradients[0].shape[2])
    at = layout.positions(ring.rank)[rows]
    worst = 0.0
    for kv_head in problem.sampled_heads:
        k, v = (_whole(problem, name, kv_head) for name in "kv")
        dk, dv = np.zeros((2, len(rows), DIM))
        for head in range(kv_head * problem.group, (kv_head + 1) * problem.group):
            q, dout = (_whole(problem, name, head) for name in "qd")
            out, lse = (_float64(layout.gather(x[:, head : head + 1], ring))[0, 0] for x in results)
            delta = (dout * out).sum(1)
            p, ds = _weights(q[at], k, dout[at], v, lse[at, None], delta[at, None], at[:, None] >= np.arange(len(k)))
            worst = max(worst, _difference(gradients[0], head, rows, ds @ k))
            p, ds = _weights(k[at], q, v[at], dout, lse, delta, at[:, None] <= np.arange(len(q)))
            dk, dv = dk + ds @ q, dv + p @ dout
        worst = max(worst, _difference(gradients[1], kv_head, rows, dk), _difference(gradients[2], kv_head, rows, dv))
    return worst


def _weights(x, y, dx, dy, lse, delta, seen) -> tuple[np.ndarray, np.ndarray]:
    """The weights of the pairs of rows of `x` and `y`, and the gradients of their products."""
    p = np.where(seen, np.exp(DIM**-0.5 * (x @ y.T) - lse), 0)
    return p, DIM**-0.5 * p * (dx @ dy.T - delta)


def _difference(found: mx.array, head: int, rows: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(_float64(found[0, head, mx.array(rows)]) - expected).max() / np.abs(expected).max())


def _whole(problem: Problem, name: str, head: int) -> np.ndarray:
    return _float64(problem.head(name, head, ((0, problem.tokens),)))


def _float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)
