"""One rank of a way to run a language model: its answers compared, its times, memory and bytes measured.

    python -m benchmarks.rivals.lm.worker FILE MODEL WAY ATTENTION PROMPT REFERENCE

PROMPT is a number of tokens. Writes JSON to ``FILE.rank``. The first way writes the log-probabilities of the first
token to the folder REFERENCE; all others are compared with them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import ringattn as ra  # before MLX, for its BLAS
from ringattn.bench.memory import PeakMemory
from ringattn.lm.sharding.weights import evaluate_weights

import mlx.core as mx  # isort: skip
import numpy as np

from ..problem import relative_error
from ..worker import place, report
from .models import load, use_fused_attention
from .ways import Generate, Peers, prepare

assert ra
NEW = 10  # tokens of an answer
WARM = 64  # tokens of a first prompt, which is not measured
MOST = 1e-4  # difference of the log-probabilities, of the largest


def main() -> None:
    """Run one rank; leave with 1 if it failed, and do not wait for other ranks."""
    file, name, way, attention, prompt, reference = sys.argv[1:]
    rank, _ = place()
    report(file, rank, measure(name, way, attention, int(prompt), Path(reference)))


def measure(name: str, way: str, attention: str, prompt: int, reference: Path) -> Iterator[dict[str, Any]]:
    """Figures of one rank."""
    model, tokenizer, ids = load(name)
    if attention == "ringattn" and way != "ring":
        use_fused_attention(model)
    generate, peers = prepare(way, model, tokenizer)
    evaluate_weights(model)
    for _ in generate(ids[:WARM], NEW):
        pass
    yield _one(generate, peers, ids[:prompt], reference / f"{name}-{prompt}.npy")


def _one(generate: Generate, peers: Peers, ids: mx.array, expected: Path) -> dict[str, float]:
    peak = PeakMemory()
    peers.barrier()
    sent = _sent()
    times = [time.perf_counter()]
    for _, logprobs in generate(ids, NEW):
        times.append(time.perf_counter())
        if len(times) == 2:
            sent = _sent() - sent
            first = np.array(logprobs)
    peers.barrier()
    found = {"first": times[1] - times[0], "token": median(np.diff(times[2:])), "memory": peak.highest(), "sent": sent}
    if peers.rank == peers.logits_on:
        found["error"] = _error(first, expected)
    return found


def _error(found: np.ndarray, expected: Path) -> float:
    """Difference from the log-probabilities in a file, which is written if it is missing."""
    if not expected.exists():
        np.save(expected, found)
        return 0.0
    error = relative_error(found, np.load(expected))
    if not error < MOST:
        raise ValueError(f"wrong answer: log-probabilities differ by {error:.0e} of the largest")
    return error


def _sent() -> int:
    """Bytes that this host has sent over its link."""
    file = Path("/sys/class/net/eth0/statistics/tx_bytes")
    return int(file.read_text()) if file.exists() else 0


if __name__ == "__main__":
    main()
