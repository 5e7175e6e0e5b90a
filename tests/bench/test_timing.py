"""Statistics of timed calls."""

from __future__ import annotations

from statistics import median

import numpy as np
import pytest

from ringattn.bench.timing import median_interval


@pytest.mark.parametrize("count", [1, 2, 3, 10, 1001])
def test_the_interval_holds_the_median_of_the_sample(count: int) -> None:
    values = list(np.random.default_rng(count).normal(size=count))
    low, high = median_interval(values)
    assert low <= median(values) <= high


def test_the_interval_holds_the_median_of_the_population_in_95_percent() -> None:
    random = np.random.default_rng(0)
    found = [median_interval(list(random.exponential(size=201))) for _ in range(2000)]
    held = np.mean([low <= np.log(2) <= high for low, high in found])
    assert 0.93 < held < 0.97


def test_more_values_give_a_shorter_interval() -> None:
    few, many = (median_interval(list(range(n))) for n in (100, 10_000))
    assert (few[1] - few[0]) / 100 > 5 * (many[1] - many[0]) / 10_000
