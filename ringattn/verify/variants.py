"""The variants of the Metal kernels, each as a problem that needs it: what a Mac has to show that it can run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

from ..attention import attention
from ..errors import KernelWarning
from ..metal import probe
from .features import FEATURES
from .oracle import FLOATS, Case, GradientCase, ratios

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
Check = Callable[[], float]  # the largest error as a fraction of what is allowed


def variants() -> Iterator[tuple[str, Check]]:
    """Names of variants, and how each is checked."""
    for dtype in FLOATS:
        short = str(dtype).removeprefix("mlx.core.")
        for dim in HEAD_DIMS:
            yield f"forward, {short}, head_dim {dim}", _checked(_case(dtype, dim, dim))
        yield f"forward, {short}, head_dim 40 (padded)", _checked(_case(dtype, 40, 40))
        yield f"forward, {short}, head_dim 192, value head_dim 128", _checked(_case(dtype, 192, 128))
        yield f"few queries, {short}", _checked(_case(dtype, 128, 128, q_len=3, k_len=150))
        yield f"few queries, keys split, {short}", _checked(_case(dtype, 64, 64, q_len=1, k_len=2100))
        yield f"from state to state, {short}", _chained(_case(dtype, 64, 64, q_len=70, k_len=130))
        yield f"gradient, {short}", _pulled_back(_case(dtype, 64, 64))
    for name, make in FEATURES.items():
        yield f"{name}", _checked(make)


def _case(dtype: mx.Dtype, dim: int, v_dim: int, q_len: int = 71, k_len: int = 83) -> Callable[[], Case]:
    """Grouped heads, a causal mask, lengths that divide by nothing."""

    def make() -> Case:
        r = np.random.default_rng(dim + v_dim)
        shapes = (4, q_len, dim), (2, k_len, dim), (2, k_len, v_dim)
        q, k, v = (mx.array(r.standard_normal((1, *shape)).astype(np.float32)).astype(dtype) for shape in shapes)
        return Case(q, k, v, np.arange(k_len - q_len, k_len), np.arange(k_len), {"mask": "causal"})

    return make


def _checked(make: Callable[[], Case]) -> Check:
    def check() -> float:
        case = make()
        out, lse = attention(case.q, case.k, case.v, backend="metal", return_lse=True, **case.options)
        return max(ratios(case, out, lse))

    return check


def _chained(make: Callable[[], Case]) -> Check:
    """Through the states that a kernel ends in and starts from, as the hops of a ring do."""

    def check() -> float:
        from ..backends import metal
        from ..mask import Band
        from ..merge import finish
        from ..options import Options

        case = make()
        rules = Options.checked(
            case.q, case.k, columns=case.k.shape[2], scale=None, window=None, softcap=None, sinks=None, segments=None,
            out_dtype=None, **case.options,
        ).rules()  # fmt: skip
        assert rules.band != Band()
        state = None
        for keys in (slice(0, 61), slice(61, None)):
            k, v = case.k[:, :, keys], case.v[:, :, keys]
            state = metal.forward(case.q, k, v, case.q_pos, case.k_pos[keys], rules, state)
        assert state is not None
        return max(ratios(case, *finish(state, None, case.q.dtype)))

    return check


def _pulled_back(make: Callable[[], Case]) -> Check:
    def check() -> float:
        problem = GradientCase.random(make())
        case = problem.case

        def function(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
            return list(attention(q, k, v, backend="metal", return_lse=True, **case.options))

        _, found = mx.vjp(function, [case.q, case.k, case.v], [problem.dout, problem.dlse])
        return max(problem.ratios(dict(zip("qkv", found))).values())

    return check


def verify_variants(progress: Callable[[str], None] = lambda name: None) -> dict[str, float | str]:
    """For each variant its largest error as a fraction of what is allowed, or in words why there is none.

    A variant that fell back to something else has failed, though its answer is right.
    """
    found: dict[str, float | str] = {}
    for name, check in variants():
        progress(name)
        probe.forget()  # lest a variant that another one needed as well falls back unheard
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", KernelWarning)
            try:
                found[name] = check()
            except Exception as error:  # whatever it is, the next variant is tried
                found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        fallbacks = [str(warning.message) for warning in caught if issubclass(warning.category, KernelWarning)]
        if fallbacks and not isinstance(found[name], str):
            found[name] = fallbacks[0]
    return found
