"""Machines and links from the doctor's measurements."""

from __future__ import annotations

from dataclasses import replace

import pytest
from doctor_cases import FAST, healthy
from hypothesis import given
from hypothesis import strategies as st

from ringattn.doctor.diagnosis.examination import Examination
from ringattn.planning import Cluster, Job, best, predictions
from ringattn.planning.measured import LEAST_SPREAD, level, measured_cluster
from ringattn.planning.shape import attention_shape

RATES = st.lists(st.floats(1.0, 1e15), min_size=1, max_size=8)


def measured(*speeds: float, spread: float) -> Cluster:
    """Cluster of machines so many times as fast as others."""
    exam: Examination = healthy(len(speeds))
    for rank, speed in enumerate(speeds):
        rates = {name: speed * getattr(FAST, name) for name in ("mlx", "float16", "attention")}
        exam.reports.ranks[rank].speeds = replace(FAST, spread=spread, read=speed * 1e11, **rates)
    return measured_cluster(exam, "float16")


def weights(cluster: Cluster) -> tuple[float, ...]:
    chosen = best(predictions(attention_shape(32, 8, 128, 2), cluster, Job(1 << 17)), 1)
    assert chosen is not None
    return chosen.weights


def test_noise_makes_no_weights() -> None:
    cluster = measured(1.0, 0.97, 1.08, spread=1.15)
    assert weights(cluster) == (1.0, 1.0, 1.0)
    assert "rates within 15%, the spread of the measurements, count as equal" in cluster.machines[0].source


def test_machines_that_differ_by_more_than_the_noise_have_weights() -> None:
    cluster = measured(1.0, 2.1, 1.02, 2.0, spread=1.1)
    small, large, *others = weights(cluster)
    assert others == [small, large] and large > 1.5 * small


def test_one_machine_is_not_compared() -> None:
    assert "equal" not in measured(1.0, spread=1.3).machines[0].source


@given(RATES, st.floats(LEAST_SPREAD, 2.0))
def test_levels_stay_within_the_spread(values: list[float], spread: float) -> None:
    found = level(values, spread)
    assert sum(found) == pytest.approx(sum(values))
    for value, mean in zip(values, found):
        assert mean / spread * (1 - 1e-9) <= value <= mean * spread * (1 + 1e-9)
    apart = sorted(set(found))
    assert all(a < b for a, b in zip(apart, apart[1:]))


def test_levels_of_two_kinds_of_machines() -> None:
    assert level([10.0, 1.0, 10.4, 1.02], 1.05) == pytest.approx([10.2, 1.01, 10.2, 1.01])
    assert level([1.0, 1.04, 1.08], 1.05) == pytest.approx([1.02, 1.02, 1.08])  # not by way of a third
