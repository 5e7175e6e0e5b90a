"""Computations inside a transformation that are done as outside of it, on an NVIDIA GPU.

Inside a transformation MLX evaluates an array while the caller waits, and keeps what it was computed from. So a GPU
idles while Python prepares the next hop of a ring. Arrays that were not computed from traced ones are evaluated as
outside, but in the gradient of a custom function all arrays of the thread count as traced. Another thread has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from functools import cache, partial

import mlx.core as mx

from ..native.cuda import Driver, driver

Arrays = Sequence[mx.array]

_PATIENCE = 0.5  # s after which a signal is noticed that came just before a wait


def untraced(compute: Callable[..., Arrays], arrays: Arrays, interrupt: Callable[[BaseException], None]) -> Arrays:
    """Compute on copies of `arrays` that no transformation traces. On other devices, and outside, on `arrays`.

    Args:
        compute: A function of the arrays that evaluates its results, or starts to.
        arrays: Its arguments.
        interrupt: Called with an exception, such as KeyboardInterrupt, that reaches this thread while it waits for
            another one. It should end the computation.
    """
    gpu = driver()
    if gpu is None or not _traced(arrays):
        return compute(*arrays)
    copies = copies_on_gpu(gpu, arrays)
    if not _traced(copies):
        return compute(*copies)
    future: Future | None = None
    try:
        future = _other_thread().submit(copy_context().run, partial(compute, *copies))
        while not wait([future], timeout=_PATIENCE).done:
            pass
        return future.result()
    except BaseException as error:
        if future is None or not future.done():
            interrupt(error)
        raise


def copies_on_gpu(gpu: Driver, arrays: Arrays) -> list[mx.array]:
    """Copy `arrays` without views on the host, which would move them there."""
    sources = [mx.contiguous(x) for x in arrays]
    copies, targets = gpu.allocate([(x.shape, x.dtype) for x in arrays])
    located, places = gpu.locate(sources)
    mx.eval(*copies, *located)  # here, because another thread cannot
    gpu.copy_all(targets(), places(), [x.nbytes for x in sources])
    return copies


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
    return ThreadPoolExecutor(1, "ringattn gradient", lambda: mx.set_default_stream(mx.new_stream(mx.default_device())))
