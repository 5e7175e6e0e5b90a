"""Growth of time, memory and bytes with the length and with the ranks: fitted exponents beside the theory's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..reporting.tables import format_table
from .records import Record

ENOUGH = 4  # points for a fit with a constant
POWERS = np.arange(-400, 401) / 100  # that a fit with a constant tries

Measure = Callable[[Record], float]


@dataclass(frozen=True)
class Fit:
    """Exponent of a power law.

    Attributes:
        what: Description of the quantity and of what it grows with.
        exponent: Fitted exponent; NaN with fewer than two points.
        theory: Expected exponent.
        points: Number of fitted lengths or numbers of ranks; of two, the ratio is all there is.
    """

    what: str
    exponent: float
    theory: float
    points: int


def exponent(points: Iterable[tuple[float, float]]) -> float:
    """Exponent p of the growth of y with x; NaN with fewer than two values of x.

    From `ENOUGH` points on, p is that of ``y = c + a * x ** p`` with the least relative squares: the constant c is what
    any call costs. With fewer points it is that of ``y = a * x ** p``.
    """
    points = [(x, y) for x, y in points if y > 0]
    if len({x for x, _ in points}) < ENOUGH:
        return _without_constant(points)
    x, y = np.array(points, np.float64).T
    residuals = [_residual(x / x.max(), y, power) for power in POWERS]
    return float(POWERS[int(np.argmin(residuals))])


def _residual(x: np.ndarray, y: np.ndarray, power: float) -> float:
    """Sum of squared relative differences from the best ``c + a * x ** power`` with c of at least 0."""
    grown = x**power / y
    both = np.stack([1 / y, grown], 1)
    found, *_ = np.linalg.lstsq(both, np.ones(len(y)), rcond=None)
    if found[0] < 0:
        both, found = grown[:, None], np.array([grown.sum() / (grown**2).sum()])
    return float(((both @ found - 1) ** 2).sum())


def _without_constant(points: Sequence[tuple[float, float]]) -> float:
    logs = [(math.log(x), math.log(y)) for x, y in points]
    if len({x for x, _ in logs}) < 2:
        return math.nan
    mean_x = sum(x for x, _ in logs) / len(logs)
    mean_y = sum(y for _, y in logs) / len(logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def fits(records: Sequence[Record], cores: int) -> list[Fit]:
    """Fit what `records` of ``bench ring`` show: lengths on the fewest and most ranks, ranks at the greatest length.

    Args:
        records: One record for each length and number of ranks.
        cores: Cores of the machine. Ranks with one thread each are faster only up to this number.
    """
    good = [record for record in records if record.seconds]
    ranks = sorted({int(record.case["ranks"]) for record in good})
    if not ranks:
        return []
    found = []
    for count in sorted({ranks[0], ranks[-1]}):
        own = sorted((r for r in good if r.case["ranks"] == count), key=lambda r: r.case["tokens"])
        on = f"against tokens, {count} rank{'s' * (count > 1)}"
        found.append(_fit(f"time {on}", own, "tokens", lambda r: r.median, 2.0))
        found.append(_fit(f"memory of a rank {on}", own, "tokens", lambda r: r.figures["peak_bytes"], 1.0))
        if count > 1:
            found.append(_fit(f"bytes sent {on}", own, "tokens", lambda r: r.figures["sent_bytes"], 1.0))
    longest = max(int(record.case["tokens"]) for record in good)
    own = [record for record in good if record.case["tokens"] == longest]
    few = [r for r in own if int(r.case["ranks"]) <= cores]
    many = [r for r in own if int(r.case["ranks"]) >= cores]
    at = f"against ranks, {longest:,} tokens"
    found.append(_fit(f"time {at}, up to {cores} cores", few, "ranks", lambda r: r.median, -1.0))
    found.append(_fit(f"time {at}, that share {cores} cores", many, "ranks", lambda r: r.median, 0.0))
    rings = [r for r in own if int(r.case["ranks"]) > 1]  # one rank has no travelling blocks
    found.append(_fit(f"memory of a rank {at}", rings, "ranks", lambda r: r.figures["peak_bytes"], -1.0))
    return [fit for fit in found if fit.points > 1]


def _fit(what: str, records: Sequence[Record], key: str, measure: Measure, theory: float) -> Fit:
    points = [(float(record.case[key]), measure(record)) for record in records]
    return Fit(what, exponent(points), theory, len({x for x, _ in points}))


def format_fits(found: Sequence[Fit]) -> str:
    """Table of fitted exponents."""
    rows = [
        [
            fit.what,
            f"{fit.exponent:.2f}",
            f"{fit.theory:g}",
            str(fit.points) if fit.points > 2 else "2: a ratio, no fit",
        ]
        for fit in found
    ]
    return format_table(["growth", "exponent", "theory", "points"], rows, align="<>")
