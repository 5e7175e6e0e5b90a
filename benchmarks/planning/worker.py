"""One rank: ``link`` and ``rates`` measure rates, ``runs`` and ``stages`` the configurations."""

from __future__ import annotations

import sys

import ringattn as ra  # before MLX, for its BLAS

import mlx.core as mx  # isort: skip

from ringattn.doctor.link_speed import measure_hop
from ringattn.ring.call import check_ring

from ..common import write_result
from . import rates, runs


def worker() -> None:
    """Measure on one rank."""
    mx.set_default_device(mx.cpu)
    phase = sys.argv[2]
    with ra.init() as ring:
        if phase == "link":
            result = {"bandwidth": measure_hop(check_ring(ring))}
        elif phase == "rates":
            result = rates.measure(ring)
        elif phase == "runs":
            result = {"calls": runs.time_calls(ring), "models": runs.time_models(ring, staged=False)}
        else:
            result = {"models": runs.time_models(ring, staged=True)}
        write_result(ring.rank, result)


if __name__ == "__main__":
    worker()
