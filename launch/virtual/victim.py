"""Program of ranks for fault injection: ring attention in a loop, with every answer checked.

``python victim.py FOLDER FAULT RANK``: every rank writes its pid into FOLDER. Rank RANK causes FAULT in itself if a
rank can do so. After a wrong answer a rank prints a message and ends with code 99. For a fault in a row, all ranks make
one row of a grid, and sum numbers over `mx.distributed` in place of attention.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

import ringattn as ra
from ringattn.launcher.rank_wrapper import launched_rank
from ringattn.transport import handshake

WRONG = 99
SECONDS = 30  # without a fault
IN_A_ROW = " in a row"  # end of the names of such faults
SUMS = 20  # of a row between two calls of the ring


def main() -> None:
    folder = Path(sys.argv[1])
    fault = sys.argv[2]
    victim = int(sys.argv[3])
    if fault == "another version" and int(launched_rank()) == victim:
        handshake.__version__ = "0.0.1"
    with ra.init() as ring:
        (folder / f"{ring.rank}.pid").write_text(str(os.getpid()))
        row = ra.grid(ring, ring.size).row if fault.endswith(IN_A_ROW) else None
        begin = time.monotonic()
        calls = 0
        while time.monotonic() - begin < SECONDS:
            due = ring.rank == victim and (folder / "now").exists()
            tokens = int(ring.all_reduce(mx.array([0])).item()) + 97
            if row is None:
                attend(ring, calls, tokens, odd=due and fault)
            else:
                add_up(row)
            calls += 1
            if calls == 3:
                (folder / f"{ring.rank}.ready").touch()


def attend(ring: ra.Ring, seed: int, tokens: int, odd: str | bool) -> None:
    """Call causal ring attention on random numbers that every rank draws alike, with the fault `odd` if it is due."""
    random = np.random.default_rng(seed)
    layout = ra.Layout.zigzag(tokens, ring.size)
    q, k, v = (mx.array(random.standard_normal((1, 2, tokens, 32), np.float32)) for _ in range(3))
    own = [layout.shard(x, ring.rank) for x in (q, k, v)]
    if odd == "raises":
        raise ValueError("boom")
    if odd in ("ends early", "ends with a code"):
        sys.exit(0 if odd == "ends early" else 5)
    if odd == "no memory left":
        hoard = []
        while True:
            hoard.append(b"x" * (8 << 20))
    scale = 0.5 if odd == "other arguments" else 0.25
    out = ra.ring_attention(*own, ring=ring, layout=layout, mask="causal", scale=scale)
    exact = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask="causal")
    error = float(mx.abs(out - layout.shard(exact, ring.rank)).max().item())
    check(error < 1e-4, error)


def add_up(row: mx.distributed.Group) -> None:
    """Sum numbers over a row, again and again."""
    x = mx.full((1 << 16,), float(row.rank()))
    for _ in range(SUMS):
        total = mx.distributed.all_sum(x, group=row)
        check(total.max().item() == sum(range(row.size())), total)


def check(right: bool, answer: object) -> None:
    """End this process if an answer is wrong."""
    if not right:
        print(f"WRONG ANSWER: {answer}", flush=True)
        os._exit(WRONG)


if __name__ == "__main__":
    main()
