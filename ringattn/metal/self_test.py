"""Whether a kernel variant works on this Mac: each is tried on a few tokens before it is first used.

MLX compiles a kernel when its output is evaluated, which may be long after the call, in the middle of a user's model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from ..core.masks import Band
from ..core.online_softmax import State, finish
from ..errors import KernelWarning
from ..kernels.interface import KernelInputs, OutputSpec
from ..kernels.reference import ReferenceKernel

MOST_QUERIES, MOST_KEYS = 72, 40  # of the trial: as many rows as any tile has, and a tile of keys that is not whole
TOLERANCE = 0.05  # of the largest value: a trial finds what is wrong, not what is inexact

Arrays = list[mx.array]
Attend = Callable[[KernelInputs, State | None, OutputSpec | None], Arrays]
_verdicts: dict[str, bool] = {}


class UnusableError(Exception):
    """A kernel variant does not work here."""


def variant(problem: KernelInputs, state: State | None, ending: OutputSpec | None) -> str:
    """What distinguishes the kernels that such a problem needs, in words."""
    rules, lengths = problem.rules, (problem.q.shape[3], problem.v.shape[3])
    features = {
        "band": rules.band != Band(),
        "softcap": rules.softcap is not None,
        "segments": rules.segments is not None,
        "mask": rules.mask is not None,
        "columns": rules.columns is not None,
        "state": state is not None,
        "lse": ending is not None and ending.lse,
        "sinks": ending is not None and ending.sinks is not None,
    }
    ends = "state" if ending is None else _name(ending.dtype)
    words = [f"{_name(problem.q.dtype)} to {ends}", "head_dim {}/{}".format(*lengths)]
    return ", ".join(words + [feature for feature, there in features.items() if there])


def ensure(attend: Attend, problem: KernelInputs, state: State | None, ending: OutputSpec | None, *words: str) -> None:
    """Try `attend` on a few tokens that need the same kernels as `problem`, unless that was done before.

    Args:
        attend: Attends from a state, or from nothing, to an ending or to a state.
        problem: What the kernels are needed for.
        state: Its state.
        ending: Its ending.
        *words: What else distinguishes the kernels.

    Raises:
        UnusableError: If they failed, or gave another answer than plain MLX operations; the first time with a warning.
    """
    name = ", ".join([variant(problem, state, ending), *words])
    if not works(name, lambda: _complaint(attend, _few_tokens(problem), state is not None, ending)):
        raise UnusableError(name)


def works(name: str, trial: Callable[[], str]) -> bool:
    """Whether the kernel variant `name` works here; the first time by a `trial`, which tells what is wrong or nothing.

    If something is, a warning says so, once.
    """
    if name not in _verdicts:
        complaint = trial()
        _verdicts[name] = not complaint
        if complaint:
            warnings.warn(
                f"the Metal kernel ({name}) does not work on this system, and a slower way takes its place: "
                f"{complaint} (please open an issue with this line and what `ringattn verify` prints)",
                KernelWarning,
                stacklevel=2,
            )
    return _verdicts[name]


_reference = ReferenceKernel()


def forget() -> None:
    """Try every variant again."""
    _verdicts.clear()


def _complaint(attend: Attend, problem: KernelInputs, with_state: bool, ending: OutputSpec | None) -> str:
    """What is wrong with the answer of `attend`, or nothing."""
    before = _reference.forward(problem) if with_state else None
    expected = _reference.forward(problem, before)
    sinks = None if ending is None or ending.sinks is None else ending.sinks[: problem.group]
    few = None if ending is None else replace(ending, sinks=sinks)
    return complaint(
        lambda: attend(problem, before, few), expected if few is None else finish(expected, few.sinks, few.dtype)
    )


def complaint(run: Callable[[], Sequence[mx.array]], expected: Sequence[mx.array]) -> str:
    """What is wrong with the arrays that `run` gives, or nothing."""
    try:
        pairs = list(zip(run(), expected))
        mx.eval(pairs)
    except (RuntimeError, ValueError) as error:
        return " ".join(str(error).split())[:300]
    return "" if all(_close(*pair) for pair in pairs) else "its answer is wrong"


def _close(x: mx.array, y: mx.array) -> bool:
    a, b = (np.array(z.astype(mx.float32)) for z in (x, y))
    return np.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * float(np.abs(b[np.isfinite(b)]).max(initial=0.0)))


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _few_tokens(problem: KernelInputs) -> KernelInputs:
    """A small problem of random numbers with the features of `problem`."""
    r = np.random.default_rng(0)
    group, q_len, k_len = problem.group, min(problem.rows[2], MOST_QUERIES), min(problem.k.shape[2], MOST_KEYS)

    def normal(like: mx.array, heads: int, tokens: int) -> mx.array:
        return mx.array(r.standard_normal((1, heads, tokens, like.shape[3])), mx.float32).astype(like.dtype)

    rules, mask = problem.rules, problem.rules.mask
    if mask is not None:
        mask = mx.array(r.random((1, group, q_len, k_len)) < 0.8).astype(mask.dtype)
    rules = replace(
        rules,
        mask=mask,
        columns=None if rules.columns is None else np.arange(k_len),
        segments=None if rules.segments is None else (mx.zeros((1, q_len), mx.int32), mx.zeros((1, k_len), mx.int32)),
    )
    q, k, v = normal(problem.q, group, q_len), normal(problem.k, 1, k_len), normal(problem.v, 1, k_len)
    return KernelInputs(q, k, v, np.arange(q_len, dtype=np.int32), np.arange(k_len, dtype=np.int32), rules)
