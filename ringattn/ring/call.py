"""One `ring_attention` call on this rank: checked arguments, blocks, and kernel calls on two blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from .. import backends
from ..autograd.evaluation import await_inputs, evaluate, evaluated_copies, start_evaluation
from ..core.arrays import read_only
from ..core.gradients import Gradients, Rows
from ..core.intervals import Spans, kept_positions
from ..core.online_softmax import Partial, State, finish
from ..core.options import Options
from ..core.rules import ScoreRules
from ..core.validation import check_choice, check_flag, check_qkv
from ..errors import ArgumentError, ArgumentTypeError
from ..kernels.interface import Kernel, KernelInputs, OutputSpec
from ..layout import Layout
from ..native.cuda import on_gpu
from ..transport.base import Ring
from ..transport.consensus import Fields, agree
from ..transport.interface import Links, Transfer, Transport
from .blocks import Block
from .schedule import BOTH_WAYS, STRATEGIES, TO_THE_RIGHT, Route, Schedule, Sizes, choose, choose_routes, plan

Arrays = Sequence[mx.array]
Arrive = Callable[[], None]


@dataclass(frozen=True)
class RingCall:
    """One checked call on this rank.

    Attributes:
        arrays: q, k, v and the arrays of the options.
        links: The links between the GPUs, where blocks travel over these.
    """

    ring: Transport
    layout: Layout
    kv_layout: Layout
    options: Options
    strategy: str | None
    kernel: Kernel
    arrays: tuple[mx.array, ...]
    links: Links | None = None

    @classmethod
    def checked(cls, ring, layout, kv_layout, q, k, v, *, strategy, return_lse, backend, **options) -> RingCall:
        """Check this rank's arguments, without evaluating an array.

        Raises:
            ArgumentError: If an argument is wrong; the message names the first one.
        """
        check_qkv(q, k, v)
        layout = check_layout("layout", layout, ring, {"q": q.shape[2]})
        name = "layout" if kv_layout is None else "kv_layout"
        kv_layout = check_layout(name, layout if kv_layout is None else kv_layout, ring, {"k": k.shape[2]})
        checked = Options.checked(q, k, columns=kv_layout.length, one_segments=kv_layout == layout, **options)
        check_choice("strategy", strategy, STRATEGIES)
        check_flag("return_lse", return_lse)
        return cls(ring, layout, kv_layout, checked, strategy, backends.select(backend), (q, k, v, *checked.arrays))

    def bind(self, arrays: tuple[mx.array, ...]) -> RingCall:
        """Replace the arrays by `arrays`, which a transformation passes."""
        return replace(self, options=self.options.bind(arrays[3:]), arrays=arrays)

    def agreed(self, what: str, fields: Fields) -> RingCall:
        """Agree with the other ranks on this call. Blocks stay on the GPUs if every rank computes on its GPU.

        Messages that were posted for GPUs are dropped if they do not.
        """
        if not self.ring.has_gpus:
            agree(self.ring, what, fields)
            return self
        replies = agree(self.ring, what, fields, payload=[memoryview(bytes([self.stays_on_gpu]))])
        if not all(reply[0] for reply in replies):
            if self.ring.links is not None:
                self.ring.links.forget()
            return replace(self, links=None)
        with self.ring.break_ring_on_error():
            return replace(self, links=self.ring.connect_gpus())

    @property
    def stays_on_gpu(self) -> bool:
        """Whether this rank's blocks can travel from GPU to GPU."""
        return self.ring.has_gpus and self.kernel.lazy and self.strategy != "gather" and on_gpu()

    @property
    def runs_ahead(self) -> bool:
        """Whether Python goes on while a GPU works. Not where there is a trace, whose spans show what the GPU does."""
        return self.links is not None and self.ring.tracer.events is None

    def fields(self) -> Fields:
        """List the values that all ranks must agree on."""
        q, k, v = self.arrays[:3]
        named = (
            ("batch", q.shape[0]),
            ("heads of q", q.shape[1]),
            ("heads of k", k.shape[1]),
            ("head_dim", q.shape[3]),
            ("head_dim of v", v.shape[3]),
            ("dtype", q.dtype),
            ("layout", self.layout.summary),
            ("kv_layout", self.kv_layout.summary),
            ("strategy", repr(self.strategy)),
            ("both_ways", self.ring.both_ways),
        )
        return tuple((name, str(value)) for name, value in named) + self.options.fields

    def schedules(self, gradient: bool = False) -> list[Schedule]:
        """Plan this rank's hops, in one direction or in both."""
        chosen = self.chosen(gradient)
        where = (self.layout, self.kv_layout, self.options.band)
        routes: tuple[Route, ...] = BOTH_WAYS if self.ring.both_ways else (TO_THE_RIGHT,)
        if self.ring.both_ways is None and self.ring.neighbours_on_other_hosts:
            routes = choose_routes(*where, chosen, self._sizes(gradient)[chosen == "pass_q"], gradient)
        return [plan(*where, chosen, self.ring.rank, gradient, route) for route in routes]

    def chosen(self, gradient: bool = False) -> str:
        """Return the given strategy, or choose one from numbers that all ranks agree on."""
        if self.strategy is not None:
            return self.strategy
        return choose(self.layout, self.kv_layout, self.options.band, *self._sizes(gradient), gradient)

    def _sizes(self, gradient: bool) -> tuple[Sizes, Sizes]:
        """Compute the bytes that travel for a key and for a query."""
        q, k, v = self.arrays[:3]
        mask = self.options.mask
        batch, heads, _, dim = q.shape
        item = q.dtype.size
        ids = 4 * batch * (self.options.segments is not None)
        row = 0 if mask is None else mask.shape[0] * mask.shape[1] * mask.shape[3] * mask.dtype.size
        key = batch * k.shape[1] * (dim + v.shape[3])
        query = batch * heads * dim
        keys = Sizes(key * item + ids)
        queries = Sizes(query * item + ids + row, batch * heads * (v.shape[3] + 2) * 4)
        if gradient:  # dout, lse and delta travel with a query
            rows = batch * heads * (v.shape[3] * self.options.out_dtype.size + 8)
            dmask = 0 if mask is None or mask.dtype == mx.bool_ else row // mask.dtype.size * 4
            keys, queries = Sizes(keys.block, key * 4), Sizes(queries.block + rows, query * 4 + dmask)
        return keys, queries

    def keys(self) -> Block:
        """Make the block of this rank's keys, values and segment ids."""
        ids = () if self.options.segments is None else self.options.segments[1:]
        return Block((*self.arrays[1:3], *ids), (2, 2, 1)[: 2 + len(ids)], self.kv_layout.spans[self.ring.rank])

    def queries(self, of_rows: Rows | None = None) -> Block:
        """Make the block of this rank's queries, their rows for the gradient, mask rows and segment ids."""
        q = self.arrays[0]
        mask = self.options.mask
        segments = self.options.segments
        arrays = [q, *(of_rows or ())]
        axes = [2] * (1 + len(of_rows or ()))
        if mask is not None:
            arrays.append(mx.broadcast_to(mask, (*mask.shape[:2], q.shape[2], mask.shape[3])))
            axes.append(2)
        if segments is not None:
            arrays.append(segments[0])
            axes.append(1)
        return Block(tuple(arrays), tuple(axes), self.layout.spans[self.ring.rank])

    def attend(self, queries: Block, keys: Block, state: State | None, arrive: Arrive) -> State:
        """Build the state of a block of queries over a block of keys, from `state`. See `run` for `arrive`."""
        return self.kernel.forward(self._inputs(queries, keys, 1, arrive), state)

    def finish(self, queries: Block, keys: Block, state: State | None, arrive: Arrive) -> Partial:
        """Build the results ``(out, lse)`` of the last block of keys."""
        output = OutputSpec(self.options.out_dtype, True, self.options.sinks)
        out, lse = self.kernel.finish(self._inputs(queries, keys, 1, arrive), output, state)
        assert lse is not None
        return out, lse

    def finish_state(self, state: State) -> Partial:
        """Compute ``(out, lse)`` of a state over all keys."""
        return finish(state, self.options.sinks, self.options.out_dtype)

    def backward_block(self, queries: Block, keys: Block, sums: Gradients, arrive: Arrive) -> list[mx.array]:
        """Build `sums`, but for those that are ``None``, plus the gradients of a block of queries and one of keys.

        The queries come with their rows.
        """
        rows = Rows(*queries.arrays[1:4])
        return [x for x in self.kernel.backward(self._inputs(queries, keys, 4, arrive), rows, sums) if x is not None]

    def run(self, hop: int, after: Transfer | None, build: Callable[[Arrive], Arrays]) -> Arrays:
        """Compute the arrays that `build` makes of a block, once the transfer `after` has brought it.

        Where Python `runs_ahead`, a GPU's work is prepared before the block is there, and may go on when this returns.
        `build` gets a function that waits for the block, to be called before anything is evaluated.
        """

        def arrive() -> None:
            await_inputs()
            self.wait(hop, after)

        if self.runs_ahead:
            found = build(arrive)
            self.wait(hop, after)
            start_evaluation(*found)
            return found
        arrive()
        with self.ring.tracer.span("compute", hop):
            found = evaluated_copies(build(arrive))
            evaluate(*found)
        return found

    def _inputs(self, queries: Block, keys: Block, before_mask: int, arrive: Arrive) -> KernelInputs:
        """Make a kernel's inputs from two blocks."""
        options = self.options
        k_pos = kept_positions(keys.spans)
        rest = list(queries.arrays[before_mask:])
        mask = rest.pop(0) if options.mask is not None else None
        segments = (rest[0], keys.arrays[2]) if options.segments is not None else None
        columns = None if mask is None else _columns(keys.spans, self.kv_layout.start)
        rules = ScoreRules(options.scale, options.band, options.softcap, mask, columns, segments)
        k, v = keys.arrays[:2]
        return KernelInputs(queries.arrays[0], k, v, kept_positions(queries.spans), k_pos, rules, arrive)

    def empty_state(self, tokens: int) -> State:
        """Make the state of `tokens` queries over no keys."""
        q, _, v = self.arrays[:3]
        return State.empty(q.shape[0], q.shape[1], tokens, v.shape[3])

    def gradients_of_keys(self, tokens: int) -> tuple[mx.array, ...]:
        """Make zeros for the gradients of `tokens` keys and values."""
        k, v = self.arrays[1:3]
        return tuple(mx.zeros((*x.shape[:2], tokens, x.shape[3])) for x in (k, v))

    def gradients_of_queries(self, tokens: int) -> tuple[mx.array, ...]:
        """Make zeros for the gradients of `tokens` queries, and of their rows of an additive mask."""
        mask = self.options.mask
        arrays = [self.arrays[0], *([] if mask is None or mask.dtype == mx.bool_ else [mask])]
        return tuple(mx.zeros((*x.shape[:2], tokens, x.shape[3])) for x in arrays)

    def wait(self, hop: int, *transfers: Transfer | None) -> None:
        """Wait for the `transfers` that are not None, and record the wait in the ring's trace."""
        waiting = [transfer for transfer in transfers if transfer is not None]
        if not all(transfer.done for transfer in waiting):
            with self.ring.tracer.span("wait", hop):
                self.ring.wait(*waiting)


@lru_cache(maxsize=64)
def _columns(spans: Spans, start: int) -> np.ndarray:
    """List the columns of the keys at `spans` in a mask whose first column is that of position `start`."""
    return read_only(kept_positions(spans) - start)


def check_ring(ring: Any) -> Transport:
    """Check for a ring, and return it with the methods of the library. Without one no check can be collective."""
    if not isinstance(ring, Transport):
        raise ArgumentTypeError(f"ring: {type(ring).__name__}, expected a ring from ringattn.init()")
    return ring


def check_layout(name: str, layout: object, ring: Ring, tokens: dict[str, int]) -> Layout:
    """Check for a layout of the ring's size that gives this rank as many tokens as its arrays have."""
    if not isinstance(layout, Layout):
        raise ArgumentTypeError(f"{name}: {type(layout).__name__}, expected a Layout")
    if layout.size != ring.size:
        raise ArgumentError(f"{name}: for {layout.size} ranks, expected {ring.size}, the size of the ring")
    expected = layout.local_length(ring.rank)
    for array, n in tokens.items():
        if n != expected:
            raise ArgumentError(f"{array}: {n} tokens, expected {expected}, what {name} gives to rank {ring.rank}")
    return layout
