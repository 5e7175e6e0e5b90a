"""How a thread waits for the network: spin briefly, then let others run, then sleep."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

SPINS = 2  # polls before the first yield, which costs little more than a poll where nobody else wants the core
YIELD_FOR = 0.5  # s of yielding before the first sleep; fast links move 256 MB in less
CROWDED = 5e-4  # s; a yield that takes longer gave the core to another process, for a whole time slice
NAP = 5e-5  # s, the shortest
PART = 1e-3  # of the time that it has waited: a nap may be as long, so that waiting for hours leaves the core alone
LONGEST_NAP = 1e-2  # s
LOOK_EVERY = 2e-3  # s between two looks at the peers' signs of life


let_others_run: Callable[[], object] = getattr(os, "sched_yield", lambda: time.sleep(0))


def wait_until(poll: Callable[[], bool], look: Callable[[], None], bulk: bool = False) -> None:
    """Call `poll` until it says True, and `look`, which raises when waiting has become pointless, now and then.

    With `bulk`, every poll moves bytes, and a nap would cap a fast link. Without it, a message is either there or not,
    and where the core is shared a nap ends sooner than the time slice that a yield gives away.
    """
    for _ in range(SPINS):
        if poll():
            return
    now = start = looked = time.monotonic()
    napping = False
    while not poll():
        if napping:
            time.sleep(min(max(NAP, PART * (now - start)), LONGEST_NAP))
        else:
            let_others_run()
        before, now = now, time.monotonic()
        napping = napping or now - start > YIELD_FOR or (now - before > CROWDED and not bulk)
        if now - looked > LOOK_EVERY:
            looked = now
            look()
