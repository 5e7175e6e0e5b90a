"""Timing of `decode_attention`: one new token against a cache that is spread over the ranks.

Pure compute is this rank's own attention to its part of the cache. Transfers are one exchange of as many bytes.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import mlx.core as mx

from ..attention import attention
from ..decode_attention import decode_attention
from ..layout import Layout
from ..transport.consensus import agree
from ..transport.interface import Transport
from .memory import PeakMemory
from .problem import AttentionShape, random_arrays, sampled_error
from .ranks import of_all, recorded, together
from .records import Record
from .ring import warm_up
from .timing import turns

KEYS = ("ranks", "tokens", "head_dim", "heads", "dtype")
FIGURES = ("compute_s", "efficiency", "transfer_s", "sent_bytes", "sent_ratio", "peak_bytes", "error")


def measure(ring: Transport, shape: AttentionShape, repeats: int) -> Record:
    """Check the answer on all ranks, then time the calls in turn. Collective; a wrong answer is not timed.

    Args:
        ring: The ring.
        shape: Problem with one query; its keys are those of all ranks.
        repeats: Number of samples.
    """
    shape = replace(shape, queries=1, causal=True)
    layout = Layout.contiguous(shape.keys, ring.size)
    q, k, v = random_arrays(shape)
    own = [mx.contiguous(layout.shard(x, ring.rank)) for x in (k, v)]
    mx.eval(own)
    case = {"ranks": ring.size, "transport": ring.backend, **shape.case}
    state_bytes = 4 * shape.heads[0] * (shape.head_dim + 2)

    def decode() -> None:
        mx.eval(decode_attention(q, *own, ring=ring, kv_layout=layout))

    def alone() -> None:
        mx.eval(attention(q, *own))

    warm_up(ring)
    figures = _traced(ring, decode)
    out, lse = decode_attention(q, *own, ring=ring, kv_layout=layout, return_lse=True)
    errors = of_all(ring, {"error": sampled_error(shape, (q, k, v), shape.positions, out, lse)})["error"]
    if not max(errors) <= 1:
        return Record("decode", case, problem=f"{max(errors):.3g} of the allowed error")
    payload = [memoryview(bytes(state_bytes))]
    timed = {"decode": decode, "alone": alone, "exchange": lambda: agree(ring, "bench decode", payload=payload)}
    for call in timed.values():
        for _ in range(5):
            together(ring, call)()
    samples = turns({"alone": timed["alone"], "decode": decode, "exchange": timed["exchange"]}, repeats)
    figures |= {
        "compute_s": median(samples["alone"]),
        "efficiency": median(a / d for a, d in zip(samples["alone"], samples["decode"])),
        "transfer_s": median(samples["exchange"]),
        "error": max(errors),
    }
    if least := ring.size * (ring.size - 1) * state_bytes:
        figures["sent_ratio"] = figures["sent_bytes"] / least
    return Record("decode", case, samples["decode"], figures)


def _traced(ring: Transport, decode) -> dict[str, float]:
    """Bytes that all ranks send to all others in one call, and the largest growth of a rank's memory."""
    ring.barrier()
    memory = PeakMemory()
    with recorded(ring) as events:
        decode()
    sent = sum(event.bytes for event in events if event.kind == "exchange") * (ring.size - 1)
    found = of_all(ring, {"sent_bytes": sent, "peak_bytes": memory.growth()})
    return {"sent_bytes": sum(found["sent_bytes"]), "peak_bytes": max(found["peak_bytes"])}
