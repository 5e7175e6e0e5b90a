"""Results of functions of NumPy arrays, kept for arrays that nobody can write to.

A ring computes on the same positions in every call and layer. It takes time to make arrays of them, and to move these
to a GPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import wraps
from typing import Any, Generic, TypeVar

import numpy as np

T = TypeVar("T")


class Kept(Generic[T]):
    """The results that were used last, at most `most`, by a key and the identities of read-only arrays."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._results: OrderedDict[Hashable, tuple[Sequence, T]] = OrderedDict()  # the arrays keep identities valid

    def get(self, key: Hashable, arrays: Sequence[np.ndarray | None], make: Callable[[], T]) -> T:
        """Return the result for `key` and `arrays`, which `make` computes if it is not there.

        It is not kept if one of the arrays can be written to.
        """
        identities = key, *map(id, arrays)
        found = self._results.pop(identities, None)
        if found is None:
            found = arrays, make()
            if any(x is not None and x.flags.writeable for x in arrays):
                return found[1]
        self._results[identities] = found  # the last to be dropped
        if len(self._results) > self._most:
            self._results.popitem(last=False)
        return found[1]


def kept(most: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Keep results of a function as `Kept` does. Arguments that are no arrays must be hashable."""

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        results = Kept[T](most)

        @wraps(function)
        def call(*arguments: Any) -> T:
            arrays = [x for x in arguments if isinstance(x, np.ndarray)]
            key = tuple(None if isinstance(x, np.ndarray) else x for x in arguments)
            return results.get(key, arrays, lambda: function(*arguments))

        return call

    return decorate
