"""Result of an examination as text for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..reporting.tables import format_number, format_table
from .diagnosis.examination import Examination, Finding
from .records import RankReport

GIB = 1 << 30


def as_text(exam: Examination, findings: Sequence[Finding], dtype: str) -> str:
    """Tables of hosts, versions, speeds and links, and a line for each finding."""
    parts = [_hosts(exam), _versions(exam), _speeds(exam), _links(exam), _rows(exam), _break_even(exam, dtype)]
    parts.append("\n".join(map(str, findings)) or "nothing is wrong")
    return "\n\n".join(part for part in parts if part)


def as_json(exam: Examination, findings: Sequence[Finding], dtype: str) -> dict[str, Any]:
    """Object that ``ringattn doctor --help`` describes."""
    slowest = exam.slowest_link
    return {
        "ok": not any(finding.fatal for finding in findings),
        "size": exam.size,
        "ranks": [_rank(number, rank) for number, rank in exam.reports.ranks.items()],
        "links": [
            {
                "ranks": list(link.ranks),
                "latency_us": link.latency * 1e6,
                "to_right_gb_s": link.to_right / 1e9,
                "to_left_gb_s": link.to_left / 1e9,
                "both_gb_s": link.both / 1e9,
            }
            for link in exam.reports.links
        ],
        "rows": [
            {"ranks": list(row.ranks), "latency_us": row.latency * 1e6, "gb_s": row.bandwidth / 1e9}
            for row in exam.reports.rows
        ],
        "slowest_link": list(slowest.ranks) if slowest else None,
        "hop_gb_s": exam.reports.hop / 1e9 if exam.reports.hop else None,
        "break_even_tokens": exam.break_even,
        "model": {**asdict(exam.model), "dtype": dtype},
        "findings": [asdict(finding) for finding in findings],
    }


def _rank(number: int, rank: RankReport) -> dict[str, Any]:
    speeds = _flops(rank)
    return {
        "rank": number,
        "host": asdict(rank.host) if rank.host else None,
        "gflop_s": {name: flops and flops / 1e9 for name, flops in speeds.items()} or None,
        "spread": rank.speeds.spread if rank.speeds else None,
        "memory_gb_s": rank.speeds.read / 1e9 if rank.speeds else None,
        "mpi": asdict(rank.mpi) if rank.mpi else None,
        "done": rank.done,
    }


def _flops(rank: RankReport) -> dict[str, float | None]:
    """Speeds of a rank by name; empty without measurements."""
    others = ("spread", "read")
    return {name: value for name, value in asdict(rank.speeds).items() if name not in others} if rank.speeds else {}


def _hosts(exam: Examination) -> str:
    rows = {}
    for number, rank in exam.reports.ranks.items():
        if host := rank.host:
            rows[number] = [
                host.host,
                host.system,
                host.chip,
                f"{host.memory / GIB:.0f} GiB",
                f"{host.cores} ({host.threads} a rank)",
                host.gpu or "none",
                "yes" if host.metal else "no",
                host.float32,
                host.kernel,
            ]
    header = ["rank", "host", "system", "chip", "memory", "cores", "GPU", "Metal", "float32", "kernel"]
    return format_table(header, _grouped(rows))


def _versions(exam: Examination) -> str:
    rows = {}
    for number, rank in exam.reports.ranks.items():
        if host := rank.host:
            versions = [host.ringattn, host.mlx, host.numpy, host.mpi4py]
            mpi = [rank.mpi.version, rank.mpi.threads] if rank.mpi else ["not started", "-"]
            rows[number] = [*versions, *mpi, f"{host.python} ({host.python_version})"]
    header = ["rank", "ringattn", "mlx", "numpy", "mpi4py", "MPI", "MPI threads", "Python"]
    return format_table(header, _grouped(rows))


def _speeds(exam: Examination) -> str:
    rows = [
        [str(number), *("-" if flops is None else format_number(flops / 1e9) for flops in _flops(rank).values())]
        for number, rank in exam.reports.ranks.items()
        if rank.speeds
    ]
    header = ["rank", "matmul float32", "NumPy's", "float16", "bfloat16", "attention"]
    return f"GFLOP/s of a rank while all compute\n{format_table(header, rows)}" if rows else ""


def _links(exam: Examination) -> str:
    if not exam.reports.links:
        return ""
    rows = []
    for link in exam.reports.links:
        speeds = (format_number(speed / 1e9, 3) for speed in (link.to_right, link.to_left, link.both))
        mark = "slowest" if link is exam.slowest_link else ""
        names = " - ".join(map(exam.label, link.ranks))
        rows.append([names, f"{format_number(link.latency * 1e6)} us", *speeds, mark])
    table = format_table(["link", "latency", "GB/s right", "left", "each, both at once", ""], rows)
    if exam.reports.hop is None:
        return table
    return f"{table}\nall links at once, as in a hop: {format_number(exam.reports.hop / 1e9, 3)} GB/s each"


def _rows(exam: Examination) -> str:
    rows = [
        [exam.label(*row.ranks), f"{format_number(row.latency * 1e6)} us", format_number(row.bandwidth / 1e9, 3)]
        for row in exam.reports.rows
    ]
    header = ["row", "sum for a token", "GB/s each"]
    return f"sums over mx.distributed, all rows at once\n{format_table(header, rows)}" if rows else ""


def _break_even(exam: Examination, dtype: str) -> str:
    if exam.break_even is None:
        return ""
    model = exam.model
    mask = "causal" if model.causal else "no mask"
    shape = f"{model.heads}/{model.kv_heads} heads of {model.head_dim}, {dtype}, {mask}"
    return f"transfers hide behind compute from {exam.break_even:,} tokens per rank on ({shape})"


def _grouped(rows: dict[int, list[str]]) -> list[list[str]]:
    """Rows by rank, equal ones joined into one."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, cells in rows.items():
        groups.setdefault(tuple(cells), []).append(number)
    return [[",".join(map(str, numbers)), *cells] for cells, numbers in groups.items()]
