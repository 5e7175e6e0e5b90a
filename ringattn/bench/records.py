"""Results of benchmarks: one record for each case, and the file that keeps them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from ..errors import ArgumentError
from ..reporting.tables import format_number

Value = str | int | float
FORMAT = 1  # of the file


@dataclass(frozen=True)
class Figure:
    """A figure of a record for people: its title, the factor to its unit, and the decimals."""

    title: str
    factor: float = 1.0
    decimals: int = 2

    def show(self, value: float) -> str:
        """Text of `value`; a dash if it is not known."""
        shown = value * self.factor
        return "-" if math.isnan(shown) else format_number(shown, self.decimals) if shown > 0 else f"{shown:g}"


FIGURES = {
    "mlx_s": Figure("mlx ms", 1e3, 3),
    "mlx_ratio": Figure("mlx / ours"),
    "tflops": Figure("TFLOP/s", decimals=3),
    "compute_s": Figure("compute ms", 1e3, 1),
    "efficiency": Figure("of pure compute"),
    "transfer_s": Figure("transfers ms", 1e3, 1),
    "overlap": Figure("hidden"),
    "sent_bytes": Figure("sent MB", 1e-6, 2),
    "sent_ratio": Figure("of minimum"),
    "peak_bytes": Figure("peak MB", 1e-6, 1),
    "gb_s": Figure("GB/s"),
    "token_s": Figure("token ms", 1e3, 1),
    "prompt_tokens_s": Figure("read tokens/s", decimals=0),
    "error": Figure("error"),
}


@dataclass(frozen=True)
class Record:
    """Measurement of one case.

    Attributes:
        bench: Name of the benchmark.
        case: Parameters of the case. Two records of equal bench and case can be compared.
        seconds: Samples; empty if the case failed.
        figures: Other results, by the names in `FIGURES`. Times in seconds, sizes in bytes.
        problem: Why the case failed; empty if its answer was right.
    """

    bench: str
    case: Mapping[str, Value]
    seconds: Sequence[float] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""

    @property
    def median(self) -> float:
        """Median of the samples in seconds; NaN without samples."""
        return median(self.seconds) if self.seconds else math.nan

    @property
    def spread(self) -> float:
        """Distance between the first and the third quartile of the samples, in seconds."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = quantiles(self.seconds, method="inclusive")
        return third - first

    @property
    def key(self) -> tuple[str, str]:
        """Bench and case, for comparisons."""
        return self.bench, json.dumps(self.case, sort_keys=True)


def save(path: Path, records: Sequence[Record], about: Mapping[str, Any]) -> None:
    """Write records, and the facts in `about`, as JSON."""
    content = {"format": FORMAT, **about, "records": [asdict(record) for record in records]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def load(path: Path) -> list[Record]:
    """Read the records that `save` wrote.

    Raises:
        ArgumentError: The file cannot be read, or has another form.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] == FORMAT:
            return [Record(**record) for record in content["records"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it has another form"
        raise ArgumentError(f"{path}: {why}, expected a file that ringattn bench --json wrote") from None
    raise ArgumentError(f"{path}: format {content['format']}, expected {FORMAT}")
