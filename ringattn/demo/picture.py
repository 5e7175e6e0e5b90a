"""Timeline of the ring: computation, transfers and waits of every rank during a few layers, late in the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..transport.base import Event
from .processes import TaskResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours of Okabe and Ito, which colour-blind people can distinguish.
_COLORS = {"compute": "#0072B2", "send": "#E69F00", "wait": "#D9D9D9"}
_LABELS = {
    "compute": "attention to what this hop brought",
    "send": "block on its way to the next rank (long: no room there yet)",
    "wait": "waiting for a block",
}
LAYERS = 2  # in the picture


def draw(ring: TaskResult, path: Path) -> None:
    """Draw some layers of one round of prefill: a row for each rank, milliseconds to the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.7 * ring.task.ranks), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    zero, end = window(ring)
    for rank in ring.ranks:
        _draw_rank(axes, rank.rank, within(rank.events, zero, end), zero, end)
    _label(axes, ring, 1e3 * (end - zero))
    figure.savefig(path)


def window(ring: TaskResult) -> tuple[float, float]:
    """Start and stop of the layers in the picture: the middle of the model, on the rank that reaches it first."""
    starts = [sorted(e.start for e in rank.events if (e.kind, e.hop) == ("compute", 0)) for rank in ring.ranks]
    first = max(0, min(map(len, starts)) // 2 - LAYERS)
    last = first + LAYERS
    stops = [layers[last] if last < len(layers) else _stop(ring) for layers in starts]
    return min(layers[first] for layers in starts), min(stops)


def _stop(ring: TaskResult) -> float:
    return max(event.stop for rank in ring.ranks for event in rank.events)


def within(events: list[Event], start: float, stop: float) -> list[Event]:
    """Parts of `events` between two times, ordered by their start."""
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
    """Lane of each event, so that events which overlap in time have different lanes. `events` are ordered by start."""
    busy_until: list[float] = []
    chosen = []
    for event in events:
        free = [lane for lane, stop in enumerate(busy_until) if stop <= event.start]
        lane = free[0] if free else len(busy_until)
        busy_until[lane : lane + 1] = [event.stop]
        chosen.append(lane)
    return chosen


def _bar(axes: Axes, event: Event, middle: float, height: float, zero: float) -> None:
    left = 1e3 * (event.start - zero)
    width = 1e3 * (event.stop - event.start)
    axes.barh(middle, width, height, left, color=_COLORS[event.kind], edgecolor="white", linewidth=0.8)


def _label(axes: Axes, ring: TaskResult, milliseconds: float) -> None:
    from matplotlib.patches import Patch

    tokens = ring.ranks[0].prompt
    ranks = ring.task.ranks
    axes.set_title(
        f"{ring.task.model_title} reads {tokens:,} tokens on {ranks} ranks: {LAYERS} layers of one round",
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
