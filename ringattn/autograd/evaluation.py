"""When arrays are evaluated: with or without a wait, inside transformations too, and beside the caller's thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar

import mlx.core as mx

from ..core.arrays import view
from ..native.cuda import Driver, driver

Arrays = Sequence[mx.array]


class Inputs:
    """Arrays that one thread fills, while another one prepares what is computed from them.

    What that thread starts to evaluate before they are there starts when it waits for them, in the same order.
    """

    def __init__(self) -> None:
        self._settled = threading.Event()
        self._error: BaseException | None = None
        self._later: list[Arrays] = []

    def prepare(self, compute: Callable[..., Arrays], arrays: Arrays) -> Arrays:
        """Compute on the arrays, in a thread and a context of its own. It waits for them where it needs them."""
        _inputs.set(self)
        found = compute(*arrays)
        self.wait()
        mx.async_eval(*found)  # here: another thread cannot evaluate what this one has built
        return found

    def fill(self, fill: Callable[[], None]) -> None:
        """Fill the arrays by `fill`. The thread that waits for them raises its errors."""
        try:
            fill()
        except Exception as error:
            self.fail(error)
        self._settled.set()

    def fail(self, error: BaseException) -> None:
        """Let the thread that waits for the arrays raise `error`."""
        self._error = error
        self._settled.set()

    def start(self, arrays: Arrays) -> None:
        """Start to evaluate `arrays`, now or later, after those before."""
        self._later.append(arrays)
        if self._settled.is_set():
            self.wait()

    def wait(self) -> None:
        """Wait for the inputs, and start to evaluate what waits for them."""
        self._settled.wait()
        if self._error is not None:
            raise self._error
        later, self._later = self._later, []
        for arrays in later:
            mx.async_eval(*arrays)


_inputs: ContextVar[Inputs | None] = ContextVar("ringattn_inputs", default=None)


def start_evaluation(*arrays: mx.array) -> None:
    """Start to evaluate `arrays`, without waiting where MLX can. Raise now if a transformation traces them."""
    inputs = _inputs.get()
    if inputs is not None:
        inputs.start(arrays)
        return
    try:
        mx.async_eval(*arrays)
    except ValueError:
        mx.eval(*arrays)  # mx.grad allows eval but not async_eval; under mx.compile and mx.vmap eval raises too


def evaluate(*arrays: mx.array) -> None:
    """Evaluate `arrays`, and wait."""
    await_inputs()
    mx.eval(*arrays)


def evaluated_copies(arrays: Arrays) -> Arrays:
    """Start to evaluate `arrays` and return them. Inside a transformation return evaluated copies.

    Inside a transformation MLX keeps the inputs of an array as long as the array lives, evaluated or not. Copies free
    them.
    """
    await_inputs()
    try:
        mx.async_eval(*arrays)
    except ValueError:
        mx.eval(*arrays)
        return _copies(arrays)
    return arrays


def await_inputs() -> None:
    """Wait for the inputs, in a thread that prepares what is computed from them. Call it before they are read."""
    inputs = _inputs.get()
    if inputs is not None:
        inputs.wait()


def _copies(arrays: Arrays) -> Arrays:
    gpu = driver()
    if gpu is None:
        return [_copy(x) for x in arrays]
    copies, fill = copies_on_gpu(gpu, arrays)
    fill()
    return copies


def _copy(x: mx.array) -> mx.array:
    y = mx.array(view(x))
    return y.view(mx.bfloat16) if x.dtype == mx.bfloat16 else y


def copies_on_gpu(gpu: Driver, arrays: Arrays) -> tuple[list[mx.array], Callable[[], None]]:
    """Prepare copies of `arrays` without views on the host, which would move them there.

    Returns:
        The copies, which are not computed from `arrays` in MLX's graph, and a function that evaluates and fills them.
    """
    sources = [mx.contiguous(x) for x in arrays]
    copies, targets = gpu.allocate([(x.shape, x.dtype) for x in arrays])
    located, places = gpu.locate(sources)

    def fill() -> None:
        mx.eval(*copies, *located)
        gpu.copy_all(targets(), places(), [x.nbytes for x in sources])

    return copies, fill


class InFlight:
    """At most two dispatches at a time: the next one starts when the last but one has ended."""

    def __init__(self) -> None:
        self._last: Arrays = []

    def add(self, outputs: Arrays) -> Arrays:
        """Start `outputs`, wait for the outputs before them, and return `settled` outputs."""
        outputs = evaluated_copies(outputs)
        mx.eval(*self._last)
        self._last = outputs
        return outputs
