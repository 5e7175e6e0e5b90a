"""Whether a kernel variant works on this GPU: each is tried on a few tokens before it is first used."""

from __future__ import annotations

import warnings

from ..core.online_softmax import State
from ..errors import KernelWarning
from ..kernels.interface import KernelInputs, OutputSpec
from ..metal.self_test import Attend, UnusableError, _complaint, _few_tokens, variant

__all__ = ["UnusableError", "ensure", "forget"]

_verdicts: dict[str, bool] = {}


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
    if name not in _verdicts:
        complaint = _complaint(attend, _few_tokens(problem), state is not None, ending)
        _verdicts[name] = not complaint
        if complaint:
            warnings.warn(
                f"the CUDA kernel ({name}) does not work on this system, and a slower way takes its place: "
                f"{complaint} (please open an issue with this line and what `ringattn verify` prints)",
                KernelWarning,
                stacklevel=2,
            )
    if not _verdicts[name]:
        raise UnusableError(name)


def forget() -> None:
    """Try every variant again."""
    _verdicts.clear()
