"""Draw the measurements of `tools.nvidia.scaling` and `tools.nvidia.scaling_torch`.

Run ``python -m tools.nvidia.scaling_plot docs/pictures/scaling.svg RESULTS.json...``.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

STYLES = {"ringattn": ("#c44e52", "o", 2.5), "FLASH": ("#4c72b0", "s", 1.3), "CUDNN": ("#55a868", "^", 1.3)}


Lines = dict[str, list[tuple[int, float]]]


def records(files: list[Path]) -> list[dict]:
    """The records that compare several GPUs with one, with as many key/value heads as query heads."""
    every = [record for file in files for record in json.loads(file.read_text())]
    return [record for record in every if "of ideal" in record and record["heads"][0] == record["heads"][1]]


def lines(found: list[dict]) -> dict[bool, Lines]:
    """Tokens and fractions of the ideal of each program.

    The keys say whether the times are those of the forward and the backward pass together.
    """
    passes: dict[bool, Lines] = {}
    for record in found:
        of_pass = passes.setdefault(record["gradient"], defaultdict(list))
        of_pass[record["what"]].append((record["tokens"], record["of ideal"]))
    return {gradient: {name: sorted(points) for name, points in of.items()} for gradient, of in sorted(passes.items())}


def draw(found: dict[bool, Lines], gpus: int, to: Path) -> None:
    """Draw one diagram for each kind of pass on `gpus` GPUs."""
    matplotlib.use("Agg")
    plt.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "ringattn"})
    figure, every = plt.subplots(1, len(found), figsize=(1 + 5.4 * len(found), 3.8), sharey=True, squeeze=False)
    for axes, (gradient, of) in zip(every[0], found.items()):
        _draw_pass(axes, of)
        axes.set_title("forward and backward" if gradient else "forward", fontsize=10)
    every[0, 0].set_ylabel(f"speed of {gpus} GPUs / {gpus} times one GPU")
    every[0, 0].legend(fontsize=8, loc="lower right", frameon=False)
    figure.tight_layout()
    figure.savefig(to, metadata={"Date": None})


def _draw_pass(axes: Axes, found: Lines) -> None:
    for name, points in found.items():
        colour, marker, width = next(style for key, style in STYLES.items() if key in name)
        dashes = "--" if "allgather" in name else "-"
        label = name.replace("context_parallel", "PyTorch context_parallel,")
        axes.plot(*zip(*points), dashes, color=colour, marker=marker, linewidth=width, label=label)
    axes.axhline(1, color="#999999", linewidth=0.8)
    ticks = sorted({tokens for points in found.values() for tokens, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tokens // 1024}K" for tokens in ticks])
    axes.set_ylim(0, 1.1)
    axes.set_xlabel("tokens (causal, bfloat16, 16 heads of 128)")


if __name__ == "__main__":
    measured = records([Path(name) for name in sys.argv[2:]])
    draw(lines(measured), measured[0]["ranks"], Path(sys.argv[1]))
