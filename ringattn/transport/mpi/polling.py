"""Polling of the network: spin briefly, then yield the core, then sleep."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

SPINS = 2  # polls before the first yield, which costs little more than a poll where no other process wants the core
YIELD_FOR = 0.5  # s of yielding before the first sleep; fast links move 256 MB in less
CROWDED = 5e-4  # s; a yield that takes longer gave the core to another process, for a whole time slice
SHORTEST_SLEEP = 5e-5  # s
SLEEP_FRACTION = 1e-3  # of the time waited so far: a sleep may be that long, so that a wait of hours needs no core
LONGEST_SLEEP = 1e-2  # s
CHECK_EVERY = 2e-3  # s between two checks of the peers


yield_core: Callable[[], object] = getattr(os, "sched_yield", lambda: time.sleep(0))


def wait_until(poll: Callable[[], bool], check: Callable[[], None], bulk: bool = False) -> None:
    """Call `poll` until it returns ``True``; call `check`, which raises if a peer is lost, every `CHECK_EVERY` seconds.

    With `bulk`, every poll moves bytes, and a sleep would slow down a fast link. Without it, a message is either there
    or not, and where the core is shared a sleep is shorter than the time slice that a yield gives away.
    """
    for _ in range(SPINS):
        if poll():
            return
    now = start = checked = time.monotonic()
    sleeping = False
    while not poll():
        if sleeping:
            time.sleep(min(max(SHORTEST_SLEEP, SLEEP_FRACTION * (now - start)), LONGEST_SLEEP))
        else:
            yield_core()
        before = now
        now = time.monotonic()
        sleeping = sleeping or now - start > YIELD_FOR or (now - before > CROWDED and not bulk)
        if now - checked > CHECK_EVERY:
            checked = now
            check()
