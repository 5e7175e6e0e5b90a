"""Computations inside a transformation that are done as outside of it, on an NVIDIA GPU.

Inside a transformation MLX evaluates an array while the caller waits, and keeps what it was computed from. So a GPU
idles while Python prepares the next hop of a ring. In another thread nothing counts as traced. There MLX would cut all
arrays that it meets from what they were computed from, which gives zero gradients: it gets copies. The caller's thread
evaluates and copies the inputs, and the other one prepares meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from contextvars import copy_context

import mlx.core as mx

from ..native.cuda import driver
from .evaluation import Inputs, copies_on_gpu

Arrays = Sequence[mx.array]

_PATIENCE = 0.5  # s after which a signal is noticed that came just before a wait


def untraced(compute: Callable[..., Arrays], arrays: Arrays, interrupt: Callable[[BaseException], None]) -> Arrays:
    """Compute on copies of `arrays` that no transformation traces. On other devices, and outside, on `arrays`.

    Args:
        compute: A function of the arrays that evaluates, if it does, by the functions of `evaluation`.
        arrays: Its arguments.
        interrupt: Called with an exception, such as KeyboardInterrupt, that reaches this thread while it waits for
            another one. It should end the computation.
    """
    gpu = driver()
    if gpu is None or not _traced(arrays):
        return compute(*arrays)
    inputs = Inputs()
    copies, fill = copies_on_gpu(gpu, arrays)
    with suppress(ValueError):  # in a gradient all are traced
        mx.async_eval(*copies)  # MLX changes them while it does, which the other thread must not see
    future: Future | None = None
    try:
        future = _beside.thread.submit(copy_context().run, inputs.prepare, compute, copies)
        inputs.fill(fill)
        while not wait([future], timeout=_PATIENCE).done:
            pass
        return future.result()
    except BaseException as error:
        try:
            if future is None or not future.done():
                interrupt(error)
        finally:
            inputs.fail(error)
        raise


def _traced(arrays: Arrays) -> bool:
    """Whether a transformation traces one of `arrays`."""
    try:
        mx.async_eval(*(x.reshape(-1)[:1] for x in arrays))
    except ValueError:
        return True
    return False


class _Beside(threading.local):
    """For each thread another one, with a stream of its own: MLX's streams belong to threads."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "ringattn untraced", _make_stream)


def _make_stream() -> None:
    mx.set_default_stream(mx.new_stream(mx.default_device()))


_beside = _Beside()
