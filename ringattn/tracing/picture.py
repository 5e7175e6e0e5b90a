"""Picture of a trace: computation, transfers and waits of every rank during two calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .chrome import name_of
from .spans import RESULTS, Event
from .tracks import Track, lanes, within

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours of Okabe and Ito, which colour-blind people can distinguish.
_COLORS = {"compute": "#0072B2", "send": "#E69F00", "wait": "#D9D9D9", "exchange": "#D9D9D9"}
_LABELS = {
    "compute": "attention to what this hop brought",
    "send": "block on its way to the next rank (long: no room there yet)",
    "wait": "waiting",
}
CALLS = 2  # in the picture


def draw(tracks: Sequence[Track], path: Path) -> None:
    """Draw two calls into the file `path`: a row for each rank, milliseconds to the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.7 * len(tracks)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    zero, end = window(tracks)
    for row, track in enumerate(tracks):
        _draw_rank(axes, row, within(track.events, zero, end), zero, end)
    _label(axes, tracks, _title(tracks, zero), 1e3 * (end - zero))
    figure.savefig(path)


def window(tracks: Sequence[Track]) -> tuple[float, float]:
    """Start and stop of the calls in the picture, on the rank that reaches them first.

    These are `CALLS` calls in the middle of the kind of calls that takes the longest, of those that send blocks if any
    do. A kind are the calls of one name, strategy and number of bytes: of a prompt that is read in several rounds, the
    layers of the longest rounds.
    """
    counted = min(tracks, key=lambda track: len(track.events))
    calls = _attending(counted.events)
    if not calls:
        events = [event for track in tracks for event in track.events]
        return min((e.start for e in events), default=0.0), max((e.stop for e in events), default=1.0)
    kinds: dict[tuple, list[int]] = defaultdict(list)
    for index, call in enumerate(calls):
        kinds[call.call, call.strategy, call.bytes].append(index)
    sending = {kind: found for kind, found in kinds.items() if calls[found[0]].bytes} or kinds
    longest = max(sending.values(), key=lambda found: sum(calls[i].stop - calls[i].start for i in found))
    first = longest[max(0, len(longest) // 2 - CALLS // 2)]
    last = min(first + CALLS, len(calls)) - 1
    shown = [_attending(track.events)[first : last + 1] for track in tracks]
    return min(own[0].start for own in shown), max(own[-1].stop for own in shown)


def _attending(events: Sequence[Event]) -> list[Event]:
    """Calls that compute, in order. All ranks make the same ones, though a rank may have no work in one."""
    names = {event.call for event in events if event.kind == "compute"}
    calls = [event for event in events if event.kind == "call" and event.call in names]
    return sorted(calls, key=lambda event: event.start)


def _title(tracks: Sequence[Track], zero: float) -> str:
    call = next((event for event in _attending(tracks[0].events) if event.stop > zero), None)
    ranks = f"{len(tracks)} rank{'s' * (len(tracks) > 1)}"
    return f"{ranks}: {CALLS} calls of {name_of(call)}" if call else f"{ranks}: the whole trace"


def _draw_rank(axes: Axes, row: int, events: list[Event], zero: float, end: float) -> None:
    sends = [event for event in events if event.kind == "send"]
    chosen = lanes(sends)
    height = min(0.12, 0.32 / max([1, *(lane + 1 for lane in chosen)]))
    for event, lane in zip(sends, chosen, strict=True):
        _bar(axes, event, row + 0.1 + height * (lane + 0.5), height, zero)
    for event in events:
        if event.kind in ("compute", "wait", "exchange"):
            _bar(axes, event, row - 0.16, 0.44, zero)
        if event.kind == "compute":
            share = (event.stop - event.start) / (end - zero)
            hop = event.hop % RESULTS
            text = f"hop {hop}" if share > 0.06 else f"{hop}" if share > 0.02 else ""
            middle = 1e3 * ((event.start + event.stop) / 2 - zero)
            axes.text(middle, row - 0.16, text, color="white", ha="center", va="center", fontsize=8.5)


def _bar(axes: Axes, event: Event, middle: float, height: float, zero: float) -> None:
    left = 1e3 * (event.start - zero)
    width = 1e3 * (event.stop - event.start)
    axes.barh(middle, width, height, left, color=_COLORS[event.kind], edgecolor="white", linewidth=0.8)


def _label(axes: Axes, tracks: Sequence[Track], title: str, milliseconds: float) -> None:
    from matplotlib.patches import Patch

    axes.set_title(title, loc="left", pad=24)
    subtitle = "Every rank attends to one block a hop, while the next is on its way; blank: other work."
    axes.text(0, 1.03, subtitle, transform=axes.transAxes, fontsize=9, color="#444444")
    axes.set_xlabel("milliseconds")
    axes.set_yticks(range(len(tracks)), [f"rank {track.rank}" for track in tracks])
    axes.invert_yaxis()
    axes.set_xlim(0, milliseconds)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    handles = [Patch(color=_COLORS[kind], label=label) for kind, label in _LABELS.items()]
    axes.figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=8.5)
