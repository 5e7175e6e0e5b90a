"""Machines: their rates and memory, from a table of published numbers or as the user gives them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..errors import ArgumentError
from ..lm.host_memory import parse_bytes

SUSTAINED = 0.61  # of the peak, in products of matrices: that of an M3 Ultra, 17.4 of 28.4 TFLOP/s
ATTENTION = 0.9  # of the rate of products: MLX's attention on an M3 Ultra reaches 0.87 to 0.96
STREAMED = 0.8  # of the peak of the memory's bandwidth while weights are read for a token; an assumption
WIRED = 0.75  # of the memory that macOS lets the GPU use by default on machines of 64 GB or more
MOST = 1024  # machines


@dataclass(frozen=True)
class Machine:
    """Rates of one rank.

    Attributes:
        name: Name for people.
        flops: Floating-point operations per second of products with weights.
        attention: Floating-point operations per second of attention.
        bandwidth: Bytes per second at which weights are read for a new token.
        memory: Bytes that the rank may use.
        call: Seconds of a call of the attention kernel beside its operations.
        cut: Seconds of a query token on a mask's edge beside its visible pairs.
        packed: Bytes per second at which products with many tokens rearrange the weights before they multiply, as a
            CPU's do in each round; ``None``: in no time.
        step: Seconds of a layer of a new token beside what it reads, which a row of ranks does not divide.
        keys: Bytes per second at which keys are read for a new token; ``None``: as `bandwidth`.
        source: Origin of the rates.
    """

    name: str
    flops: float
    attention: float
    bandwidth: float
    memory: float
    call: float = 0.0
    cut: float = 0.0
    packed: float | None = None
    step: float = 0.0
    keys: float | None = None
    source: str = ""

    def pack(self, weights: float) -> float:
        """Seconds in which products rearrange so many bytes of weights."""
        return 0.0 if self.packed is None else weights / self.packed


class Chip(NamedTuple):
    """Published numbers of a chip: TFLOP/s in float32 at peak, TFLOP/s of products as measured, GB/s of memory, GB."""

    peak: float
    measured: float | None
    bandwidth: float
    memory: int


# Peaks: the table of hardware in Hugging Face's huggingface.js (packages/tasks/src/hardware.ts) and, for ultras,
# Apple's press releases. Bandwidths, memories: Apple's technical specifications of the largest configuration.
CHIPS = {
    "m1": Chip(2.6, None, 68, 16),
    "m1-max": Chip(10.6, None, 400, 64),
    "m1-ultra": Chip(21.0, None, 800, 128),
    "m2": Chip(3.6, None, 100, 24),
    "m2-max": Chip(13.5, None, 400, 96),
    "m2-ultra": Chip(27.2, None, 800, 192),
    "m3-max": Chip(14.2, None, 400, 128),
    "m3-ultra": Chip(28.4, 17.4, 819, 512),  # 80 cores; products with MLX, published measurement
    "m4": Chip(4.6, None, 120, 32),
    "m4-pro": Chip(9.2, None, 273, 64),
    "m4-max": Chip(18.4, None, 546, 128),
    "m5-max": Chip(18.4, 55.0, 614, 128),  # products with the neural accelerators, published measurement
}

_SPEC = re.compile(r"(?:(?P<count>\d+)\*)?(?P<what>[^:*]+)(?::(?P<memory>[^:*]+))?")
_RATES = re.compile(r"(\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)")


def parse_machines(texts: Sequence[str]) -> list[Machine]:
    """Machines of texts such as ``4*m3-ultra:512G``, ``m1-max`` or ``2*17.4/800:96G`` (TFLOP/s / GB/s : memory).

    Raises:
        ArgumentError: A text has another form or names no chip of the table, or there are too many machines.
    """
    machines = [one for text in texts for one in _machines(text)]
    if len(machines) > MOST:
        raise ArgumentError(f"--machine: {len(machines):,} machines, expected at most {MOST:,} together")
    return machines


def _machines(text: str) -> list[Machine]:
    found = _SPEC.fullmatch(text.strip().lower())
    count = int(found["count"] or 1) if found else 0
    if found is None or not 1 <= count <= MOST:
        raise ArgumentError(f"--machine: {text!r}, expected [COUNT*]CHIP[:MEMORY] with COUNT up to {MOST}")
    memory = parse_bytes(f"--machine {text}", found["memory"].upper()) if found["memory"] else None
    return [_machine(text, found["what"], memory)] * count


def _machine(text: str, what: str, memory: int | None) -> Machine:
    if rates := _RATES.fullmatch(what):
        flops, bandwidth = (float(rate) for rate in rates.groups())
        if memory is None or not flops or not bandwidth:
            raise ArgumentError(f"--machine: {text!r}, expected rates above 0 and memory, such as 17.4/800:96G")
        return Machine(what, flops * 1e12, ATTENTION * flops * 1e12, bandwidth * 1e9, memory, source="given")
    if what not in CHIPS:
        raise ArgumentError(f"--machine: {what!r}, expected TFLOP/s/GB/s or one of {', '.join(CHIPS)}")
    chip = machine_of(what)
    return chip if memory is None else replace(chip, memory=WIRED * memory)


def machine_of(name: str) -> Machine:
    """The largest machine with a chip of `CHIPS`."""
    chip = CHIPS[name]
    flops = 1e12 * (chip.measured or SUSTAINED * chip.peak)
    source = "published measurement" if chip.measured else f"{SUSTAINED} of the published peak"
    memory = WIRED * (chip.memory << 30)
    return Machine(name, flops, ATTENTION * flops, STREAMED * 1e9 * chip.bandwidth, memory, source=source)
