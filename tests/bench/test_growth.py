"""Fits of power laws."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn.bench.growth import exponent, fits, format_fits
from ringattn.bench.records import Record
from ringattn.cli.bench_growth import counts


@given(st.floats(-3, 3), st.floats(0.1, 100), st.lists(st.integers(1, 10**6), min_size=2, max_size=9, unique=True))
def test_the_exponent_of_a_power_law_is_found(power: float, factor: float, xs: list[int]) -> None:
    assert exponent([(x, factor * x**power) for x in xs[:3]]) == pytest.approx(power, abs=1e-6)


@pytest.mark.parametrize("power", [-1.0, 0.5, 1.0, 2.0])
def test_a_constant_part_is_told_apart(power: float) -> None:
    assert exponent([(x, 7.0 + 3.0 * x**power) for x in (1, 2, 4, 8, 16)]) == pytest.approx(power, abs=0.011)


@pytest.mark.parametrize("points", [[], [(1, 1)], [(2, 1), (2, 3)], [(1, 0), (2, 1)]])
def test_one_point_has_no_exponent(points: list[tuple[float, float]]) -> None:
    assert math.isnan(exponent(points))


def made_up(cores: int) -> list[Record]:
    """Records of a machine that behaves as the theory says, with 1 ms for each call."""
    return [
        Record(
            "ring",
            {"ranks": ranks, "tokens": tokens},
            [1e-9 * tokens**2 / min(ranks, cores)],
            {"peak_bytes": 512 * tokens / ranks, "sent_bytes": 512 * tokens * (ranks - 1)},
        )
        for ranks in (1, 2, 4)
        for tokens in (1024, 2048, 4096)
    ]


def test_fits_of_a_machine_that_follows_the_theory() -> None:
    found = fits(made_up(2), 2)
    assert len(found) == 8
    assert [fit.exponent for fit in found] == pytest.approx([fit.theory for fit in found], abs=1e-6)
    marked = {line.split("  ")[0]: "a ratio, no fit" in line for line in format_fits(found).splitlines()[1:]}
    assert marked == {fit.what: "against ranks" in fit.what for fit in found}


def test_a_length_that_was_measured_twice_is_one_point() -> None:
    twice = [record for record in made_up(2) if record.case["tokens"] == 1024 and record.case["ranks"] == 1] * 2
    assert fits(twice, 2) == []


def test_failed_cases_are_not_fitted() -> None:
    assert fits([Record("ring", {"ranks": 1, "tokens": 8}, problem="x")], 2) == []


@pytest.mark.parametrize(("most", "expected"), [(1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_numbers_of_ranks(most: int, expected: list[int]) -> None:
    assert counts(most) == expected
