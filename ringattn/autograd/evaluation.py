"""When arrays are evaluated: with or without a wait, inside transformations too, and beside the caller's thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
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
        self._there: Future[None] = Future()
        self._later: list[Arrays] = []

    def use(self) -> None:
        """Let the calling thread's context, which is a copy of its own, prepare."""
        _inputs.set(self)

    def fill(self, fill: Callable[[], None]) -> None:
        """Fill the arrays by `fill`. The thread that waits for them raises its errors; signals are raised here, too."""
        try:
            fill()
        except BaseException as error:
            self._there.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            self._there.set_result(None)

    def start(self, arrays: Arrays) -> None:
        """Start to evaluate `arrays`, now or later, after those before."""
        self._later.append(arrays)
        if self._there.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the inputs, and start to evaluate what waits for them."""
        self._there.result()
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
