"""A picture of the ring at work: what every rank did during the attention of the last layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..comm.base import Event
from .job import Job
from .runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind people can tell apart.
_COLORS = {"compute": "#0072B2", "send": "#E69F00", "wait": "#D9D9D9"}
_LABELS = {
    "compute": "computing with what this hop brought",
    "send": "block on its way to the next rank (long: no room there yet)",
    "wait": "waiting for a block",
}


def draw(run: Run, path: Path) -> None:
    """Draw the timeline of `run`'s last layer: a row for each rank, milliseconds to the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timelines = [figures.timelines[-1] for figures in run.figures]
    figure = Figure(figsize=(9, 1.6 + 0.7 * len(timelines)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    zero, end = min(one.start for one in timelines), max(one.stop for one in timelines)
    for rank in range(len(timelines)):
        _draw_rank(axes, rank, run, zero, end)
    _label(axes, run, 1e3 * (end - zero))
    figure.savefig(path)


def _draw_rank(axes: Axes, rank: int, run: Run, zero: float, end: float) -> None:
    events = sorted(run.figures[rank].timelines[-1].events, key=lambda event: event.start)
    sends = [event for event in events if event.kind == "send"]
    lanes = _lanes(sends)
    height = min(0.12, 0.32 / max([1, *(lane + 1 for lane in lanes)]))
    for event, lane in zip(sends, lanes, strict=True):
        _bar(axes, event, rank + 0.1 + height * (lane + 0.5), height, zero)
    for event in events:
        if event.kind in ("compute", "wait"):
            _bar(axes, event, rank - 0.16, 0.44, zero)
        if event.kind == "compute":
            text = _name(run.job, rank, event.hop, (event.stop - event.start) / (end - zero))
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


def _name(job: Job, rank: int, hop: int, share: float) -> str:
    """What a hop's bar says, as far as a bar over `share` of the picture's width has room for it."""
    source = (rank - hop) % job.ranks
    if job.strategy == "gather":
        text = "all keys"
    elif job.strategy == "pass_q":
        text = f"hop {hop}\nqueries of rank {source}"
    else:
        text = f"hop {hop}\nkeys of rank {source}"
    room = 0.006 * max(map(len, text.splitlines())) + 0.03
    return text if share > room else f"{hop}" if share > 0.02 else ""


def _label(axes: Axes, run: Run, milliseconds: float) -> None:
    from matplotlib.patches import Patch

    job = run.job
    axes.set_title(
        f"Ring attention: layer {job.layers} of SmolLM2-135M, {job.tokens:,} tokens, {job.ranks} ranks, {job.strategy}",
        loc="left",
        pad=24,
    )
    subtitle = "Every rank keeps its own queries and attends to one block a hop, while the next block is on its way."
    if job.strategy == "pass_q":
        subtitle = "Every rank keeps its own keys; queries travel, and what they have gathered follows one hop behind."
    if job.strategy == "gather":
        subtitle = "Every rank collects all keys first, and attends to them at once."
    axes.text(0, 1.03, subtitle, transform=axes.transAxes, fontsize=9, color="#444444")
    axes.set_xlabel("milliseconds since the attention of the layer began")
    axes.set_yticks(range(job.ranks), [f"rank {rank}" for rank in range(job.ranks)])
    axes.invert_yaxis()
    axes.set_xlim(0, milliseconds)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    handles = [Patch(color=_COLORS[kind], label=label) for kind, label in _LABELS.items()]
    axes.figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=8.5)
