"""Timing of the links: one hop, in which every rank sends to the right and receives from the left, and one exchange."""

from __future__ import annotations

from functools import partial
from statistics import median

from ..transport.interface import Transport
from .ranks import of_all, together
from .records import Record, Value
from .timing import turns

KEYS = ("ranks", "what", "bytes")
FIGURES = ("gb_s",)
WARM_UP = 3  # calls


def measure_hop(ring: Transport, size: int, repeats: int) -> Record:
    """Time a hop in which all ranks send `size` bytes at once, after a check that they arrive. Collective."""
    case: dict[str, Value] = {"ranks": ring.size, "transport": ring.backend, "what": "hop", "bytes": size}
    out = memoryview(_pattern(ring.rank, size))
    into = memoryview(bytearray(size))

    def hop() -> None:
        ring.wait(ring.recv([into], tag=0), ring.send(partial(list, [out]), tag=0))

    hop()
    wrong = of_all(ring, {"wrong": float(into != _pattern((ring.rank - 1) % ring.size, size))})["wrong"]
    if any(wrong):
        return Record("links", case, problem=f"other bytes arrived on rank {wrong.index(1.0)}")
    for _ in range(WARM_UP):
        together(ring, hop)()
    samples = turns({"hop": together(ring, hop), "barrier": ring.barrier}, repeats)
    # The shortest barrier: on a busy machine its median may exceed the hop's, which would leave a time of 0.
    barrier = min(samples["barrier"])
    seconds = [max(1e-9, hop - barrier) for hop in samples["hop"]]
    return Record("links", case, seconds, {"gb_s": size / median(seconds) / 1e9})


def measure_exchange(ring: Transport, size: int, repeats: int) -> Record:
    """Time a round in which every rank gives `size` bytes to all others, after a check. Collective."""
    case: dict[str, Value] = {"ranks": ring.size, "transport": ring.backend, "what": "exchange", "bytes": size}
    own = [memoryview(_pattern(ring.rank, size))]
    right = all(bytes(reply) == _pattern(rank, size) for rank, reply in enumerate(ring.exchange(own)))
    if not all(of_all(ring, {"right": float(right)})["right"]):
        return Record("links", case, problem="other bytes arrived")
    for _ in range(WARM_UP):
        ring.exchange(own)
    samples = turns({"exchange": lambda: ring.exchange(own)}, repeats)["exchange"]
    return Record("links", case, samples, {"gb_s": size * (ring.size - 1) / median(samples) / 1e9})


def _pattern(rank: int, size: int) -> bytearray:
    """Bytes that tell the rank which sends them."""
    period = bytes((rank + i) % 251 for i in range(251))
    return bytearray((period * (size // 251 + 1))[:size])
