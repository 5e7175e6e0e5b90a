"""An examination without any problem, which the tests of the doctor change."""

from __future__ import annotations

from dataclasses import replace

from ringattn.doctor import host_info, link_speed
from ringattn.doctor.compute_speed import ComputeSpeeds
from ringattn.doctor.diagnosis import diagnose
from ringattn.doctor.diagnosis.examination import Examination
from ringattn.doctor.records import Library, RankReport, RankReports

MAC = host_info.HostInfo(
    host="mac",
    system="macOS 26.2",
    chip="Apple M3 Ultra",
    memory=512 << 30,
    cores=32,
    threads=16,
    python="/venv/bin/python",
    python_version="3.12.1",
    ringattn="0.1.0",
    mlx="0.32.4",
    mpi4py="4.1.2",
    numpy="2.4.6",
    code="abc",
    metal=True,
    gpu="Apple M3 Ultra",
    kernel="metal",
    load=0.1,
    blas_advice=None,
    float32="full",
)
LINUX = replace(MAC, system="Debian, Linux 6", metal=False, gpu=None, kernel="host")
FAST = ComputeSpeeds(mlx=17e12, numpy=2e12, float16=17e12, bfloat16=17e12, attention=17e12, spread=1.1)
MPICH = Library("MPICH 5.0.2", "MPICH", "multiple", 3)


def healthy(size: int = 3) -> Examination:
    """Examination of Macs on Thunderbolt without any problem."""
    ranks = {
        n: RankReport(replace(MAC, host=f"mac{n}"), FAST, replace(MPICH, size=size), doing="measuring a hop", done=True)
        for n in range(size)
    }
    measured = [link_speed.LinkSpeed(pair, 300e-6, 3.1e9, 3.2e9, 3e9) for pair in link_speed.pairs(size)]
    return Examination(size, RankReports(ranks, measured, 3e9), hosts=tuple(f"mac{n}" for n in range(size)))


def about(exam: Examination, number: int, **changed: object) -> None:
    """Change the host information of rank `number`."""
    rank = exam.reports.ranks[number]
    assert rank.host is not None
    rank.host = replace(rank.host, **changed)


def found(exam: Examination) -> list[str]:
    return [str(finding) for finding in diagnose(exam)]
