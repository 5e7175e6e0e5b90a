"""Picture of a benchmark: the time of each case, over the parameter that varies most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from .comparison import varying
from .records import Record

# Colours of Okabe and Ito, which colour-blind people can distinguish.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw medians with their quartiles into `path`, in the format that its name asks for.

    Over the number (tokens, ranks, ...) with the most values, as lines on logarithmic axes; as bars if none varies.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    good = [record for record in records if record.seconds]
    axis = x_axis(good)
    if axis is None:
        labels = [label(record, varying(good)) for record in good]
        axes.barh(labels, [1e3 * record.median for record in good], color=COLORS[0])
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds")
    else:
        for (name, own), color in zip(lines(good, axis).items(), COLORS * len(good)):
            points = sorted(own, key=lambda record: record.case[axis])
            y = [1e3 * record.median for record in points]
            error = [1e3 * record.spread / 2 for record in points]
            axes.errorbar([record.case[axis] for record in points], y, error, marker="o", color=color, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(axis)
        axes.set_ylabel("milliseconds")
        axes.grid(alpha=0.3)
        if any(lines(good, axis)):
            axes.legend(frameon=False, fontsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"ringattn bench {records[0].bench}" if records else "no case", loc="left")
    figure.savefig(path)


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
