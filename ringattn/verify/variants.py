"""Checks of the variants of a GPU's kernels, each by a problem that needs the variant.

Masks, windows, segments, softcap and sinks are variants too. `feature_checks` checks these on every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from .. import backends
from ..attention import attention
from ..core.masks import Band
from ..core.online_softmax import State, finish
from ..core.rules import ScoreRules
from ..kernels.interface import KernelInputs
from .findings import Check, Findings
from .oracle import FLOATS, Case, GradientCase, ratios


@dataclass(frozen=True)
class ProblemSize:
    """Head dims of keys and values, and numbers of tokens, of a problem with grouped heads and a causal mask."""

    dim: int
    v_dim: int
    q_len: int = 71
    k_len: int = 83


@dataclass(frozen=True)
class Variant:
    """Variant of the Metal kernels.

    Attributes:
        what: Property that distinguishes the variant.
        dtype: Name of the dtype of q, k and v, such as ``"float16"``.
        check: Function that runs the variant and returns the largest error as a fraction of the allowed error.
    """

    what: str
    dtype: str
    check: Check

    @property
    def name(self) -> str:
        """Name of the variant in reports."""
        return f"{self.what}, {self.dtype}"


def _attend(case: Case, backend: str) -> float:
    out, lse = attention(case.q, case.k, case.v, backend=backend, return_lse=True, **case.options)
    return max(ratios(case, out, lse))


def _chain(case: Case, backend: str) -> float:
    """Check the state that one kernel call returns and the next one starts from, as in the hops of a ring."""
    kernel = backends.select(backend)
    rules = ScoreRules(case.q.shape[3] ** -0.5, Band(high=0))
    half = case.k.shape[2] // 2
    state: State | None = None
    for keys in (slice(0, half), slice(half, None)):
        k = case.k[:, :, keys]
        v = case.v[:, :, keys]
        state = kernel.forward(KernelInputs(case.q, k, v, case.q_pos, case.k_pos[keys], rules), state)
    assert state is not None
    return max(ratios(case, *finish(state, None, case.q.dtype)))


def attention_gradients(problem: GradientCase, backend: str, **options: Any) -> dict[str, mx.array]:
    """The gradients of `attention` by all inputs of `problem` that have one, with further `options`."""
    named = problem.differentiable

    def function(*arrays: mx.array) -> list[mx.array]:
        given = dict(zip(named, arrays))
        q, k, v = (given.pop(name) for name in "qkv")
        changed = {**problem.case.options, **options, **given}
        out, lse = attention(q, k, v, backend=backend, return_lse=True, **changed)
        return [out, mx.where(lse == -mx.inf, 0.0, lse)]

    _, gradients = mx.vjp(function, list(named.values()), [problem.dout, problem.dlse])
    return dict(zip(named, gradients))


def _gradient(case: Case, backend: str) -> float:
    problem = GradientCase.random(case)
    return max(problem.ratios(attention_gradients(problem, backend)).values())


VARIANTS: dict[str, tuple[Callable[[Case, str], float], ProblemSize]] = {
    **{f"head_dim {dim}": (_attend, ProblemSize(dim, dim)) for dim in (64, 80, 96, 128, 192, 256)},
    "head_dim 44, padded": (_attend, ProblemSize(44, 44)),
    "head_dim 192, values 128": (_attend, ProblemSize(192, 128)),
    "3 queries, heads packed": (_attend, ProblemSize(128, 128, 3, 150)),
    "7 queries, heads packed": (_attend, ProblemSize(128, 128, 7, 150)),
    "20 queries, heads packed": (_attend, ProblemSize(128, 128, 20, 150)),
    "1 query, keys split": (_attend, ProblemSize(64, 64, 1, 2100)),
    "from state to state": (_chain, ProblemSize(64, 64, 70, 130)),
    "gradient": (_gradient, ProblemSize(64, 64)),
    "head_dim 264, plain operations": (_attend, ProblemSize(264, 264)),  # more than the kernels support
}


def variants(backend: str = "metal") -> Iterator[Variant]:
    """Yield every variant of a backend's kernels, ordered by dtype."""
    for dtype in FLOATS:
        for what, (check, size) in VARIANTS.items():
            yield Variant(what, _name(dtype), partial(_run, check, backend, dtype, size))


def verify_variants(progress: Callable[[Variant], None] = lambda variant: None) -> Findings:
    """Check every variant. A variant that fell back to plain operations fails.

    Args:
        progress: Function that receives each variant before it runs.
    """
    findings = Findings()
    for variant in variants():
        progress(variant)
        findings.add(variant.what, variant.dtype, variant.name, variant.check)
    return findings


def _run(check: Callable[[Case, str], float], backend: str, dtype: mx.Dtype, size: ProblemSize) -> float:
    r = np.random.default_rng(size.dim + size.v_dim)
    shapes = (4, size.q_len, size.dim), (2, size.k_len, size.dim), (2, size.k_len, size.v_dim)
    q, k, v = (mx.array(r.standard_normal((1, *shape)).astype(np.float32)).astype(dtype) for shape in shapes)
    q_pos = np.arange(size.k_len - size.q_len, size.k_len, dtype=np.int32)
    return check(Case(q, k, v, q_pos, np.arange(size.k_len, dtype=np.int32), {"mask": "causal"}), backend)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
