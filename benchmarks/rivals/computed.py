"""Times on more hosts than this machine has cores, computed by ringattn's planning from measured ones of one host."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from ringattn.planning import Cluster, Job, Link, Machine, ModelShape, predictions
from ringattn.planning.describe import shape_of, unread_model

from .job import LARGER, OURS
from .lm.models import CONFIG
from .results import JobRow
from .tables import NONE, markdown

HOSTS = (2, 4, 8)
PROMPTS = (16384, 65536)
DEPTH = 28  # layers of the whole model; the one that was measured has fewer
LATENCY = 100e-6  # s of a small message; an assumption, and that of plan's table for Ethernet
HEADERS = 0.94  # of a link's rate are left
MEMORY = 64e9  # bytes of a host: all fits


def shape(layers: int) -> ModelShape:
    """The larger model with so many layers, in float32."""
    return shape_of(LARGER, unread_model({**CONFIG, "num_hidden_layers": layers, "torch_dtype": "float32"}))


def host(rows: Sequence[JobRow]) -> Machine:
    """Rates of a host, from the times of one host for the shortest and the longest prompt.

    Reading n tokens takes ``linear * n + attention * n**2 / 2`` seconds, and the last token is read alone.
    """
    own = _alone(rows)
    ends = [min(own, key=lambda row: row.prompt), max(own, key=lambda row: row.prompt)]
    measured = shape(CONFIG["num_hidden_layers"])
    pairs = sum(kind.count * kind.pair_flops for kind in measured.prompt_attending)
    (n, a), (m, b) = ((row.prompt, (median(row.first) - median(row.token)) / row.prompt) for row in ends)
    slope = (b - a) / (m - n)  # attention / 2
    token = median(ends[0].token)
    return Machine(
        "host",
        flops=measured.prompt_linear / (a - slope * n),
        attention=pairs / (2 * slope),
        bandwidth=(measured.read + measured.head) / token,
        memory=MEMORY,
        source="measured",
    )


def computable(rows: Sequence[JobRow]) -> bool:
    """Whether one host was measured with two lengths of prompts."""
    return len({row.prompt for row in _alone(rows)}) > 1


def _alone(rows: Sequence[JobRow]) -> list[JobRow]:
    kind = ("mlx-lm, one host", OURS, LARGER)
    return [row for row in rows if (row.way, row.attention, row.model) == kind and row.first]


def computed_table(rows: Sequence[JobRow]) -> str:
    """Seconds to the first token of each arrangement on 2 hosts and on more, over each rate of the measured links."""
    machine = host(rows)
    whole = shape(DEPTH)
    lines = []
    for rate in dict.fromkeys(row.rate for row in rows):
        link = Link(rate, HEADERS * float(rate.removesuffix("gbit")) * 1e9 / 8, LATENCY)
        for prompt in PROMPTS:
            for count in HOSTS:
                lines.append([rate, f"{prompt // 1024}K", str(count), *_cells(whole, machine, link, prompt, count)])
    head = ["links", "prompt", "hosts", "one host, s", "ring, s", "tensor and ring, s", "pipeline, s", "best"]
    return markdown(head, lines)


def _cells(whole: ModelShape, machine: Machine, link: Link, prompt: int, count: int) -> list[str]:
    job = Job(prompt, answer=1, gpu=False)
    (alone,) = predictions(whole, Cluster((machine,), link), job)
    found = predictions(whole, Cluster((machine,) * count, link), job)
    first = {
        name: min((one.first for one in found if one.arrangement.kind in kinds), default=None)
        for name, kinds in {"ring": ["ring"], "divided": ["tensor", "grid"], "pipeline": ["pipeline"]}.items()
    }
    times = [alone.first, *first.values()]
    return [*(NONE if time is None else f"{time:.0f}" for time in times), str(found[0].arrangement)]
