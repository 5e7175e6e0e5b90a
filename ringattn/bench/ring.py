"""Timing of `ring_attention`, and of its gradient, against the same work without a ring.

Efficiency: the time of the same scores in one kernel call with all keys, on all ranks at once, divided by the time of
the ring. Hidden: the part of the time of the transfers alone (measured with a kernel that computes nothing) for which
no rank waits. The minimum of bytes: each key and value once to each other rank that sees it; with the gradient they
travel twice, and once more as gradients in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import mlx.core as mx
import numpy as np

from ..attention import attention
from ..core.masks import Band
from ..layout import Layout
from ..ring import loop
from ..ring.backward import backward
from ..ring.call import RingCall
from ..ring.schedule import minimum
from ..ring_attention import ring_attention
from ..transport.interface import Transport
from .memory import PeakMemory
from .no_kernel import NoKernel
from .problem import Arrays, AttentionShape, distance, random_arrays, sampled_error
from .ranks import of_all, recorded, together
from .records import Record
from .timing import turns

KEYS = ("ranks", "tokens", "head_dim", "heads", "dtype", "mask", "layout", "strategy")
FIGURES = (
    "compute_s",
    "efficiency",
    "transfer_s",
    "overlap",
    "sent_bytes",
    "sent_ratio",
    "peak_bytes",
    "tflops",
    "error",
)
CHUNK = 64  # tokens of a chunk of the cyclic layout
LAYOUTS: dict[str, Callable[[int, int], Layout]] = {
    "zigzag": Layout.zigzag,
    "contiguous": Layout.contiguous,
    "cyclic": lambda tokens, size: Layout.cyclic(tokens, size, CHUNK),
}
GRADIENT_FLOPS = 3.5  # of forward and gradient, as a multiple of the forward pass: 7 matrix products in place of 2
NEAR = 2e-3  # relative distance of gradients with a ring and without one, in float32; ulps of the dtype are added


@dataclass(frozen=True)
class RingProblem:
    """Problem to time on a ring.

    Attributes:
        shape: Attention of the whole sequence.
        layout: Name of the layout, a key of `LAYOUTS`.
        strategy: Argument of `ring_attention`.
        gradient: Whether the gradient is computed, too.
    """

    shape: AttentionShape
    layout: str
    strategy: str | None
    gradient: bool = False


class RingCase:
    """Calls of a problem on this rank: with the ring, without it, and its transfers alone."""

    def __init__(self, ring: Transport, problem: RingProblem):
        shape = problem.shape
        self._ring = ring
        self._problem = problem
        self.layout = LAYOUTS[problem.layout](shape.keys, ring.size)
        self.whole = random_arrays(shape)
        self.own: Arrays = tuple(mx.contiguous(self.layout.shard(x, ring.rank)) for x in self.whole)  # type: ignore[assignment]
        mx.eval(self.own)
        self.positions = self.layout.positions(ring.rank)

    def attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Attend over the ring."""
        problem = self._problem
        return ring_attention(
            q, k, v, ring=self._ring, layout=self.layout, mask=problem.shape.mask, strategy=problem.strategy
        )

    def attend_alone(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Attend to all keys without a ring."""
        places = (mx.array(self.positions), mx.arange(self._problem.shape.keys))
        return attention(q, k, v, positions=places, mask=self._problem.shape.mask)

    def with_ring(self) -> list[mx.array]:
        """The timed call: `out`, and the gradients of a loss whose gradient by `out` is q."""
        return self._run(self.attend, self.own)

    def without_ring(self) -> list[mx.array]:
        """The same scores by one kernel call with all keys."""
        return self._run(self.attend_alone, (self.own[0], *self.whole[1:]))

    def _run(self, attend: Callable[..., mx.array], arrays: Arrays) -> list[mx.array]:
        if self._problem.gradient:
            outputs, gradients = mx.vjp(attend, list(arrays), [self.own[0]])
            results = [*outputs, *gradients]
        else:
            results = [attend(*arrays)]
        mx.eval(results)
        return results

    def transfers(self) -> None:
        """Move the messages of the call, without arithmetic."""
        ring, problem = self._ring, self._problem
        call = RingCall.checked(
            ring,
            self.layout,
            None,
            *self.own,
            strategy=problem.strategy,
            return_lse=False,
            backend=None,
            mask=problem.shape.mask,
            **dict.fromkeys(("scale", "window", "softcap", "sinks", "segments", "out_dtype")),
        )
        call = replace(call, kernel=NoKernel())
        with recorded(ring):  # a trace must not show this as attention
            with ring.call(loop.WHAT):
                out, lse = loop.forward(call)
            if problem.gradient:
                backward(call, self.own[0], mx.zeros(lse.shape), out, lse)

    def error(self, results: list[mx.array]) -> float:
        """Largest error of this rank's `results` of `with_ring` as a fraction of the allowed one. Collective.

        `out` is compared with float64 in some rows. Gradients are compared with those without a ring, whose parts are
        summed over the ranks.
        """
        shape = self._problem.shape
        out, *gradients = results
        other, *others = self.without_ring()
        arrays = (self.own[0], *self.whole[1:])
        worst = max(
            sampled_error(shape, arrays, self.positions, out, None),
            distance(shape, arrays, self.positions, out, other),
        )
        if gradients:
            dk, dv = (
                self.layout.shard(self._ring.all_reduce(x.astype(mx.float32)), self._ring.rank) for x in others[1:]
            )
            worst = max(worst, *(apart(x, y) for x, y in zip(gradients, (others[0], dk, dv))))
        return worst

    def minimum_bytes(self) -> int:
        """Fewest bytes that any exchange of keys moves; see the head of this module."""
        shape = self._problem.shape
        tokens = minimum(self.layout, self.layout, Band.of(shape.causal, None))
        numbers = tokens * shape.heads[1] * 2 * shape.head_dim
        item = shape.dtype.size
        return numbers * (2 * item + 4 if self._problem.gradient else item)


def apart(x: mx.array, y: mx.array) -> float:
    """Largest difference of two gradients, as a fraction of the allowed one."""
    if x.size == 0:
        return 0.0
    ulp = {mx.float32: 0.0, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}[x.dtype]
    found, expected = (np.array(a.astype(mx.float32), np.float64) for a in (x, y))
    return float(np.abs(found - expected).max() / ((NEAR + 8 * ulp) * np.abs(expected).max()))


def measure(ring: Transport, problem: RingProblem, repeats: int) -> Record:
    """Check the answer on all ranks, then time the calls in turn. Collective; a wrong answer is not timed."""
    shape = problem.shape
    bench = "train" if problem.gradient else "ring"
    case = {"ranks": ring.size, "transport": ring.backend, **shape.case, "layout": problem.layout}
    case["strategy"] = problem.strategy or "auto"
    calls = RingCase(ring, problem)
    figures, results = _traced(ring, calls)
    errors = of_all(ring, {"error": calls.error(results)})["error"]
    del results  # the timed calls need its memory
    error = max(errors)
    if not error <= 1:
        return Record(bench, case, problem=f"{error:.3g} of the allowed error, on rank {errors.index(error)}")
    timed = {"ring": calls.with_ring, "alone": calls.without_ring, "transfers": calls.transfers}
    samples = turns({name: together(ring, call) for name, call in timed.items()}, repeats)
    figures |= _times(samples, figures.pop("waited_s"))
    work = shape.flops * (GRADIENT_FLOPS if problem.gradient else 1)
    figures |= {"tflops": work / median(samples["ring"]) / 1e12, "error": error}
    if least := calls.minimum_bytes():
        figures["sent_ratio"] = figures["sent_bytes"] / least
    return Record(bench, case, samples["ring"], figures)


def _traced(ring: Transport, calls: RingCase) -> tuple[dict[str, float], list[mx.array]]:
    """Bytes, memory and waits of the first call: of all ranks together, or of the rank with the most; its results.

    A later call reuses memory that is free, but still counted.
    """
    warm_up(ring)
    before = ring.bytes_sent
    memory = PeakMemory()
    with recorded(ring) as events:
        results = calls.with_ring()
    waited = sum(event.stop - event.start for event in events if event.kind == "wait")
    found = of_all(ring, {"sent_bytes": ring.bytes_sent - before, "peak_bytes": memory.growth(), "waited_s": waited})
    figures = {name: sum(each) if name == "sent_bytes" else max(each) for name, each in found.items()}
    return figures, results


def warm_up(ring: Transport) -> None:
    """Start threads, libraries and connections, which take memory in the first call of any size. Collective."""
    layout = Layout.zigzag(1024, ring.size)
    x = mx.random.normal((1, 1, layout.local_length(ring.rank), 64))
    with recorded(ring):
        mx.eval(mx.grad(lambda x: ring_attention(x, x, x, ring=ring, layout=layout, mask="causal").sum())(x))
    ring.barrier()


def _times(samples: dict[str, list[float]], waited: float) -> dict[str, float]:
    middle = {name: median(seconds) for name, seconds in samples.items()}
    # The two calls of one turn saw the same load.
    figures = {
        "compute_s": middle["alone"],
        "efficiency": median(alone / ring for alone, ring in zip(samples["alone"], samples["ring"])),
        "transfer_s": middle["transfers"],
        "waited_s": waited,
    }
    return figures | {"overlap": max(0.0, 1 - waited / middle["transfers"])}
