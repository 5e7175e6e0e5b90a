"""Machines and link of a cluster that the doctor has measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from ..doctor.diagnosis.examination import Examination
from ..doctor.records import RankReport
from ..errors import ArgumentError
from .choice import Cluster
from .links import Link
from .machines import Machine

SOURCE = "measured by the doctor"
LEAST_SPREAD = 1.05  # ratio by which two measurements of one machine differ, even if nothing else runs


def measured_cluster(exam: Examination, dtype: str) -> Cluster:
    """The cluster of an examination whose ranks computed with `dtype`.

    Rates that differ by no more than the spread of the measurements count as equal: unequal weights would divide the
    work by noise.

    Raises:
        ArgumentError: A rank or the links were not measured.
    """
    ranks = exam.reports.ranks
    missing = [rank for rank in range(exam.size) if rank not in ranks or not ranks[rank].speeds or not ranks[rank].host]
    if missing or not exam.size:
        raise ArgumentError(f"--measure: no rates of {_names(missing)}: run ringattn doctor with the same hosts")
    if exam.size > 1 and not exam.reports.hop:
        raise ArgumentError("--measure: the links were not measured: run ringattn doctor with the same hosts")
    on_host = Counter(one.host.host for one in ranks.values() if one.host)
    machines = _levelled([_machine(ranks[rank], on_host, dtype) for rank in range(exam.size)], _spread(exam))
    latency = max((link.latency for link in exam.reports.links), default=0.0)
    row = max(exam.reports.rows, key=lambda one: one.latency, default=None)
    return Cluster(
        tuple(machines),
        Link("measured", exam.reports.hop or 1.0, latency, source=SOURCE),
        row=None if row is None else Link("measured", row.bandwidth, row.latency / 2, source=SOURCE),
    )


def has_gpu(exam: Examination) -> bool:
    """Whether every rank computes on a GPU."""
    return all(rank.host is not None and rank.host.gpu is not None for rank in exam.reports.ranks.values())


def _names(ranks: list[int]) -> str:
    return f"rank {', '.join(map(str, ranks))}" if ranks else "any rank"


def _machine(rank: RankReport, on_host: Counter[str], dtype: str) -> Machine:
    host, speeds = rank.host, rank.speeds
    assert host is not None and speeds is not None
    half = {"float16": speeds.float16, "bfloat16": speeds.bfloat16}.get(dtype)
    memory = (host.usable or host.memory) / on_host[host.host]
    return Machine(host.host, half or speeds.mlx, speeds.attention, speeds.read, memory, source=SOURCE)


def _spread(exam: Examination) -> float:
    """Ratio by which equal measurements of a rank differ."""
    return max(LEAST_SPREAD, *(rank.speeds.spread for rank in exam.reports.ranks.values() if rank.speeds))


def _levelled(machines: list[Machine], spread: float) -> list[Machine]:
    """Machines whose rates are the means of groups within `spread`, which their source says."""
    if len(machines) == 1:
        return machines
    flops = level([machine.flops for machine in machines], spread)
    attention = level([machine.attention for machine in machines], spread)
    bandwidth = level([machine.bandwidth for machine in machines], spread)
    source = f"{SOURCE}; rates within {spread - 1:.0%}, the spread of the measurements, count as equal"
    return [
        replace(machine, flops=f, attention=a, bandwidth=b, source=source)
        for machine, f, a, b in zip(machines, flops, attention, bandwidth)
    ]


def level(values: Sequence[float], spread: float) -> list[float]:
    """Replace values by the mean of their group; the greatest of a group is at most `spread` times its smallest."""
    groups: list[list[int]] = []
    for i in sorted(range(len(values)), key=lambda i: values[i]):
        if groups and values[i] <= spread * values[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    means = {i: fmean(values[j] for j in group) for group in groups for i in group}
    return [means[i] for i in range(len(values))]
