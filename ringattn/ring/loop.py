"""The loop of ring attention, which connects a schedule, a transport and a kernel.

Each strategy has three steps. Post: `relay` posts all transfers of blocks, and each block is forwarded on arrival.
Compute: each hop is one kernel call on this rank's block and the block that has arrived. Merge: the kernel carries the
state ``(acc, m, l)`` from hop to hop (pass-KV), or states travel home and are merged at each rank (pass-Q).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx

from ..autograd.evaluation import evaluate, start_evaluation
from ..core.online_softmax import Partial, State
from ..transport.consensus import raise_on_all_ranks
from ..transport.interface import Links, Transfer
from .accumulators import Accumulator, ResultHop, merge_state_arrays, post_results
from .blocks import Block
from .blocks import rows as rows_of
from .call import Arrays, Arrive, RingCall
from .device_results import accumulator_for
from .relay import Posted, collect, interleave_hops, relay
from .schedule import Hop, Schedule
from .slots import Arrival
from .staging import from_host

WHAT = "ring_attention"


def forward(call: RingCall) -> tuple[mx.array, mx.array]:
    """Agree with the other ranks, run the schedule, and compute ``(out, lse)``.

    Between GPUs this returns when all messages have arrived and the last work has started.
    """
    links = call.ring.links if call.stays_on_gpu else None
    with forgetting(links):
        with raise_on_all_ranks(call.ring, WHAT):
            # Keys and values first: the first send needs them, and must not wait for other arithmetic.
            keys = call.keys().arrays
            start_evaluation(*keys)
            strategy = call.chosen()
            call.ring.tracer.choose(strategy)
            # Python takes about as long to agree as a GPU to compute on a short block.
            early = links is not None and strategy == "pass_kv"
            own = OwnHop.of(replace(call, links=links)) if early else None
            start_evaluation(*call.arrays)
            evaluate(*keys)  # here, so that an error in them is one of all ranks
            fields = call.fields()
        call = call.agreed(WHAT, fields)
        if call.links is None:
            own = None
    with call.ring.break_ring_on_error():
        out, lse = _pass_kv(call, own) if own is not None else _STRATEGIES[strategy](call)
        (start_evaluation if call.runs_ahead else evaluate)(out, lse)
    return out, lse


@contextmanager
def forgetting(links: Links | None) -> Iterator[None]:
    """Drop the messages that were posted here if an exception is raised."""
    try:
        yield
    except BaseException:
        if links is not None:
            links.forget()
        raise


class OwnHop(NamedTuple):
    """Part of pass-KV that needs no other rank: all messages are posted, and the rank's own block is computed on.

    Attributes:
        arrivals: The hops, with their blocks.
        sends: The messages to the next rank.
        results: What the own block leaves; see `_attend`.
    """

    arrivals: list[tuple[int, Hop, Arrival]]
    sends: list[Transfer]
    results: Arrays

    @classmethod
    def of(cls, call: RingCall, agreed: bool = False) -> OwnHop:
        """Prepare the call, and start its transfers if all ranks have `agreed`."""
        arrivals, sends = relay(call.ring, call.keys(), call.schedules(), call.links)
        if agreed and call.links is not None:
            call.links.advance()
        return cls(arrivals, sends, _attend(call, arrivals, 0, []))


def _attend(call: RingCall, arrivals: Sequence[tuple[int, Hop, Arrival]], i: int, before: Arrays) -> Arrays:
    """Compute hop `i` of pass-KV on the results of the hops before: a state, or nothing.

    Returns:
        The state, or ``(out, lse)`` if no later hop computes. `before` if there is nothing to compute.
    """
    h, hop, arrival = arrivals[i]
    if not hop.compute:
        return before
    last = not any(later.compute for _, later, _ in arrivals[i + 1 :])
    state = State(*before) if before else None
    build = call.finish if last else call.attend
    return call.run(h, arrival.transfer, lambda arrive: build(call.queries(), from_host(arrival.block), state, arrive))


def _pass_kv(call: RingCall, own: OwnHop | None = None) -> Partial:
    """Send keys and values around the ring. Carry the state of this rank's queries from hop to hop."""
    arrivals, sends, results = own or OwnHop.of(call, agreed=True)
    held = Held(call)
    held.turn()
    held.release(arrivals[0][2], results[1:])
    for i, (h, _, arrival) in enumerate(arrivals[1:], 1):
        call.ring.set_progress(WHAT, h)
        results = _attend(call, arrivals, i, results)
        held.turn()
        held.release(arrival, results[1:])
    call.wait(arrivals[-1][0] + 1, *sends)
    if not results:
        return call.finish_state(call.empty_state(call.arrays[0].shape[2]))
    out, lse = results
    return out, lse


