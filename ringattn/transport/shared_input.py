"""An input that must be the same on all ranks in a series of calls, such as the token ids of a model's call."""

from __future__ import annotations

from functools import cached_property, lru_cache
from hashlib import blake2b

import mlx.core as mx
import numpy as np

TAG_BYTES = 8
SHOWN = 4  # values that an error shows
_FACTORS = (0x9E3779B1, 0x85EBCA77)  # odd, of 32 bits: two polynomial hashes make one tag


class SharedInput:
    """An array of integers that is the same on every rank.

    Args:
        name: The name of the input in error messages.
        values: Integers, any shape; evaluated only where a rank has to wait anyway.
        remedy: Advice for the user where ranks differ.
    """

    def __init__(self, name: str, values: mx.array, remedy: str):
        self._name = name
        self._values = values.reshape(-1)
        self._remedy = remedy

    @cached_property
    def tag(self) -> mx.array:
        """A hash of the values ``[TAG_BYTES]``, uint8, in MLX's graph. Any one value that differs changes it."""
        numbers = self._values.astype(mx.uint32) + 1
        sums = [mx.sum(numbers * powers) for powers in _powers(self._values.size)]
        return mx.stack(sums).view(mx.uint8)

    @cached_property
    def tag_bytes(self) -> bytes:
        """The bytes of `tag`, computed by NumPy: for a few values it finishes before MLX would begin."""
        numbers = np.array(self._values).astype(np.uint32) + np.uint32(1)
        sums = [np.sum(numbers * powers, dtype=np.uint32) for powers in _host_powers(self._values.size)]
        return np.array(sums, np.uint32).tobytes()

    @property
    def field(self) -> tuple[str, str, str]:
        """The name, a short text of the values, and the remedy."""
        values = np.array(self._values)
        shown = ", ".join(map(str, values[:SHOWN].tolist()))
        if len(values) > SHOWN:
            digest = blake2b(values.astype("<i8").tobytes(), digest_size=4).hexdigest()
            shown += f", ...: {len(values)} values with digest {digest}"
        return self._name, f"[{shown}]", self._remedy


@lru_cache(maxsize=8)
def _powers(count: int) -> tuple[mx.array, ...]:
    return tuple(map(mx.array, _host_powers(count)))


@lru_cache(maxsize=8)
def _host_powers(count: int) -> tuple[np.ndarray, ...]:
    """The first `count` powers of each factor, modulo ``2 ** 32``."""
    factors = (np.full(count, factor, np.uint32) for factor in _FACTORS)
    return tuple(np.multiply.accumulate(factor, dtype=np.uint32) for factor in factors)
