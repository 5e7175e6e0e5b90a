"""Draw the pictures of the documentation: ``python docs/pictures/draw.py`` writes them beside this file.

Nothing in them is measured: the memory is a formula, the schedules are those of `ringattn.ring.schedule`.
"""

from __future__ import annotations

from math import cos, pi, sin
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

import ringattn as ra
from ringattn.core.masks import Band
from ringattn.ring.schedule import plan

HERE = Path(__file__).parent
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52")
GREY = "#666666"
RANKS = 4

matplotlib.use("Agg")
plt.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11, "svg.hashsalt": "ringattn"})


def blank(ax: Axes, width: float, height: float) -> None:
    ax.set_xlim(0, width)
    ax.set_ylim(0, height)
    ax.set_aspect("equal")
    ax.axis("off")


def box(ax: Axes, x: float, y: float, width: float, height: float, text: str, colour: str, size: float = 10) -> None:
    """A coloured box with a text in its middle."""
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=colour, ec="none")
    ax.add_patch(shape)
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="white", fontsize=size)


def arrow(
    ax: Axes, start: tuple[float, float], stop: tuple[float, float], bend: float = 0.0, colour: str = GREY
) -> None:
    style = f"arc3,rad={bend}"
    ax.add_patch(FancyArrowPatch(start, stop, connectionstyle=style, arrowstyle="-|>", mutation_scale=14, color=colour))


def draw_ring(ax: Axes) -> None:
    """Four machines, what each holds, and what travels."""
    blank(ax, 10, 8)
    places = [(5 + 3.4 * sin(2 * pi * r / RANKS), 4 + 2.7 * cos(2 * pi * r / RANKS)) for r in range(RANKS)]
    for r, (x, y) in enumerate(places):
        ax.text(x, y + 0.75, f"Mac {r}", ha="center", fontsize=10, color=GREY)
        box(ax, x - 1.3, y - 0.55, 0.75, 1.1, f"Q{r}", COLOURS[r])
        box(ax, x - 0.45, y - 0.55, 1.75, 1.1, f"K{r}  V{r}", COLOURS[r])
    corners = ((1.45, -0.7, 0.2, 1.4), (-0.3, -0.9, 1.5, -0.2), (-1.45, 0.7, -0.2, -1.2), (0.3, 1.2, -1.5, 0.2))
    for r, (x, y) in enumerate(places):
        to = places[(r + 1) % RANKS]
        dx, dy, ex, ey = corners[r]
        arrow(ax, (x + dx, y + dy), (to[0] + ex, to[1] + ey), -0.25, COLOURS[r])
    ax.text(5, 4.5, "queries stay,\nkeys and values travel", ha="center", va="center", fontsize=10)
    ax.text(
        5,
        3.3,
        "each hop: attend to\nthe block that is here,\npass it on",
        ha="center",
        va="center",
        fontsize=9,
        color=GREY,
    )


def draw_memory(ax: Axes) -> None:
    """Bytes of keys and values for each machine, by formula."""
    tokens = [32, 64, 128, 256, 512]  # thousands
    per_token = 2 * 32 * 8 * 128 * 2  # k and v, 32 layers, 8 heads of 128, two bytes
    for ranks, colour in zip((1, 2, 4, 8), COLOURS):
        gigabytes = [1024 * n * per_token / ranks / 1e9 for n in tokens]
        ax.plot(tokens, gigabytes, "o-", color=colour)
        ax.text(tokens[-1] * 1.07, gigabytes[-1], f"{ranks} Mac{'s' if ranks > 1 else ''}", va="center", color=colour)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(tokens, [f"{n}K" for n in tokens])
    ax.set_yticks([1, 4, 16, 64], ["1", "4", "16", "64"])
    ax.set_xlim(28, 900)
    ax.set_xlabel("tokens of context")
    ax.set_title("GB of keys and values on each Mac\n(32 layers, 8 heads of 128, 16 bits; by formula)", fontsize=10.5)
    ax.grid(alpha=0.3)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def picture_overview() -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(1.25, 1))
    draw_ring(left)
    draw_memory(right)
    return figure


def picture_ring() -> Figure:
    figure, ax = plt.subplots(figsize=(6.4, 5))
    draw_ring(ax)
    return figure


def work_of(layout: ra.Layout) -> list[list[int]]:
    """For each rank, how many (query, key) pairs it computes at each hop of a causal call."""
    band = Band.of(True, None)
    found = []
    for rank in range(layout.size):
        own = layout.positions(rank)
        hops = plan(layout, layout, band, "pass_kv", rank).hops
        keys = [[j for start, stop in hop.compute for j in range(start, stop)] for hop in hops]
        found.append([sum(int(j <= i) for i in own for j in some) for some in keys])
    return found


