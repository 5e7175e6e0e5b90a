"""The variants of a GPU's kernels, each as a problem that needs it: what a machine has to show that it can run.

Masks, windows, segments, softcap and sinks are variants too; those are the features that every backend is checked on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from .. import backends
from ..attention import attention
from ..core.masks import Band
from ..core.online_softmax import State, finish
from ..core.rules import Rules
from ..kernels.interface import KernelInputs
from .findings import Check, Findings
from .oracle import FLOATS, Case, GradientCase, ratios


@dataclass(frozen=True)
class Sizes:
    """Of a problem with grouped heads and a causal mask: head dims of keys and values, and numbers of tokens."""

    dim: int
    v_dim: int
    q_len: int = 71
    k_len: int = 83


@dataclass(frozen=True)
class Variant:
    """One variant.

    Attributes:
        what: What is special about it.
        dtype: Of q, k and v, such as ``"float16"``.
        check: Runs it; returns the largest error as a fraction of what is allowed.
    """

    what: str
    dtype: str
    check: Check

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"{self.what}, {self.dtype}"


def _attend(case: Case, backend: str) -> float:
    out, lse = attention(case.q, case.k, case.v, backend=backend, return_lse=True, **case.options)
    return max(ratios(case, out, lse))


def _chain(case: Case, backend: str) -> float:
    """Through the states that a kernel ends in and starts from, as the hops of a ring do."""
    kernel, rules = backends.select(backend), Rules(case.q.shape[3] ** -0.5, Band(high=0))
    half = case.k.shape[2] // 2
    state: State | None = None
    for keys in (slice(0, half), slice(half, None)):
        k, v = case.k[:, :, keys], case.v[:, :, keys]
        state = kernel.forward(KernelInputs(case.q, k, v, case.q_pos, case.k_pos[keys], rules), state)
    assert state is not None
    return max(ratios(case, *finish(state, None, case.q.dtype)))


def _pull_back(case: Case, backend: str) -> float:
    problem = GradientCase.random(case)

    def function(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        return list(attention(q, k, v, backend=backend, return_lse=True, **case.options))

    _, found = mx.vjp(function, [case.q, case.k, case.v], [problem.dout, problem.dlse])
    return max(problem.ratios(dict(zip("qkv", found))).values())


VARIANTS: dict[str, tuple[Callable[[Case, str], float], Sizes]] = {
    **{f"head_dim {dim}": (_attend, Sizes(dim, dim)) for dim in (64, 80, 96, 128, 192, 256)},
    "head_dim 44, padded": (_attend, Sizes(44, 44)),
    "head_dim 192, values 128": (_attend, Sizes(192, 128)),
    "3 queries, heads packed": (_attend, Sizes(128, 128, 3, 150)),
    "7 queries, heads packed": (_attend, Sizes(128, 128, 7, 150)),
    "20 queries, heads packed": (_attend, Sizes(128, 128, 20, 150)),
    "1 query, keys split": (_attend, Sizes(64, 64, 1, 2100)),
    "from state to state": (_chain, Sizes(64, 64, 70, 130)),
    "gradient": (_pull_back, Sizes(64, 64)),
    "head_dim 264, plain operations": (_attend, Sizes(264, 264)),  # above what the kernels take
}


def variants(backend: str = "metal") -> Iterator[Variant]:
    """Every variant of a backend's kernels, dtype by dtype."""
    for dtype in FLOATS:
        for what, (check, sizes) in VARIANTS.items():
            yield Variant(what, _name(dtype), partial(_run, check, backend, dtype, sizes))


def verify_variants(progress: Callable[[Variant], None] = lambda variant: None) -> Findings:
    """Try every variant; one that fell back to something else has failed.

    Args:
        progress: Is told of each variant before it runs.
    """
    found = Findings()
    for variant in variants():
        progress(variant)
        found.add(variant.what, variant.dtype, variant.name, variant.check)
    return found


def _run(check: Callable[[Case, str], float], backend: str, dtype: mx.Dtype, sizes: Sizes) -> float:
    r = np.random.default_rng(sizes.dim + sizes.v_dim)
    shapes = (4, sizes.q_len, sizes.dim), (2, sizes.k_len, sizes.dim), (2, sizes.k_len, sizes.v_dim)
    q, k, v = (mx.array(r.standard_normal((1, *shape)).astype(np.float32)).astype(dtype) for shape in shapes)
    q_pos = np.arange(sizes.k_len - sizes.q_len, sizes.k_len, dtype=np.int32)
    return check(Case(q, k, v, q_pos, np.arange(sizes.k_len, dtype=np.int32), {"mask": "causal"}), backend)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
