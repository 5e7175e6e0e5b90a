"""Ropes whose angles depend on the number of tokens in one call. Ranks compute chunks, so their angles would differ.

mlx-lm's families bring ropes of their own. A rope is therefore judged by its result for positions in one call and in
two.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

FURTHEST = 24  # positions up to 2 ** 24, the last that float32 counts one by one
TOLERANCE = 1e-3  # of values of 1: one token more or less moves some angle by 1e-2


class RopeCall(NamedTuple):
    """One call of a rope."""

    rope: nn.Module
    arguments: inspect.BoundArguments  # without the module itself

    @property
    def key(self) -> tuple[Any, ...]:
        """A key that is equal for calls with the same effect on the same position, such as those of all layers."""
        state = {**vars(self.rope), **self.rope}
        values = [(name, np.array(x).tobytes() if isinstance(x, mx.array) else repr(x)) for name, x in state.items()]
        shapes = [getattr(x, "shape", x) for x in self.arguments.arguments.values()]
        return type(self.rope), repr(sorted(values)), repr(shapes)

    def rotate_ones(self, position: int, tokens: int) -> mx.array:
        """Rotate `tokens` tokens of ones from `position` on: ``[1, heads, tokens, dim]``."""
        recorded = self.arguments.arguments
        name = next(iter(recorded))
        *front, _, dim = recorded[name].shape
        given = {**recorded, name: mx.ones((*front, tokens, dim)), "offset": position}
        bound = inspect.BoundArguments(self.arguments.signature, OrderedDict(given))
        return self.rope(*bound.args, **bound.kwargs)

    def differs(self, position: int) -> mx.array:
        """Whether two tokens at `position` have another result in one call than in two."""
        one_by_one = [self.rotate_ones(position, 1), self.rotate_ones(position + 1, 1)]
        return mx.abs(self.rotate_ones(position, 2) - mx.concatenate(one_by_one, -2)).max() > TOLERANCE


@contextmanager
def recorded_ropes(model: nn.Module) -> Iterator[list[RopeCall]]:
    """A list that collects the calls of the model's ropes while the model runs.

    A module with an offset and no cache among its parameters counts as a rope.
    """
    calls: list[RopeCall] = []
    with ExitStack() as stack:
        for kind in {type(part) for part in model.modules()}:
            parameters = inspect.signature(kind.__call__).parameters
            if "offset" in parameters and "cache" not in parameters:
                stack.callback(setattr, kind, "__call__", kind.__call__)
                setattr(kind, "__call__", _recording(kind.__call__, calls))  # noqa: B010
        yield calls


def _recording(plain: Any, calls: list[RopeCall]) -> Any:
    """The `__call__` of a module, `plain`, which also adds its calls to a list."""

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(partial(plain, module)).bind(*args, **kwargs)
        calls.append(RopeCall(module, bound))
        return plain(module, *args, **kwargs)

    return call


def longest_context(calls: list[RopeCall]) -> float:
    """The tokens of context up to which every rope is independent of the tokens in one call; infinite: always.

    A dependence that begins somewhere is taken to stay from there on.
    """
    calls = list({call.key: call for call in calls}.values())
    grid = [2**i - 1 for i in range(FURTHEST)]
    found = [[call.differs(position) for position in grid] for call in calls]
    mx.eval(found)
    return min((_bisect(call, grid, row) for call, row in zip(calls, found)), default=float("inf"))


def _bisect(call: RopeCall, grid: list[int], differs: list[mx.array]) -> float:
    """The tokens of context without a difference; `differs` says where on the grid there is one."""
    at = next((i for i, one in enumerate(differs) if one.item()), None)
    if at is None:
        return float("inf")
    same = grid[at - 1] if at else -1
    other = grid[at]
    while other - same > 1:
        middle = (same + other) // 2
        if call.differs(middle).item():
            other = middle
        else:
            same = middle
    return float(other + 1)
