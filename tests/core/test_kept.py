"""Tests of results that are kept for arrays that nobody can write to."""

from __future__ import annotations

import numpy as np

from ringattn.core.kept import kept


def read_only(*numbers: int) -> np.ndarray:
    x = np.array(numbers, np.int32)
    x.flags.writeable = False
    return x


def test_results_are_kept_by_the_identity_of_read_only_arrays() -> None:
    calls = []

    @kept(most=2)
    def total(x: np.ndarray, factor: int) -> int:
        calls.append(factor)
        return int(x.sum()) * factor

    a, b = read_only(1, 2), read_only(1, 3)
    assert [total(a, 1), total(a, 1), total(a, 2), total(a, 2)] == [3, 3, 6, 6] and calls == [1, 2]
    assert total(b, 1) == 4 and total(a, 1) == 3 and calls == [1, 2, 1, 1]  # the oldest has been dropped


def test_what_can_be_written_to_is_not_kept() -> None:
    @kept(most=2)
    def first(x: np.ndarray) -> int:
        return int(x[0])

    x = np.array([1], np.int32)
    assert first(x) == 1
    x[0] = 2
    assert first(x) == 2
