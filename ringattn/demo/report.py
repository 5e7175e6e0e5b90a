"""What ``ringattn demo`` prints, and whether its check passed."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

from .document import QUESTION
from .runs import Run

_HELD = ("", "tokens held", "keys and values", "of one process's", "bytes sent")
_RATES = ("", "reads", "writes")
_ALONE = "1 process, plain mlx-lm"


def report(ring: Run, alone: Run) -> str:
    """The demo's result for people: the answer, the check, what each rank held, the rates, and where it ran."""
    first = ring.figures[0]
    return "\n".join(
        [
            "",
            f"SmolLM2-135M, float32, reads {first.prompt:,} tokens on {ring.job.ranks} ranks and answers.",
            "",
            f"Question:  {QUESTION}",
            f"Answer:    {first.text.strip()}",
            f"Check {'passed' if passed(ring, alone) else 'FAILED'}: {verdict(ring, alone)}",
            "",
            *_aligned([_HELD, *held(ring, alone)]),
            "",
            *_aligned([_RATES, *rates(ring, alone)]),
            "",
            machine(ring),
        ]
    )


def passed(ring: Run, alone: Run) -> bool:
    """Whether every rank came to the tokens of the single process."""
    return bool(alone.figures[0].tokens) and all(one.tokens == alone.figures[0].tokens for one in ring.figures)


def verdict(ring: Run, alone: Run) -> str:
    """The comparison in words."""
    expected = alone.figures[0].tokens
    for one in ring.figures:
        if one.tokens != expected:
            pairs = zip([*one.tokens, None], [*expected, None])
            at = next(i for i, (found, wanted) in enumerate(pairs) if found != wanted)
            return f"token {at} of rank {one.rank} is not that of {_ALONE}."
    return f"its {len(expected)} tokens are those of {_ALONE}."


def held(ring: Run, alone: Run) -> list[tuple[str, ...]]:
    """What each rank, and the single process, holds in the end."""
    whole = alone.figures[0]
    rows = [
        (f"rank {one.rank}", f"{one.held:,}", _bytes(one.cache), f"{one.cache / whole.cache:.2f}", _bytes(one.sent))
        for one in ring.figures
    ]
    return [*rows, (_ALONE, f"{whole.held:,}", _bytes(whole.cache), "1.00", "")]


def rates(ring: Run, alone: Run) -> list[tuple[str, ...]]:
    """Tokens per second."""
    runs = ((f"{ring.job.ranks} ranks", ring), (_ALONE, alone))
    return [
        (name, f"{run.figures[0].reading:.0f} tokens/s", f"{run.figures[0].writing:.1f} tokens/s") for name, run in runs
    ]


def machine(run: Run) -> str:
    """One line that says what this ran on, and what it therefore does not show."""
    cores = os.cpu_count()
    return (
        f"Run on {platform.system()} {platform.machine()}, {_processor()}, {cores} cores, mlx {version('mlx')}, "
        f"mlx-lm {version('mlx-lm')}. The {run.job.ranks} ranks share one host's cores, and attend by another kernel "
        "than mlx-lm: this shows that the answer is right and what each rank holds, not a speed-up by the ring."
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
