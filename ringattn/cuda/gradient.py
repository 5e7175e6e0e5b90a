"""The gradient by the CUDA kernels."""

from __future__ import annotations

from functools import partial
from math import prod

import mlx.core as mx

from ..core.gradients import Gradients, Rows
from ..kernels.gpu.self_test import UnusableError, trial_error
from ..kernels.interface import KernelInputs
from . import launch
from .backward import rows_call
from .gradient_plans import Plan, Span, cut, planned, plans, rows_of

TRIAL = 40  # rows of a self-test


def rows(out: mx.array, lse: mx.array, dout: mx.array, dlse: mx.array) -> Rows:
    """Compute the rows for `gradient`, with plain operations where the kernel does not work. See `Kernel.rows`."""
    arrays = [mx.contiguous(x) for x in (out, lse, dout, dlse)]
    if launch.default():
        name = f"rows of the gradient, {out.dtype} and {dout.dtype}, head_dim {out.shape[3]}"
        if not launch.self_test.works(name, lambda: _rows_error(*map(_few, arrays))):
            return Rows.of(*arrays)
    return _rows(*arrays)


def _rows_error(*arrays: mx.array) -> str:
    """The error of the kernel for rows on some arrays, or an empty string."""
    return trial_error(lambda: _rows(*arrays), Rows.of(*arrays))


def _few(x: mx.array) -> mx.array:
    """Some numbers in the dtype and the number of dims of `x`: its own may not be evaluated in mx.compile."""
    shape = (1, 1, TRIAL, *x.shape[3:])
    return mx.sin(mx.arange(prod(shape))).reshape(shape).astype(x.dtype)


def _rows(out: mx.array, lse: mx.array, dout: mx.array, dlse: mx.array) -> Rows:
    return Rows(dout, *launch.run(rows_call(out, lse, dout, dlse)))


def gradient(inputs: KernelInputs, rows: Rows, sums: Gradients | None = None) -> Gradients:
    """Add the gradients to `sums`, or compute them alone. Results stay lazy. See `Kernel.backward`.

    Raises:
        UnusableError: If the kernels do not work here.
    """
    alone = sums is None
    sums = sums or Gradients.zeros(inputs.q, inputs.k, inputs.v, inputs.rules)
    inputs = inputs.whole()
    return _run(_usable(inputs, alone), inputs, rows, sums, alone)


def _usable(inputs: KernelInputs, alone: bool) -> type[Plan]:
    """The first kind of plan that works here, for gradients `alone` or with sums."""
    *better, last = plans(inputs)
    if not launch.default():
        return (*better, last)[0]
    for kind in better:
        try:
            _ensure(kind, inputs, alone)
            return kind
        except UnusableError:
            continue
    _ensure(last, inputs, alone)
    return last


def _ensure(kind: type[Plan], inputs: KernelInputs, alone: bool) -> None:
    """Test the kernels that a kind of plan needs."""
    alone = alone and _at_once(inputs, planned(kind, inputs)[1])
    details = (kind.name, "alone") if alone else (kind.name,)
    launch.self_test.ensure_gradient(partial(_run, kind, alone=alone), inputs, *details)


def _at_once(inputs: KernelInputs, steps: list[tuple[Span, Span]]) -> bool:
    """Whether one call computes all gradients."""
    return steps == [((0, inputs.rows[2]), (0, inputs.k.shape[2]))]


def _run(kind: type[Plan], inputs: KernelInputs, rows: Rows, sums: Gradients, alone: bool) -> Gradients:
    inputs = inputs.whole()
    rows = Rows(rows.dout.astype(inputs.q.dtype), mx.contiguous(rows.lse), mx.contiguous(rows.delta))
    plan, steps = planned(kind, inputs)
    if alone and _at_once(inputs, steps):
        return plan.call(inputs, rows, Gradients(None, None, None, sums.mask), *steps[0])
    dq = {queries: cut(sums.q, queries) for queries in plan.queries_of(inputs)}
    for step in steps:
        queries, keys = step
        found = plan.call(inputs, rows_of(rows, queries), sums._replace(q=dq[queries]), queries, keys)
        dq[queries] = found.q
        sums = found._replace(q=sums.q)
        if step != steps[-1]:
            rows = Rows(*mx.depends(list(rows), [found.q, found.k, found.v]))  # calls wait for each other: memory
    return sums._replace(q=mx.concatenate(list(dq.values()), 2) if len(dq) > 1 else dq[0, inputs.rows[2]])