class Held:
    """Actions that wait for the end of work: the release of blocks, and the start of sends of results.

    On the host work is over when it returns. A GPU still does it then, and what follows is prepared meanwhile: `turn`
    is called once the next work has started.
    """

    def __init__(self, call: RingCall):
        self._links = call.links
        self._held: list[tuple[Arrays, Callable[[], None]]] = []
        self._later: list[tuple[Arrays, Callable[[], None]]] = []

    def until(self, results: Arrays, act: Callable[[], None]) -> None:
        """Call `act` once `results` are there."""
        self._hold(self._held, results, act)

    def release(self, arrival: Arrival, results: Arrays) -> None:
        """Release a block once `results`, which were computed on it, are there.

        If no other block comes into its slot, `turn` waits one turn longer, so that no more than two hops' results are
        under way.
        """
        soon = self._links is None or arrival.awaited
        self._hold(self._held if soon else self._later, results, arrival.release)

    def _hold(self, actions: list[tuple[Arrays, Callable[[], None]]], results: Arrays, act: Callable[[], None]) -> None:
        actions.append((results, act))
        if self._links is None:
            self.turn()
        else:
            start_evaluation(*results)  # so that `turn` waits for these, and not for the work that starts before it

    def turn(self) -> None:
        """Wait for the work that was added, and start the transfers that can start."""
        held, self._held, self._later = self._held, self._later, []
        if self._links is None:
            for _, act in held:
                act()
            return
        self._links.advance()
        for results, act in held:
            mx.eval(*results)
            act()
            self._links.advance()


def _gather(call: RingCall) -> Partial:
    """Send keys and values to all ranks whose queries see them. Each rank computes once."""
    schedules = call.schedules()
    whole = collect(call.ring, call.keys(), schedules)
    hops = max(len(schedule.hops) for schedule in schedules)
    call.ring.set_progress(WHAT, hops)
    out, lse = call.run(hops, None, partial(call.finish, call.queries(), whole, None))
    return out, lse


def _pass_q(call: RingCall) -> Partial:
    """Send queries around the ring, and their states one hop behind. Each rank merges the state over its own keys."""
    keys = call.keys()
    schedules = call.schedules()
    posted = relay(call.ring, call.queries(), schedules, call.links)
    accumulator = accumulator_for(call.links)(call.empty_state, merge_state_arrays)

    def build(block: Block, arrive: Arrive) -> State:
        return call.attend(block, keys, None, arrive)

    return call.finish_state(State(*round_trip(call, posted, schedules, accumulator, build)))


def round_trip(
    call: RingCall,
    posted: Posted,
    schedules: Sequence[Schedule],
    accumulator: Accumulator,
    build: Callable[[Block, Arrive], Arrays],
    settle: Callable[[int], Arrays] = lambda hop: (),
    first: Arrays | None = None,
) -> tuple[mx.array, ...]:
    """Compute on the blocks that pass. Their results travel one hop behind; those of the own block come home.

    Args:
        call: The call, whose ranks agree.
        posted: What `relay` returned for the own block.
        schedules: The hops of each route.
        accumulator: Adds results up.
        build: Builds the results of a block that travel; see `RingCall.run`.
        settle: Computes the results of a hop that stay on this rank, and returns them. What travels leaves meanwhile.
        first: What travels of the first hop, if it and what stays were computed before.
    """
    arrivals, sends = posted
    routes = [post_results(call.ring, schedule, accumulator, call.links) for schedule in schedules]
    held = Held(call)
    home_part: Block | None = None
    h = 0
    for (h, hop, arrival), (here, following) in zip(arrivals, interleave_hops(map(pairwise, routes))):
        call.ring.set_progress(WHAT, h)
        added = None
        used: Arrays = ()
        if hop.compute:
            used = first or call.run(h, arrival.transfer, partial(_build_on, build, hop, arrival))
            added = accumulator.block(used, hop.compute)
        held.turn()
        following.allow_receive()
        if h == 0:
            home_part = home_part or added
        elif hop.state:
            _send_total(call, accumulator, held, h, here, added)
        if hop.compute and first is None:
            used = (*used, *settle(h))
        first = None
        held.release(arrival, used)
    held.turn()
    totals: list[Block] = []
    for results in routes:
        call.wait(h + 1, results[-1].arrival.transfer)
        totals.append(results[-1].total(accumulator, None if totals else home_part))
    for part in totals[1:]:
        totals[0] = accumulator.add(totals[0], part)
    call.wait(h + 1, *sends, *(result.sent for results in routes for result in results))
    return from_host(totals[0]).arrays


def _send_total(
    call: RingCall, accumulator: Accumulator, held: Held, h: int, here: ResultHop, added: Block | None
) -> None:
    """Add what this rank `added` in hop `h` to what has arrived of these results, and send it once it is there."""
    call.wait(h, here.arrival.transfer)
    total = accumulator.sendable(here.total(accumulator, added), here.wanted)
    held.until(total.arrays, partial(here.send_total, total))


def _build_on(build: Callable[[Block, Arrive], Arrays], hop: Hop, arrival: Arrival, arrive: Arrive) -> Arrays:
    """Build on the tokens of a block that a hop computes on."""
    return build(rows_of(from_host(arrival.block), hop.compute), arrive)


_STRATEGIES = {"pass_kv": _pass_kv, "pass_q": _pass_q, "gather": _gather}