def picture_zigzag() -> Figure:
    """Who holds what, and how much causal work that is at each hop."""
    n = 8 * RANKS
    layouts = {
        "contiguous": ra.Layout.contiguous(n, RANKS),
        "zigzag": ra.Layout.zigzag(n, RANKS),
        "cyclic": ra.Layout.cyclic(n, RANKS, n // 16),
    }
    figure, axes = plt.subplots(2, 3, figsize=(11, 4.6), height_ratios=(1, 2.2))
    for (name, layout), above, below in zip(layouts.items(), *axes):
        blank(above, n, 6)
        above.set_aspect("auto")
        above.set_title(name)
        for rank in range(RANKS):
            for start, stop in layout.spans[rank]:
                above.add_patch(Rectangle((start, 1.5), stop - start, 3, fc=COLOURS[rank], ec="white"))
        above.text(0, 0, "position 0", fontsize=8.5, color=GREY)
        above.text(n, 0, f"{n - 1}", fontsize=8.5, color=GREY, ha="right")
        work = work_of(layout)
        for rank in range(RANKS):
            hops = range(len(work[rank]))
            below.bar([h + 0.2 * rank - 0.3 for h in hops], work[rank], 0.18, color=COLOURS[rank], label=f"rank {rank}")
        below.set_xticks(range(RANKS), [f"hop {h}" for h in range(RANKS)])
        below.set_ylim(0, 70)
        below.set_yticks([])
        for side in ("top", "right", "left"):
            below.spines[side].set_visible(False)
    axes[1][0].set_ylabel("pairs to compute")
    axes[1][2].legend(frameon=False, ncols=2, fontsize=9)
    return figure


def picture_merging() -> Figure:
    """Two partial results and what becomes of them."""
    figure, ax = plt.subplots(figsize=(9.6, 3.3))
    blank(ax, 16, 5.4)
    for y, r, keys in ((3.4, 0, "keys 0 to 4095"), (0.7, 1, "keys 4096 to 8191")):
        box(ax, 0.1, y, 3.1, 1.2, keys, COLOURS[r])
        arrow(ax, (3.3, y + 0.6), (4.5, y + 0.6))
        box(ax, 4.6, y, 3.3, 1.2, f"out{'AB'[r]}, lse{'AB'[r]}", COLOURS[r])
        arrow(ax, (8.0, y + 0.6), (9.4, 2.6 if r else 2.8))
    box(
        ax,
        9.5,
        1.5,
        6.3,
        2.4,
        "lse = log(exp lseA + exp lseB)\nout = exp(lseA - lse) outA\n+ exp(lseB - lse) outB",
        COLOURS[2],
        10.5,
    )
    ax.text(5, 5.1, "one query row, two blocks of keys", color=GREY, fontsize=10, ha="center")
    return figure


def picture_prefill_and_decode() -> Figure:
    """A round of prefill, and one new token."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9))
    blank(left, 10, 7)
    left.set_title("prefill: each rank computes a chunk of the round")
    for r in range(RANKS):
        y = 5.3 - 1.55 * r
        left.text(0.1, y + 0.45, f"rank {r}", va="center", fontsize=10, color=GREY)
        box(left, 1.5, y, 2.3, 0.95, "cached", "#b0b0b0", 9)
        box(left, 3.95, y, 1.2, 0.95, "new", COLOURS[r], 9)
        box(left, 6.6, y, 3.2, 0.95, "attends to all before it", COLOURS[r], 9)
        arrow(left, (5.25, y + 0.47), (6.5, y + 0.47))
        if r < RANKS - 1:
            arrow(left, (4.5, y - 0.05), (4.5, y - 0.55))
    left.text(5.0, 0.05, "keys and values go around the ring", fontsize=9, color=GREY, ha="center")
    blank(right, 10, 7)
    right.set_title("decode: the new token's query is on all ranks")
    for r in range(RANKS):
        y = 5.3 - 1.55 * r
        box(right, 0.2, y, 0.8, 0.95, "q", "#444444", 10)
        box(right, 1.5, y, 2.6, 0.95, "cached", COLOURS[r], 9)
        arrow(right, (4.2, y + 0.47), (5.1, y + 0.47))
        box(right, 5.2, y, 1.6, 0.95, "state", COLOURS[r], 9)
        arrow(right, (6.9, y + 0.47), (8.1, 3.35 + 0.25 * (1.5 - r)))
    box(right, 8.2, 2.3, 1.7, 2.0, "out\non all\nranks", "#444444", 9.5)
    right.text(5.9, 0.05, "one exchange of states", fontsize=9, color=GREY, ha="center")
    return figure


def picture_layers() -> Figure:
    """The floors of the package."""
    floors = [
        ("cli", "#8172b3"),
        ("planning · doctor · bench · demo", "#8172b3"),
        ("lm · verify", "#8172b3"),
        ("ring_attention · decode_attention · training", COLOURS[3]),
        ("attention · ring (schedule, relay, loop)", COLOURS[3]),
        ("layout · backends · launcher", COLOURS[2]),
        ("cpu · metal · cuda", COLOURS[1]),
        ("kernels (interface)  |  transport (mpi, mlx, solo)", COLOURS[1]),
        ("autograd", COLOURS[0]),
        ("core (masks, softmax algebra, gradients) · tracing", COLOURS[0]),
        ("errors · native · rendezvous · reporting", COLOURS[0]),
    ]
    figure, ax = plt.subplots(figsize=(6.6, 5.4))
    blank(ax, 10, len(floors) * 0.8)
    for i, (text, colour) in enumerate(reversed(floors)):
        box(ax, 0.2, 0.05 + 0.8 * i, 9.6, 0.66, text, colour, 10.5)
    return figure


def main() -> None:
    for name, make in list(globals().items()):
        if name.startswith("picture_"):
            figure = make()
            path = HERE / f"{name.removeprefix('picture_')}.svg"
            figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
            print(path)


if __name__ == "__main__":
    main()
