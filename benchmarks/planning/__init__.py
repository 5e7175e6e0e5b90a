"""Times that `ringattn plan` predicts against times measured, on virtual hosts with a core each.

sudo python -m benchmarks planning

On each network the ranks first measure their rates: one kernel call of two sizes, a short prompt on one rank, a new
token at a short context, a small message, and a block that all ranks send at once. The configurations to predict are
others: longer, over several ranks, with other heads and masks. Rates and configurations take turns, so that other work
on the machine affects both. Where hosts share a core, the rates are measured while all of them compute.
"""

from __future__ import annotations

import sys
from statistics import median

from launch.virtual import Cluster, unavailable
from ringattn.planning.links import Link

from ..common import run_ranks, show
from .predictions import predict_calls, predict_model

AIM = 0.15
NETWORKS = ((2, None), (2, "1gbit"), (2, "200mbit"), (2, "60mbit"), (3, "400mbit"), (4, "400mbit"))


def main() -> None:
    """Measure, predict and print, for each network."""
    if why := unavailable():
        print(f"\nplanning: skipped: {why}")
        return
    free_work = None
    rows = []
    ratios = []
    for hosts, rate in NETWORKS:
        with Cluster(hosts, rate=rate, cores=1) as cluster:
            for what in ("attention", "model"):
                if what == "model" and hosts > 2:
                    continue
                options = {"hosts": cluster.addresses, "base": cluster.environment}
                found = run_ranks("benchmarks.planning.worker", hosts, 1, what, **options)
                assert found is not None
                if rate is None:  # without a limit a message costs nothing but the cores' work
                    free_work = 1 / (2 * found[0]["bandwidth"])
                for name, predicted, measured in _compare(what, found, free_work or 0.0):
                    ratios.append(predicted / measured)
                    print(f"  {hosts} hosts, {rate}: {name}: {ratios[-1]:.2f}", file=sys.stderr, flush=True)
                    rows.append(
                        [hosts, rate or "free", name, f"{predicted:.3f}", f"{measured:.3f}", f"{ratios[-1]:.2f}"]
                    )
    head = ["hosts", "links", "what", "predicted, s", "measured, s", "ratio"]
    show("Predicted and measured, float32, a core a host (4 hosts share 2 cores)", head, rows)
    within = sum(abs(ratio - 1) <= AIM for ratio in ratios)
    print(f"  {within} of {len(ratios)} within {AIM:.0%} (aim: at least 12); median ratio {median(ratios):.2f}")


def _compare(what: str, found: list[dict], work: float) -> list[tuple[str, float, float]]:
    """Name, predicted and measured seconds of each configuration of one network."""
    link = Link("measured", found[0]["bandwidth"], found[0]["latency"], work)
    return predict_calls(found, link) if what == "attention" else predict_model(found, link)
