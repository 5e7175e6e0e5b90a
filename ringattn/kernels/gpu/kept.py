"""Results of functions of NumPy arrays, kept for arrays that nobody can write to.

A ring computes on the same positions in every call and layer. It takes time to make arrays of them, and to move these
to a GPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def kept(most: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Keep the last `most` results of a function whose arrays are all read-only, by the identity of the arrays.

    Arguments that are no arrays must be hashable. A call with an array that can be written to is not kept.
    """

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        results: OrderedDict[tuple, tuple[tuple, T]] = OrderedDict()  # the arguments keep the identities valid

        @wraps(function)
        def call(*arguments: Any) -> T:
            if any(isinstance(x, np.ndarray) and x.flags.writeable for x in arguments):
                return function(*arguments)
            key = tuple(id(x) if isinstance(x, np.ndarray) else x for x in arguments)
            found = results.get(key)
            if found is None:
                found = arguments, function(*arguments)
                results[key] = found
                if len(results) > most:
                    results.popitem(last=False)
            return found[1]

        return call

    return decorate
