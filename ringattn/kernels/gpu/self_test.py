"""Self-test of kernel variants: on a GPU, each is tested on a few tokens before its first use.

MLX compiles a kernel when its output is evaluated. That may be long after the call, in the middle of a user's model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from ...autograd.evaluation import await_inputs
from ...core.gradients import Gradients, Rows
from ...core.masks import Band
from ...core.online_softmax import State, finish
from ...errors import KernelWarning
from ..interface import KernelInputs, OutputSpec
from ..reference import ReferenceKernel

MOST_QUERIES = 72  # of a test: more rows than a warpgroup or a tile of Metal has
MOST_KEYS = 40  # of a test: the last tile of keys is not whole
TOLERANCE = 0.05  # of the largest value: a test finds wrong results, not inexact ones

Arrays = list[mx.array]
Attend = Callable[[KernelInputs, State | None, OutputSpec | None], Arrays]
Gradient = Callable[[KernelInputs, Rows, Gradients], Gradients]
_reference = ReferenceKernel()


class UnusableError(Exception):
    """A kernel variant does not work here."""


def variant(inputs: KernelInputs, state: State | None, output: OutputSpec | None, *details: str) -> str:
    """Describe the kernel variant that a call needs, with further properties that distinguish it."""
    rules = inputs.rules
    lengths = (inputs.q.shape[3], inputs.v.shape[3])
    features = {
        "band": rules.band != Band(),
        "softcap": rules.softcap is not None,
        "segments": rules.segments is not None,
        "mask": rules.mask is not None,
        "columns": rules.columns is not None,
        "state": state is not None,
        "lse": output is not None and output.lse,
        "sinks": output is not None and output.sinks is not None,
    }
    ends = "state" if output is None else _name(output.dtype)
    named = [feature for feature, there in features.items() if there]
    return ", ".join([f"{_name(inputs.q.dtype)} to {ends}", "head_dim {}/{}".format(*lengths), *named, *details])


class SelfTest:
    """Self-test of the kernel variants of one backend.

    Attributes:
        backend: The backend's name in messages.
        verdicts: Whether each tested variant works, by its description.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.verdicts: dict[str, bool] = {}

    def ensure(
        self,
        name: str,
        attend: Attend,
        inputs: KernelInputs,
        state: State | None,
        output: OutputSpec | None,
        keys: int = MOST_KEYS,
    ) -> None:
        """Test `attend` once on a few tokens that need the same kernels as `inputs`.

        Args:
            name: The `variant` of the call.
            attend: Attends to `inputs`, from a state or ``None``, and returns an output or a state.
            inputs: The inputs of the call that needs the kernels.
            state: The state of that call.
            output: The output of that call.
            keys: The largest number of keys of the test.

        Raises:
            UnusableError: If the kernels fail, or their result differs from that of plain MLX operations. The first
                time, a warning is given too.
        """
        if not self.works(name, lambda: _trial_error(attend, _trial_inputs(inputs, keys), state is not None, output)):
            raise UnusableError(name)

    def ensure_gradient(self, gradient: Gradient, inputs: KernelInputs, *details: str) -> None:
        """Test `gradient` once on a few tokens that need the same kernels as `inputs`.

        Args:
            gradient: Adds the gradients of `inputs` and of their rows to sums.
            inputs: The inputs of the call that needs the kernels.
            *details: Further properties that distinguish the kernels.

        Raises:
            UnusableError: If the kernels fail, or their result differs from that of plain MLX operations. The first
                time, a warning is given too.
        """
        name = ", ".join([f"the gradient, {variant(inputs, None, None)}", *details])
        if not self.works(name, lambda: _gradient_trial_error(gradient, _trial_inputs(inputs))):
            raise UnusableError(name)

    def works(self, name: str, trial: Callable[[], str]) -> bool:
        """Return whether the kernel variant `name` works here. Warn once if it does not.

        Args:
            name: The variant.
            trial: Runs the test and returns its error, or an empty string. Called the first time only.
        """
        if name not in self.verdicts:
            error = trial()
            self.verdicts[name] = not error
            if error:
                warnings.warn(
                    f"the {self.backend} kernel ({name}) does not work on this system, and slower operations replace "
                    f"it: {error} (please open an issue with this line and the output of `ringattn verify`)",
                    KernelWarning,
                    stacklevel=2,
                )
        return self.verdicts[name]

    def forget(self) -> None:
        """Forget all results, so that every variant is tested again."""
        self.verdicts.clear()


def _trial_error(attend: Attend, inputs: KernelInputs, with_state: bool, output: OutputSpec | None) -> str:
    """Return the error of `attend` on `inputs`, or an empty string."""
    await_inputs()  # the sinks may be among them
    before = _reference.forward(inputs) if with_state else None
    expected = _reference.forward(inputs, before)
    sinks = None if output is None or output.sinks is None else output.sinks[: inputs.group]
    few = None if output is None else replace(output, sinks=sinks)
    return trial_error(
        lambda: attend(inputs, before, few), expected if few is None else finish(expected, few.sinks, few.dtype)
    )


def _gradient_trial_error(gradient: Gradient, inputs: KernelInputs) -> str:
    """Return the error of `gradient` on `inputs`, or an empty string."""
    out, lse = finish(_reference.forward(inputs), None, inputs.q.dtype)
    dout = mx.cos(mx.arange(out.size)).reshape(out.shape).astype(out.dtype)
    # Not zero: the weight of a row's only key has no gradient through `out`, and its rounding would be compared.
    dlse = mx.where(lse == -mx.inf, 0.0, 1.0)
    rows = Rows.of(out, lse, dout, dlse)
    zeros = Gradients.zeros(inputs.q, inputs.k, inputs.v, inputs.rules)

    def arrays(found: Gradients) -> Arrays:
        return [x for x in found if x is not None]

    expected = arrays(_reference.backward(inputs, rows, zeros))
    return trial_error(lambda: arrays(gradient(inputs, rows, zeros)), expected)


def trial_error(run: Callable[[], Sequence[mx.array]], expected: Sequence[mx.array]) -> str:
    """Return the error of `run`, whose results should be `expected`, or an empty string."""
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


def _trial_inputs(inputs: KernelInputs, keys: int = MOST_KEYS) -> KernelInputs:
    """Make small inputs of random numbers with the features of `inputs`."""
    r = np.random.default_rng(0)
    group, q_len, k_len = inputs.group, min(inputs.rows[2], MOST_QUERIES), min(inputs.k.shape[2], keys)

    def normal(like: mx.array, heads: int, tokens: int) -> mx.array:
        return mx.array(r.standard_normal((1, heads, tokens, like.shape[3])), mx.float32).astype(like.dtype)

    rules = inputs.rules
    mask = inputs.rules.mask
    if mask is not None:
        mask = mx.array(r.random((1, group, q_len, k_len)) < 0.8).astype(mask.dtype)
    rules = replace(
        rules,
        mask=mask,
        columns=None if rules.columns is None else np.arange(k_len),
        segments=None if rules.segments is None else (mx.zeros((1, q_len), mx.int32), mx.zeros((1, k_len), mx.int32)),
    )
    q, k, v = normal(inputs.q, group, q_len), normal(inputs.k, 1, k_len), normal(inputs.v, 1, k_len)
    last = np.arange(q_len, dtype=np.int32) + max(0, k_len - q_len)  # a causal mask shows all keys but a few
    return KernelInputs(q, k, v, last, np.arange(k_len, dtype=np.int32), rules)
