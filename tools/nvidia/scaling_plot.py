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

STYLES = {"ringattn": ("#c44e52", "o", 2.5), "FLASH": ("#4c72b0", "s", 1.3), "CUDNN": ("#55a868", "^", 1.3)}


def lines(files: list[Path]) -> dict[str, list[tuple[int, float]]]:
    """Tokens and fractions of the ideal of each program, forward, with as many key/value heads as query heads."""
    found = defaultdict(list)
    for file in files:
        for record in json.loads(file.read_text()):
            if "of ideal" in record and not record["gradient"] and record["heads"][0] == record["heads"][1]:
                found[record["what"]].append((record["tokens"], record["of ideal"]))
    return {name: sorted(points) for name, points in found.items()}


def draw(found: dict[str, list[tuple[int, float]]], to: Path) -> None:
    matplotlib.use("Agg")
    plt.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "ringattn"})
    figure, axes = plt.subplots(figsize=(6.4, 3.8))
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
    axes.set_ylabel("speed of four GPUs / four times one GPU")
    axes.legend(fontsize=8, loc="lower right", frameon=False)
    figure.tight_layout()
    figure.savefig(to, metadata={"Date": None})


if __name__ == "__main__":
    draw(lines([Path(name) for name in sys.argv[2:]]), Path(sys.argv[1]))
