"""A plan as text for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from ..reporting.tables import format_number, format_table
from .choice import Cluster, Job, best
from .links import Link
from .machines import Machine
from .prediction import Prediction
from .shape import ModelShape

GIB = 1 << 30
HEADER = ("machines", "arrangement", "memory GiB", "of", "longest context", "first token", "a token", "hidden", "sent")
SHOWN = 12  # arrangements


def as_text(shape: ModelShape, cluster: Cluster, job: Job, found: Sequence[Prediction]) -> str:
    """The cluster, a table of arrangements, and advice."""
    parts = [_title(shape, job), _cluster(cluster), _table(found), _advice(shape, cluster, job, found)]
    return "\n\n".join(parts)


def as_json(shape: ModelShape, cluster: Cluster, job: Job, found: Sequence[Prediction]) -> dict[str, Any]:
    """Object that ``ringattn plan --help`` describes."""
    chosen = best([one for one in found if one.arrangement.machines == cluster.size], job.answer)
    return {
        "model": {"name": shape.name, "layers": shape.depth, "positions": shape.positions},
        "context": job.context,
        "answer": job.answer,
        "prefill_step_size": job.chunk,
        "machines": [{"count": len(list(same)), **asdict(machine)} for machine, same in groupby(cluster.machines)],
        "links": {
            "neighbours": asdict(cluster.link),
            "outer": asdict(cluster.outer) if cluster.outer else None,
            "row": asdict(cluster.row) if cluster.row else None,
            "island": cluster.island or None,
        },
        "best": None if chosen is None else _object(chosen),
        "arrangements": [_object(one) for one in found],
    }


def _object(one: Prediction) -> dict[str, Any]:
    return {
        "arrangement": str(one.arrangement),
        "machines": one.arrangement.machines,
        **asdict(one.arrangement),
        "fits": one.fits,
        "memory_bytes": int(one.memory),
        "available_bytes": int(one.available),
        "longest_context": one.longest,
        "first_token_s": one.first,
        "token_s": one.token,
        "hidden": one.hidden,
        "bytes_per_prompt_token": one.sent,
        "strategy": one.strategy,
        "weights": list(one.weights),
        "options": one.arrangement.command,
    }


def _title(shape: ModelShape, job: Job) -> str:
    title = f"{shape.name}: {job.context:,} tokens of prompt, {job.answer:,} of answer"
    if shape.positions is None:
        return title
    note = "; its answers to longer ones are likely to be wrong" if job.context > shape.positions else ""
    return f"{title}. The model was made for contexts of {shape.positions:,} tokens{note}"


def _cluster(cluster: Cluster) -> str:
    lines = []
    for machine, same in groupby(cluster.machines):
        lines.append(f"{len(list(same))} x {_rates(machine)}")
    lines.append(f"links: {_link(cluster.link)}")
    if cluster.outer is not None:
        lines.append(f"between groups of {cluster.island}: {_link(cluster.outer)}")
    if cluster.row is not None:
        lines.append(f"sums over rows: {_link(cluster.row)}")
    return "\n".join(lines)


def _rates(machine: Machine) -> str:
    rates = [
        f"products {_flops(machine.flops)}",
        f"attention {_flops(machine.attention)}",
        f"memory {format_number(machine.bandwidth / 1e9)} GB/s, {format_number(machine.memory / GIB, 1)} GiB to use",
    ]
    return f"{machine.name}: {', '.join(rates)} ({machine.source})"


def _flops(rate: float) -> str:
    return f"{format_number(rate / 1e12, 1)} TFLOP/s" if rate >= 1e12 else f"{format_number(rate / 1e9)} GFLOP/s"


def _link(link: Link) -> str:
    speed = f"{format_number(link.bandwidth / 1e9, 2)} GB/s, {format_number(link.latency * 1e6)} us"
    return f"{link.name}, {speed} ({link.source})"


def _table(found: Sequence[Prediction]) -> str:
    rows = [
        [
            str(one.arrangement.machines),
            str(one.arrangement),
            format_number(one.memory / GIB, 1),
            f"{format_number(one.available / GIB, 1)}{'' if one.fits else '  TOO LITTLE'}",
            "any" if one.longest >= 1 << 31 else f"{one.longest:,}",
            format_seconds(one.first),
            format_seconds(one.token),
            f"{one.hidden:.0%}",
            format_bytes(one.sent),
        ]
        for one in found[:SHOWN]
    ]
    left = f"\n{len(found) - SHOWN} slower arrangements are not shown" if len(found) > SHOWN else ""
    note = (
        "hidden: share of the transfers of prefill beside which ranks compute; sent: by all, for a token of the prompt"
    )
    return f"{format_table(HEADER, rows)}{left}\n{note}"


def _advice(shape: ModelShape, cluster: Cluster, job: Job, found: Sequence[Prediction]) -> str:
    own = [one for one in found if one.arrangement.machines == cluster.size]
    chosen = best(own, job.answer)
    if chosen is None:
        longest = max(own, key=lambda one: one.longest)
        if not longest.longest:
            return "does not fit: the weights leave no room for a context. Add machines or memory"
        return (
            f"does not fit: at most {longest.longest:,} tokens of context do ({longest.arrangement}). Add machines or "
            "memory, or shorten the prompt"
        )
    lines = [f"best: {chosen.arrangement}, {format_seconds(chosen.seconds(job.answer))} in all"]
    runs = next((one for one in own if one.fits and one.arrangement.command is not None), None)
    if chosen.arrangement.command is None:
        lines.append("      (computed: ringattn does not run this arrangement)")
    if runs is not None:
        lines += _how(shape, runs)
    return "\n".join(lines)


def _how(shape: ModelShape, one: Prediction) -> list[str]:
    """Options, strategy and layout of an arrangement that ringattn runs."""
    unequal = len(set(one.weights)) > 1
    weights = ",".join(f"{weight:g}" for weight in one.weights)
    given = f" --weights {weights}" if unequal else ""
    lines = []
    if shape.is_attention_only:
        layout = f"Layout.weighted(n, [{weights}])" if unequal else "Layout.zigzag(n, size)"
    else:
        lines.append(f"run:  ringattn generate {one.arrangement.command}{given} ({one.arrangement})")
        layout = "one chunk of each round a rank"
    lines.append(f"      strategy {one.strategy}, layout: {layout}")
    return lines


def format_seconds(seconds: float) -> str:
    """A time with a unit that suits it."""
    for limit, unit, name in ((1e-3, 1e-6, "us"), (1.0, 1e-3, "ms"), (600.0, 1.0, "s"), (36000.0, 60.0, "min")):
        if seconds < limit:
            return f"{format_number(seconds / unit, 1)} {name}"
    return f"{format_number(seconds / 3600, 1)} h"


def format_bytes(count: float) -> str:
    """A number of bytes with a unit that suits it."""
    for limit, unit, name in ((1e3, 1.0, "B"), (1e6, 1e3, "KB"), (1e9, 1e6, "MB")):
        if count < limit:
            return f"{format_number(count / unit, 1)} {name}" if count else "0"
    return f"{format_number(count / 1e9, 1)} GB"
