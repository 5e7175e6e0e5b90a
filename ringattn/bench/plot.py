"""Picture of a benchmark: the time of each case, over the parameter that varies most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .comparison import varying
from .records import FIGURES, Record

# Colours of Okabe and Ito, which colour-blind people can distinguish.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")


def draw(records: Sequence[Record], path: Path, others: Sequence[str] = ()) -> None:
    """Draw medians with their quartiles into `path`, in the format that its name asks for.

    Over the number (tokens, ranks, ...) with the most values, as lines on logarithmic axes; as bars if none varies.

    Args:
        records: Records of one benchmark.
        path: File to write.
        others: Names of figures that are drawn beside the times.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    good = [record for record in records if record.seconds]
    axis = x_axis(good)
    figure = Figure(figsize=(9, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 1 + len(others), squeeze=False)[0]
    for panel, name in zip(panels, ("", *others)):
        unit = _unit(name)
        if axis is None:
            panel.barh(
                [label(one, varying(good)) for one in good], [_value(one, name) for one in good], color=COLORS[0]
            )
            panel.invert_yaxis()
            panel.set_xlabel(unit)
        else:
            _draw_lines(panel, good, axis, name)
            panel.set_ylabel(unit)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_title(f"ringattn bench {records[0].bench}" if records else "no case", loc="left")
    figure.savefig(path)


def _draw_lines(panel: Any, records: Sequence[Record], axis: str, name: str) -> None:
    """Lines of a figure over `axis`, one for each combination of the other parameters."""
    for (line, own), color in zip(lines(records, axis).items(), COLORS * len(records)):
        points = sorted(own, key=lambda record: record.case[axis])
        error = None if name else [1e3 * record.spread / 2 for record in points]
        x, y = [record.case[axis] for record in points], [_value(record, name) for record in points]
        panel.errorbar(x, y, error, marker="o", color=color, label=line)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel(axis)
    panel.grid(alpha=0.3)
    if any(lines(records, axis)):
        panel.legend(frameon=False, fontsize=8.5)


def _value(record: Record, name: str) -> float:
    """A figure in its unit; the time in milliseconds if `name` is empty."""
    return FIGURES[name].factor * record.figures[name] if name else 1e3 * record.median


def _unit(name: str) -> str:
    return FIGURES[name].title if name else "milliseconds"


def x_axis(records: Sequence[Record]) -> str | None:
    """Number with the most values, the first one of several; ``None`` if no number varies."""
    counts = {
        key: len({record.case[key] for record in records})
        for key in varying(records)
        if all(isinstance(record.case.get(key), int | float) for record in records)
    }
    return max(counts, key=lambda key: counts[key]) if counts else None


def lines(records: Sequence[Record], axis: str) -> dict[str, list[Record]]:
    """Records by the parameters that vary besides `axis`."""
    keys = [key for key in varying(records) if key != axis]
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[label(record, keys)].append(record)
    return found


def label(record: Record, keys: Sequence[str]) -> str:
    """Values of some parameters of a record."""
    named = ((key, record.case.get(key, "")) for key in keys)
    return ", ".join(f"{key} {value}" if isinstance(value, int | float) else str(value) for key, value in named)
