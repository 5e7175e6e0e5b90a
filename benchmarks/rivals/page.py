"""Section of docs/benchmarks.md, written from the JSON files of the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..common import ROOT
from .computed import computable, computed_table
from .results import load
from .tables import failures, gpu_table, job_leads, job_table, lead_line, operator_table

PAGE = ROOT / "docs" / "benchmarks.md"
PICTURE = ROOT / "docs" / "pictures" / "rivals.png"
BEGIN = "<!-- rivals: written by python -m benchmarks.rivals page -->"
END = "<!-- rivals: end -->"
ON_GPUS = "### On GPUs"
INTRODUCTION = """## Rivals

What people use instead, measured in the same run as ringattn, on the same problems. All answers were compared before
anything was timed: those of the operator with PyTorch's, and PyTorch's with float64; the log-probabilities of a model
with those of mlx-lm on one host. Both sides of a ratio were measured in one piece of a few minutes.
`python -m benchmarks.rivals operator`, `sudo python -m benchmarks.rivals job` and `python -m benchmarks.rivals page`
make this section."""
OPERATOR = """### The operator

Attention in float32 over 2 ranks with one thread each; "one process" has two threads. The loopback interface carries
TCP for all of them. The throttled link joins two virtual hosts with a core each, which one process with two threads
cannot use. Each library has its fastest way for the problem. Times are medians of the slowest rank, of 6 to 12 calls in
two rounds for PyTorch in one process, axolotl-ringmaster's Ulysses and ringattn, and of two for the others, which are
slower."""
JOB = """### A whole language model

Two virtual hosts with a core each, float32, all with the same BLAS (that which ringattn gives MLX). "larger": random
weights, 4 layers with the shapes of Qwen2.5-1.5B and SmolLM2's vocabulary; "smollm2": SmolLM2-135M. MLX has no fused
attention on a CPU, as it has on a Mac, so mlx-lm's ways were also measured with ringattn's fused attention: those rows
compare the ways to divide the work. As with MLX's own, which is lazy, it is then not computed in the last layer of a
prompt's chunk. "Pipelined prefill" is a model of exo's, written for this comparison: chunks of 512 tokens stream
through the stages. Rounds of the other ways are their defaults: 2,048 tokens in mlx-lm, and what `prefill_step_size`
says in ringattn."""
COMPUTED = """**Computed, not measured:** first token of "larger" with all 28 layers, on more hosts than this machine
has cores. The model of `ringattn plan` computes it from the measured times of one host; links have 0.94 of their rate,
and 0.1 ms for a small message. The model's two key/value heads allow tensor parallelism over two hosts, so more hosts
are a ring of such pairs."""


def write(folder: Path, gpu: Path | None = None) -> str:
    """Replace the section between the markers, or add it to the end of the page. Return it.

    Without `gpu` the part on GPUs stays as it is.
    """
    page = PAGE.read_text()
    on_gpus = gpu_part(page) if gpu is None else [ON_GPUS, gpu_table(json.loads(gpu.read_text()))]
    section = "\n\n".join([BEGIN, INTRODUCTION, *_parts(folder), *on_gpus, END])
    PAGE.write_text(replaced(page, section))
    return section


def gpu_part(page: str) -> list[str]:
    """The part of `page` on GPUs, whose records come from other machines."""
    own = page.partition(BEGIN)[2].partition(END)[0]
    _, title, part = own.partition(ON_GPUS)
    return [title + part.rstrip()] if title else []


def replaced(page: str, section: str) -> str:
    """`page` with `section` in the place of what is between the markers, or at its end."""
    if BEGIN not in page:
        return f"{page.rstrip()}\n\n{section}\n"
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{section}{after}"


def _parts(folder: Path) -> list[str]:
    parts = ["![ringattn beside each rival](pictures/rivals.png)"] if PICTURE.exists() else []
    operator, job = (folder / f"{name}.json" for name in ("operator", "job"))
    if operator.exists():
        parts += _operator(load(operator))
    if job.exists():
        parts += _job(load(job))
    return parts


def _operator(found: dict[str, Any]) -> list[str]:
    rows = found["rows"]
    parts = [OPERATOR, about(found)]
    versions = {}
    for row in rows:
        versions.update(row.versions)
    parts.append("Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    for link in dict.fromkeys(row.link for row in rows):
        for gradient in (False, True):
            what = "with the gradient" if gradient else "forward"
            title = f"**{link}, {what}.** {lead_line(rows, link, gradient)}"
            parts += [title, operator_table(rows, link, gradient)]
    return [*parts, "Rivals that could not do some of the work:", failures(rows)]


def _job(found: dict[str, Any]) -> list[str]:
    rows = found["rows"]
    samples = [len(row.first) for row in rows if row.first]
    ends = map(str, sorted({min(samples), max(samples)}))
    parts = [
        JOB,
        about(found),
        f"Samples of each time, of which the median is shown: {' to '.join(ends)}.",
    ]
    for model in dict.fromkeys(row.model for row in rows):
        parts += [f"**{model}**", job_table(rows, model), job_leads(rows, model)]
    if computable(rows):
        parts += [COMPUTED, computed_table(rows)]
    return [*parts, "Ways that could not do some of the work:", failures(rows)]


def about(found: dict[str, Any]) -> str:
    """Machine, versions, command and time of results."""
    machine = " ".join(found["machine"].split())
    return f"{found['processor']}; {machine}; {found['time']}. Last piece: `{found['command']}`"
