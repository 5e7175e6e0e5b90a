"""Links of a given rate between the hosts of a virtual cluster: whether transfers hide behind compute, or fill links.

A host has one core, or one core for compute and one for messages. The rate is such that a hop's transfer takes a given
part of the hop's compute time. Compute time is the time of the same work in one kernel call with all keys, on all hosts
at once. The additional time of a ring has three parts: waits for blocks, work for messages on the core that computes,
and one kernel call per hop.
"""

from __future__ import annotations

import sys
from itertools import product
from statistics import median

import mlx.core as mx

import ringattn as ra
from launch.virtual import Cluster, unavailable
from ringattn.bench.problem import AttentionShape
from ringattn.bench.ranks import recorded, together
from ringattn.bench.ring import RingCase, RingProblem
from ringattn.bench.timing import turns
from ringattn.launcher.processes import available_cores

from .common import run_ranks, show, write_result

HEADS, KV_HEADS, DIM = 8, 2, 128
TOKENS = {2: 6144, 4: 8192}
NETWORKS = (  # hosts; whether neighbours have cables of their own instead of a switch; directions of the blocks
    (2, False, "one"),
    (4, False, "one"),
    (4, False, "both"),
    (4, True, "one"),
    (4, True, "both"),
)
CORES = (1, 2)  # of a host. One core computes, like a Mac's GPU; the other one is free for messages
HIDDEN = 0.7  # of a hop's compute: a transfer that can hide
BOUND = 2.0  # of a hop's compute: a transfer that cannot hide


def main() -> None:
    """Measure both kinds of transfer, for both masks, on every network."""
    if why := unavailable():
        print(f"\nlinks: skipped: {why}")
        return
    hidden = []
    bound = []
    for cores, (hosts, cables, ways), mask in product(CORES, NETWORKS, ("full", "causal")):
        if cores > 1 and cores * hosts > available_cores():
            continue
        with Cluster(hosts, cores=cores, ring=cables) as cluster:
            free = _run(cluster, hosts, mask, ways)
            compute = median(free["alone"]) / hosts  # of a hop
            hop = TOKENS[hosts] // hosts * KV_HEADS * DIM * 2 * 4
            for part, rows in ((HIDDEN, hidden), (BOUND, bound)):
                rate = 8 * hop / (part * compute)  # of a link, each way, that carries a whole block in that time
                cluster.set_rate(f"{rate / 1e3:.0f}kbit")
                found = _run(cluster, hosts, mask, ways)
                pairs = list(zip(found["call"], found["alone"]))  # measured one right after the other
                transfers = median(call - alone / hosts for call, alone in pairs)  # all but the last hop's compute
                links = 2 if cables and ways == "both" else 1
                share = median(alone / call for call, alone in pairs)
                figures = (median(found["call"]), median(found["alone"]), found["waited"], share)
                filled = 8 * found["bytes"] / links / rate / transfers
                network = "a cable to each neighbour" if cables else "one cable to a switch"
                rows.append(
                    [hosts, cores, network, ways, mask, f"{rate / 1e6:.0f}", *(f"{x:.2f}" for x in (*figures, filled))]
                )
    head = [
        "hosts",
        "cores",
        "each has",
        "ways",
        "mask",
        "Mbit/s",
        "ring, s",
        "without, s",
        "waited, s",
        "of pure compute",
        "of the rate",
    ]
    what = f"{HEADS}/{KV_HEADS} heads of {DIM}, float32"
    show(f"{what}: a block takes {HIDDEN} of a hop's compute on one link (aim: 0.95 of pure compute)", head, hidden)
    show(f"the same, {BOUND} of it (aim: 0.95 of the links' rate where that is the bound)", head, bound)


def _run(cluster: Cluster, hosts: int, mask: str, ways: str) -> dict:
    """Results of `worker`: times until the last rank is done, and the largest wait and bytes of all ranks."""
    found = run_ranks("benchmarks.links", hosts, 1, mask, ways, hosts=cluster.addresses, base=cluster.environment)
    assert found is not None
    return {**found[0], **{name: max(one[name] for one in found) for name in ("waited", "bytes")}}


def worker() -> None:
    """Measure on one host the seconds of several calls, in turn with the same work without a ring."""
    causal = sys.argv[2] == "causal"
    mx.set_default_device(mx.cpu)
    with ra.init() as ring:
        ring.both_ways = sys.argv[3] == "both"
        tokens = TOKENS[ring.size]
        shape = AttentionShape(mx.float32, DIM, (HEADS, KV_HEADS), tokens, tokens, causal)
        case = RingCase(ring, RingProblem(shape, "zigzag", "pass_kv"))
        assert case.error() <= 1
        before = ring.bytes_sent
        with recorded(ring) as events:
            case.with_ring()
        sent = ring.bytes_sent - before
        waited = sum(event.stop - event.start for event in events if event.kind == "wait")
        calls = {"call": case.with_ring, "alone": case.without_ring}
        timed = turns({name: together(ring, call) for name, call in calls.items()}, repeats=9)
        write_result(ring.rank, {**timed, "waited": waited, "bytes": sent})


if __name__ == "__main__":
    worker()
