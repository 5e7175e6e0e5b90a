"""Times that `ringattn plan` predicts against times measured, on virtual hosts with a core each.

sudo python -m benchmarks planning
sudo python -m benchmarks.planning --networks 2:1gbit,4:500mbit --json FILE

On each network the ranks first measure their rates: kernel calls of two sizes, short prompts and a token on one rank,
a small message, a block that all ranks send at once, and a sum over two ranks. Predictions are then written down, and
only then the configurations run. They are others: longer, over several ranks, in rounds, rows and stages. Where hosts
share a core, the rates are measured while all of them compute.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from launch.virtual import Cluster, unavailable
from ringattn.planning.links import Link
from ringattn.reporting.machine import machine

from ..common import run_ranks, show
from .predictions import predict_calls, predict_models, ratios

AIM = 0.15
NETWORKS = ("2:free", "2:2gbit", "2:500mbit", "2:100mbit", "3:500mbit", "4:500mbit")  # hosts:rate of each link


def main(networks: Sequence[str] = NETWORKS, file: Path | None = None) -> None:
    """Measure rates, predict, and measure configurations of each network; print and save all."""
    if why := unavailable():
        print(f"\nplanning: skipped: {why}")
        return
    found: dict[str, Any] = {"machine": machine(), "command": " ".join(sys.argv), "networks": {}}
    with Cluster(2, cores=1) as cluster:  # without a limit a message costs nothing but the cores' work
        work = 1 / (2 * _ranks("link", 2, cluster)[0]["bandwidth"])
    for network in networks:
        hosts, rate = network.split(":")
        with Cluster(int(hosts), rate=None if rate == "free" else rate, cores=1) as cluster:
            one = _predict(int(hosts), cluster, work)
            found["networks"][network] = one
            _save(file, found)
            one["measured"] = _measure(int(hosts), cluster)
            one["rows"] = list(ratios(one["predicted"], one["measured"]))
            _save(file, found)
        for name, predicted, measured in one["rows"]:
            print(f"  {network}: {name}: {predicted / measured:.2f}", file=sys.stderr, flush=True)
    report([found])


def _ranks(phase: str, hosts: int, cluster: Cluster) -> list[dict[str, Any]]:
    options = {"hosts": cluster.addresses, "base": cluster.environment}
    found = run_ranks("benchmarks.planning.worker", hosts, 1, phase, **options)
    assert found is not None
    return found


def _predict(hosts: int, cluster: Cluster, work: float) -> dict[str, Any]:
    """Rates of all ranks, and what follows from them."""
    rates = _ranks("rates", hosts, cluster)
    link = Link("measured", rates[0]["bandwidth"], median(one["exchange"] for one in rates), work)
    predicted = {"calls": predict_calls(rates, link), "models": predict_models(rates, link)}
    return {"rates": rates, "work": work, "predicted": predicted, "predicted_at": time.strftime("%F %T")}


def _measure(hosts: int, cluster: Cluster) -> list[dict[str, Any]]:
    """Seconds of all configurations on all ranks."""
    measured = _ranks("runs", hosts, cluster)
    if hosts == 2:
        for one, stages in zip(measured, _ranks("stages", hosts, cluster)):
            one["models"] |= stages["models"]
    return measured


def _save(file: Path | None, found: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(found, indent=1) + "\n")


def report(files: Sequence[dict[str, Any]]) -> None:
    """Print the table of what one or several runs found."""
    rows = [
        [network, name, f"{predicted:.4f}", f"{measured:.4f}", f"{predicted / measured:.2f}"]
        for found in files
        for network, one in found["networks"].items()
        for name, predicted, measured in one.get("rows", ())
    ]
    show(
        "Predicted and measured, float32, a core a host (3 and 4 hosts share 2 cores)",
        ["hosts:links", "what", "predicted, s", "measured, s", "ratio"],
        rows,
    )
    found = [float(row[2]) / float(row[3]) for row in rows]
    within = sum(abs(ratio - 1) <= AIM for ratio in found)
    print(f"  {within} of {len(found)} within {AIM:.0%} (aim: at least 12); median ratio {median(found):.2f}")
