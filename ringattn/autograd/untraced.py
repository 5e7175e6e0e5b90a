"""Computations inside a transformation that are done as outside of it, on an NVIDIA GPU.

Inside a transformation MLX evaluates an array while the caller waits, and keeps what it was computed from. So a GPU
idles while Python prepares the next hop of a ring. In another thread nothing counts as traced. There MLX would cut all
arrays that it meets from what they were computed from, which gives zero gradients: it gets copies. The caller's thread
evaluates and copies the inputs, and the other one prepares meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from functools import cache

import mlx.core as mx

from ..native.cuda import driver
from .evaluation import Inputs, copies_on_gpu

Arrays = Sequence[mx.array]

_PATIENCE = 0.5  # s after which a signal is noticed that came just before a wait


def untraced(compute: Callable[..., Arrays], arrays: Arrays, interrupt: Callable[[BaseException], None]) -> Arrays:
    """Compute on copies of `arrays` that no transformation traces. On other devices, and outside, on `arrays`.

    Args:
        compute: A function of the arrays that evaluates its results, or starts to, by the functions of `evaluation`.
        arrays: Its arguments.
        interrupt: Called with an exception, such as KeyboardInterrupt, that reaches this thread while it waits for
            another one. It should end the computation.
    """
    gpu = driver()
    if gpu is None or not _traced(arrays):
        return compute(*arrays)
    inputs = Inputs()
    copies, fill = copies_on_gpu(gpu, arrays)

    def prepare_and_compute() -> Arrays:
        inputs.use()
        return compute(*copies)

    future: Future | None = None
    try:
        future = _other_thread().submit(copy_context().run, prepare_and_compute)
        inputs.fill(fill)
        while not wait([future], timeout=_PATIENCE).done:
            pass
        return future.result()
    except BaseException as error:
        if future is None or not future.done():
            interrupt(error)
        raise


def _traced(arrays: Arrays) -> bool:
    """Whether a transformation traces one of `arrays`."""
    try:
        mx.async_eval(*(x.reshape(-1)[:1] for x in arrays))
    except ValueError:
        return True
    return False


@cache
def _other_thread() -> ThreadPoolExecutor:
    """A thread with a stream of its own: MLX's streams belong to threads."""
    return ThreadPoolExecutor(1, "ringattn untraced", lambda: mx.set_default_stream(mx.new_stream(mx.default_device())))
