"""Ropes whose angles depend on which tokens come in one call: ranks compute chunks of their own, and would differ.

mlx-lm's families bring ropes of their own, so each is judged by what it does to positions in one call and in two.
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
        """Equal for calls that do the same to the same position, such as those of a model's layers."""
        state = {**vars(self.rope), **self.rope}
        values = [(name, np.array(x).tobytes() if isinstance(x, mx.array) else repr(x)) for name, x in state.items()]
        shapes = [getattr(x, "shape", x) for x in self.arguments.arguments.values()]
        return type(self.rope), repr(sorted(values)), repr(shapes)

    def at(self, position: int, tokens: int) -> mx.array:
        """The rotation of `tokens` tokens of ones from `position` on: ``[1, heads, tokens, dim]``."""
        found = self.arguments.arguments
        name = next(iter(found))
        *front, _, dim = found[name].shape
        given = {**found, name: mx.ones((*front, tokens, dim)), "offset": position}
        bound = inspect.BoundArguments(self.arguments.signature, OrderedDict(given))
        return self.rope(*bound.args, **bound.kwargs)

    def differs(self, position: int) -> mx.array:
        """Whether two tokens at `position` come out otherwise in one call than in two."""
        apart = [self.at(position, 1), self.at(position + 1, 1)]
        return mx.abs(self.at(position, 2) - mx.concatenate(apart, -2)).max() > TOLERANCE


@contextmanager
def recorded_ropes(model: nn.Module) -> Iterator[list[RopeCall]]:
    """A list of the calls of the model's ropes, the modules that take an offset and no cache, while the model runs."""
    calls: list[RopeCall] = []
    with ExitStack() as stack:
        for kind in {type(part) for part in model.modules()}:
            parameters = inspect.signature(kind.__call__).parameters
            if "offset" in parameters and "cache" not in parameters:
                stack.callback(setattr, kind, "__call__", kind.__call__)
                setattr(kind, "__call__", _recording(kind.__call__, calls))  # noqa: B010
        yield calls


def _recording(plain: Any, calls: list[RopeCall]) -> Any:
    """`plain`, a module's `__call__`, which adds its calls to a list."""

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(partial(plain, module)).bind(*args, **kwargs)
        calls.append(RopeCall(module, bound))
        return plain(module, *args, **kwargs)

    return call


def longest_context(calls: list[RopeCall]) -> float:
    """The tokens of context up to which no rope depends on how many tokens come in one call; infinite where none does.

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
    same, other = grid[at - 1] if at else -1, grid[at]
    while other - same > 1:
        middle = (same + other) // 2
        if call.differs(middle).item():
            other = middle
        else:
            same = middle
    return float(other + 1)
