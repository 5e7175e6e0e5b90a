"""Picture of the results: the lead over each rival, and the time to the first token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from .results import JobRow, OperatorRow, load
from .tables import OURS, fastest, groups

# Colours of Okabe and Ito, which colour-blind people can distinguish.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999")


def draw(folder: Path, file: Path) -> None:
    """Draw both parts, as far as there are results, into `file`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = {"operator": _operator, "job": _job}
    found = [name for name in parts if (folder / f"{name}.json").exists()]
    figure = Figure(figsize=(6.5 * len(found), 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for name, axes in zip(found, figure.subplots(1, len(found), squeeze=False)[0]):
        parts[name](axes, load(folder / f"{name}.json")["rows"])
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def ratios(rows: Sequence[OperatorRow], link: str, gradient: bool) -> dict[str, list[float]]:
    """Times of each rival in units of ringattn's, over all problems."""
    found: dict[str, list[float]] = {}
    for own in groups(rows, link, gradient).values():
        best = fastest(own)
        for name, row in best.items():
            if OURS in best and not name.startswith(OURS):
                found.setdefault(name, []).append(median(row.seconds) / median(best[OURS].seconds))
    return found


def _operator(axes, rows: Sequence[OperatorRow]) -> None:
    kinds = [(link, gradient) for link in dict.fromkeys(row.link for row in rows) for gradient in (False, True)]
    names = list(dict.fromkeys(row.rival for row in rows if not row.rival.startswith(OURS)))
    height = 0.8 / len(kinds)
    for i, (kind, color) in enumerate(zip(kinds, COLORS)):
        found = ratios(rows, *kind)
        places = [n + i * height for n, name in enumerate(names) if name in found]
        middles = [median(found[name]) for name in names if name in found]
        label = f"{kind[0]}, {'with the gradient' if kind[1] else 'forward'}"
        if places:
            axes.barh(places, [middle - 1 for middle in middles], height, left=1, color=color, label=label)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    _plain(axes.xaxis)
    axes.set_yticks([n + 0.4 - height / 2 for n in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlabel("time in units of ringattn's (median of all problems)")
    axes.set_title("Attention over 2 ranks", loc="left")
    axes.legend(frameon=False, fontsize=8.5)


def _job(axes, rows: Sequence[JobRow]) -> None:
    first = rows[0].model
    rate = rows[0].rate
    lines: dict[str, list[JobRow]] = {}
    for row in rows:
        if row.model == first and row.first and row.rate == rate:
            name = row.way if row.way == OURS else f"{row.way} ({row.attention}'s attention)"
            lines.setdefault(name, []).append(row)
    for (name, own), color in zip(lines.items(), COLORS):
        width = 2.5 if name == OURS else 1.2
        own.sort(key=lambda row: row.prompt)
        times = [median(row.first) for row in own]
        axes.plot([row.prompt for row in own], times, "o-", color=color, label=name, lw=width)
    prompts = sorted({row.prompt for own in lines.values() for row in own})
    axes.set_xscale("log", base=2)
    axes.set_xticks(prompts, [f"{prompt / 1024:g}K" for prompt in prompts])
    axes.set_yscale("log")
    _plain(axes.yaxis)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("seconds to the first token")
    axes.set_title(f"A language model on 2 hosts, {rate}", loc="left")
    axes.legend(frameon=False, fontsize=8.5)


def _plain(axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, without exponents."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
