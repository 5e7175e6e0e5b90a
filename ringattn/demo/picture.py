"""A picture of the ring at work: what every rank did while one layer's attention went round, late in the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..transport.base import Event
from .runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind people can tell apart.
_COLORS = {"compute": "#0072B2", "send": "#E69F00", "wait": "#D9D9D9"}
_LABELS = {
    "compute": "attention to what this hop brought",
    "send": "block on its way to the next rank (long: no room there yet)",
    "wait": "waiting for a block",
}
LAYERS = 2  # that are shown


def draw(run: Run, path: Path) -> None:
    """Draw two layers of one round of prefill: a row for each rank, milliseconds to the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.7 * run.job.ranks), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    zero, end = window(run)
    for one in run.figures:
        _draw_rank(axes, one.rank, within(one.events, zero, end), zero, end)
    _label(axes, run, 1e3 * (end - zero))
    figure.savefig(path)


def window(run: Run) -> tuple[float, float]:
    """When the layers that are shown begin and end: in the middle of the model, on the rank that is there first."""
    starts = [sorted(e.start for e in one.events if (e.kind, e.hop) == ("compute", 0)) for one in run.figures]
    first = max(0, min(map(len, starts)) // 2 - LAYERS)
    lasts = [one[first + LAYERS] if first + LAYERS < len(one) else _stop(run) for one in starts]
    return min(one[first] for one in starts), min(lasts)


def _stop(run: Run) -> float:
    return max(event.stop for one in run.figures for event in one.events)


def within(events: list[Event], start: float, stop: float) -> list[Event]:
    """The parts of `events` between two times, in the order of their beginnings."""
    cut = [event._replace(start=max(event.start, start), stop=min(event.stop, stop)) for event in events]
    return sorted((event for event in cut if event.start < event.stop), key=lambda event: event.start)


def _draw_rank(axes: Axes, rank: int, events: list[Event], zero: float, end: float) -> None:
    sends = [event for event in events if event.kind == "send"]
    lanes = _lanes(sends)
    height = min(0.12, 0.32 / max([1, *(lane + 1 for lane in lanes)]))
    for event, lane in zip(sends, lanes, strict=True):
        _bar(axes, event, rank + 0.1 + height * (lane + 0.5), height, zero)
    for event in events:
        if event.kind in ("compute", "wait"):
            _bar(axes, event, rank - 0.16, 0.44, zero)
        if event.kind == "compute":
            share = (event.stop - event.start) / (end - zero)
            text = f"hop {event.hop}" if share > 0.06 else f"{event.hop}" if share > 0.02 else ""
            middle = 1e3 * ((event.start + event.stop) / 2 - zero)
            axes.text(middle, rank - 0.16, text, color="white", ha="center", va="center", fontsize=8.5)


def _lanes(events: list[Event]) -> list[int]:
    """A lane for each of `events`, in order of their start, so that those which overlap in time do not in space."""
    busy_until: list[float] = []
    chosen = []
    for event in events:
        free = [lane for lane, stop in enumerate(busy_until) if stop <= event.start]
        lane = free[0] if free else len(busy_until)
        busy_until[lane : lane + 1] = [event.stop]
        chosen.append(lane)
    return chosen


def _bar(axes: Axes, event: Event, middle: float, height: float, zero: float) -> None:
    left, width = 1e3 * (event.start - zero), 1e3 * (event.stop - event.start)
    axes.barh(middle, width, height, left, color=_COLORS[event.kind], edgecolor="white", linewidth=0.8)


def _label(axes: Axes, run: Run, milliseconds: float) -> None:
    from matplotlib.patches import Patch

    tokens, ranks = run.figures[0].prompt, run.job.ranks
    axes.set_title(
        f"SmolLM2-135M reads {tokens:,} tokens on {ranks} ranks: {LAYERS} layers of one round",
        loc="left",
        pad=24,
    )
    subtitle = "Every rank attends to one block a hop, while the next is on its way; blank: the rest of the layer."
    axes.text(0, 1.03, subtitle, transform=axes.transAxes, fontsize=9, color="#444444")
    axes.set_xlabel("milliseconds")
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.invert_yaxis()
    axes.set_xlim(0, milliseconds)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    handles = [Patch(color=_COLORS[kind], label=label) for kind, label in _LABELS.items()]
    axes.figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=8.5)
