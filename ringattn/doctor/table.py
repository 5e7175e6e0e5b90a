"""What an examination found, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .diagnosis import Finding, rounded
from .examination import Examination
from .records import Rank

GIB = 1 << 30


def text(seen: Examination, findings: Sequence[Finding], dtype: str) -> str:
    """Tables of hosts, versions, speeds and links, and a line for each finding."""
    parts = [_hosts(seen), _versions(seen), _speeds(seen), _links(seen), _tokens(seen, dtype)]
    parts.append("\n".join(map(str, findings)) or "nothing is wrong")
    return "\n\n".join(part for part in parts if part)


def as_json(seen: Examination, findings: Sequence[Finding], dtype: str) -> dict[str, Any]:
    """The same as one object; ``ringattn doctor --help`` says what is in it."""
    slowest, tokens = seen.slowest, seen.break_even
    return {
        "ok": not any(finding.fatal for finding in findings),
        "size": seen.size,
        "ranks": [_rank(number, rank) for number, rank in seen.told.ranks.items()],
        "links": [
            {
                "ranks": list(link.ranks),
                "latency_us": link.latency * 1e6,
                "to_right_gb_s": link.to_right / 1e9,
                "to_left_gb_s": link.to_left / 1e9,
                "both_gb_s": link.both / 1e9,
            }
            for link in seen.told.links
        ],
        "slowest_link": list(slowest.ranks) if slowest else None,
        "hop_gb_s": seen.told.hop / 1e9 if seen.told.hop else None,
        "break_even_tokens": tokens,
        "model": {**asdict(seen.model), "dtype": dtype},
        "findings": [asdict(finding) for finding in findings],
    }


def _rank(number: int, rank: Rank) -> dict[str, Any]:
    speeds = _flops(rank)
    return {
        "rank": number,
        "host": asdict(rank.facts) if rank.facts else None,
        "gflop_s": {name: flops and flops / 1e9 for name, flops in speeds.items()} or None,
        "spread": rank.speeds.spread if rank.speeds else None,
        "mpi": asdict(rank.mpi) if rank.mpi else None,
        "done": rank.done,
    }


def _flops(rank: Rank) -> dict[str, float | None]:
    """The speeds of a rank by name; empty where it has measured none."""
    return {name: value for name, value in asdict(rank.speeds).items() if name != "spread"} if rank.speeds else {}


def _hosts(seen: Examination) -> str:
    rows = {}
    for number, rank in seen.told.ranks.items():
        if facts := rank.facts:
            memory, gpu = f"{facts.memory / GIB:.0f} GiB", facts.gpu or "none"
            cores = f"{facts.cores} ({facts.threads} a rank)"
            rows[number] = [
                facts.host,
                facts.system,
                facts.chip,
                memory,
                cores,
                gpu,
                _yes(facts.metal),
                facts.float32,
                facts.kernel,
            ]
    return grid(
        ["rank", "host", "system", "chip", "memory", "cores", "GPU", "Metal", "float32", "kernel"], _grouped(rows)
    )


def _versions(seen: Examination) -> str:
    rows = {}
    for number, rank in seen.told.ranks.items():
        if facts := rank.facts:
            versions = [facts.ringattn, facts.mlx, facts.numpy, facts.mpi4py]
            mpi = [rank.mpi.version, rank.mpi.threads] if rank.mpi else ["not started", "-"]
            rows[number] = [*versions, *mpi, f"{facts.python} ({facts.python_version})"]
    return grid(["rank", "ringattn", "mlx", "numpy", "mpi4py", "MPI", "MPI threads", "Python"], _grouped(rows))


def _speeds(seen: Examination) -> str:
    rows = [
        [str(number), *("-" if flops is None else rounded(flops / 1e9) for flops in _flops(rank).values())]
        for number, rank in seen.told.ranks.items()
        if rank.speeds
    ]
    head = ["rank", "matmul float32", "NumPy's", "float16", "bfloat16", "attention"]
    return f"GFLOP/s of a rank while all compute\n{grid(head, rows)}" if rows else ""


def _links(seen: Examination) -> str:
    if not seen.told.links:
        return ""
    rows = []
    for link in seen.told.links:
        speeds = (rounded(speed / 1e9, 3) for speed in (link.to_right, link.to_left, link.both))
        mark = "slowest" if link is seen.slowest else ""
        names = " - ".join(map(seen.name, link.ranks))
        rows.append([names, f"{rounded(link.latency * 1e6)} us", *speeds, mark])
    table = grid(["link", "latency", "GB/s right", "left", "each, both at once", ""], rows)
    hop = (
        ""
        if seen.told.hop is None
        else f"\nall links at once, as in a hop: {rounded(seen.told.hop / 1e9, 3)} GB/s each"
    )
    return table + hop


def _tokens(seen: Examination, dtype: str) -> str:
    if seen.break_even is None:
        return ""
    model = seen.model
    mask = "causal" if model.causal else "no mask"
    shape = f"{model.heads}/{model.kv_heads} heads of {model.head_dim}, {dtype}, {mask}"
    return f"transfers hide behind compute from {seen.break_even:,} tokens per rank on ({shape})"


def _yes(it: bool) -> str:
    return "yes" if it else "no"


def _grouped(rows: dict[int, list[str]]) -> list[list[str]]:
    """Ranks of which the same is true share a row."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, cells in rows.items():
        groups.setdefault(tuple(cells), []).append(number)
    return [[",".join(map(str, numbers)), *cells] for cells, numbers in groups.items()]


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns with a title each; nothing where there are no rows."""
    if not rows:
        return ""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [head, *rows])
