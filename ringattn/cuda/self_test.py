"""Whether a kernel variant works on this GPU: each is tried on a few tokens before it is first used."""

from __future__ import annotations

import warnings

from ..core.online_softmax import State
from ..errors import KernelWarning
from ..kernels.interface import KernelInputs, OutputSpec
from ..metal.self_test import Attend, UnusableError, _trial_error, _trial_inputs, variant

__all__ = ["UnusableError", "ensure", "forget"]

_verdicts: dict[str, bool] = {}


def ensure(attend: Attend, inputs: KernelInputs, state: State | None, output: OutputSpec | None, *details: str) -> None:
    """Try `attend` on a few tokens that need the same kernels as `inputs`, unless that was done before.

    Args:
        attend: Attends from a state, or from nothing, to an output or to a state.
        inputs: What the kernels are needed for.
        state: Its state.
        output: Its output.
        *details: What else distinguishes the kernels.

    Raises:
        UnusableError: If they failed, or gave another answer than plain MLX operations; the first time with a warning.
    """
    name = ", ".join([variant(inputs, state, output), *details])
    if name not in _verdicts:
        complaint = _trial_error(attend, _trial_inputs(inputs), state is not None, output)
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
