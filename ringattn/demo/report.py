"""Report of ``ringattn demo``: the answer, the comparison with a single process, and the figures."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

from ..reporting.tables import format_table
from .document import QUESTION
from .processes import TaskResult

_RATES_HEADER = ("", "reads", "writes")
_SINGLE = "1 process, plain mlx-lm"


def report(ring: TaskResult, single: TaskResult) -> str:
    """Text with the answer, the check, the memory of each rank, the rates, and the machine."""
    first = ring.ranks[0]
    return "\n".join(
        [
            "",
            f"{ring.task.model_title}, float32, reads {first.prompt:,} tokens on {ring.task.ranks_title} and answers.",
            "",
            f"Question:  {QUESTION}",
            f"Answer:    {first.text.strip()}",
            f"Check {'passed' if passed(ring, single) else 'FAILED'}: {verdict(ring, single)}",
            "",
            format_table(memory_header(first.contents), memory_rows(ring, single), align="<>", rule=True),
            "",
            format_table(_RATES_HEADER, rate_rows(ring, single), align="<>", rule=True),
            "",
            machine_note(ring),
        ]
    )


def passed(ring: TaskResult, single: TaskResult) -> bool:
    """Whether every rank has the tokens of the single process."""
    return bool(single.ranks[0].tokens) and all(rank.tokens == single.ranks[0].tokens for rank in ring.ranks)


def verdict(ring: TaskResult, single: TaskResult) -> str:
    """Sentence about the comparison."""
    expected = single.ranks[0].tokens
    for rank in ring.ranks:
        if rank.tokens != expected:
            pairs = zip([*rank.tokens, None], [*expected, None])
            index = next(i for i, (token, wanted) in enumerate(pairs) if token != wanted)
            return f"token {index} of rank {rank.rank} is not that of {_SINGLE}."
    return f"its {len(expected)} tokens are those of {_SINGLE}."


def memory_header(contents: str) -> tuple[str, ...]:
    """Header of the rows with the memory; `contents` are the kinds of arrays in a cache."""
    return ("", "tokens held", contents, "of one process's", "bytes sent")


def memory_rows(ring: TaskResult, single: TaskResult) -> list[tuple[str, ...]]:
    """Rows with the memory of each rank and of the single process in the end."""
    whole = single.ranks[0]
    rows = [
        (
            f"rank {rank.rank}",
            f"{rank.held:,}",
            _megabytes(rank.cache),
            f"{rank.cache / whole.cache:.2f}",
            _megabytes(rank.sent),
        )
        for rank in ring.ranks
    ]
    return [*rows, (_SINGLE, f"{whole.held:,}", _megabytes(whole.cache), "1.00", "")]


def rate_rows(ring: TaskResult, single: TaskResult) -> list[tuple[str, ...]]:
    """Rows with tokens per second."""
    named = ((f"{ring.task.ranks} ranks", ring.ranks[0]), (_SINGLE, single.ranks[0]))
    return [(name, f"{first.prompt_tps:.0f} tokens/s", f"{first.generation_tps:.1f} tokens/s") for name, first in named]


def machine_note(ring: TaskResult) -> str:
    """Sentences about the machine, and about what a run on it does not show."""
    cores = os.cpu_count()
    return (
        f"Run on {platform.system()} {platform.machine()}, {_processor()}, {cores} cores, mlx {version('mlx')}, "
        f"mlx-lm {version('mlx-lm')}. The {ring.task.ranks} ranks share one host's cores, and attend by another kernel "
        "than mlx-lm: this shows that the answer is right and what each rank holds, not a speed-up by the ring."
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
