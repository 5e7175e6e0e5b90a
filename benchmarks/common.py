"""Functions that several benchmarks use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np

from ringattn.bench.timing import medians
from ringattn.reporting.tables import format_table

__all__ = ["chunk_of", "medians", "run_ranks", "sampled_error", "show", "small_llama", "write_result"]

ROOT = Path(__file__).resolve().parent.parent


def small_llama(layers: int) -> dict[str, Any]:
    """Configuration of a Llama for mlx-lm with the hidden size of SmolLM2-135M and `layers` layers."""
    return {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": layers,
        "intermediate_size": 1536,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": 4096,
    }


def chunk_of(name: str, start: int, stop: int, heads: int, dim: int) -> np.ndarray:
    """Tokens ``start:stop`` of a random sequence `name`, float32 ``[heads, tokens, dim]``, the same on any rank."""
    step = 1024
    pieces = []
    for first in range(start - start % step, stop, step):
        random = np.random.default_rng([sum(map(ord, name)), first])
        piece = random.standard_normal((heads, step, dim), np.float32)
        pieces.append(piece[:, max(0, start - first) : stop - first])
    return np.concatenate(pieces, 1)


def sampled_error(
    out: np.ndarray, positions: np.ndarray, tokens: int, dim: int, *, causal: bool, rows: int = 4
) -> float:
    """Largest error of some rows of `out` ``[heads, local tokens, dim]`` against float64, with keys in chunks."""
    heads = out.shape[0]
    picked = np.linspace(0, len(positions) - 1, rows).astype(int)
    at = positions[picked]
    q = np.stack([chunk_of("q", p, p + 1, heads, dim)[:, 0] for p in at], 1).astype(np.float64)
    total = np.zeros((heads, rows, 1))
    acc = np.zeros((heads, rows, dim))
    for start in range(0, tokens, 1024):
        stop = min(start + 1024, tokens)
        k, v = (chunk_of(name, start, stop, heads, dim).astype(np.float64) for name in "kv")
        weights = np.exp(q @ k.swapaxes(1, 2) * dim**-0.5)  # scores of normal numbers are small: no maximum needed
        if causal:
            weights *= np.arange(start, stop) <= at[:, None]
        total += weights.sum(-1, keepdims=True)
        acc += weights @ v
    return float(np.abs(acc / total - out[:, picked]).max())


def run_ranks(
    module: str,
    ranks: int,
    threads: int,
    *arguments: object,
    expect_failure: bool = False,
    hosts: Sequence[str] = (),
    base: Mapping[str, str] = os.environ,
) -> list | None:
    """Run ``python -m module FILE *arguments`` on ranks. Return the JSON that each rank wrote to ``FILE.rank``.

    Args:
        module: Module to run.
        ranks: Number of ranks.
        threads: Threads of each rank.
        arguments: Further arguments of the module.
        expect_failure: Whether the ranks may fail.
        hosts: Hosts of the ranks, one rank on each, with this machine's disk; empty: this machine.
        base: Environment of the ranks.

    Returns:
        Results of the ranks; ``None`` if they failed and `expect_failure` is set.
    """
    with tempfile.TemporaryDirectory() as folder:
        worker = [sys.executable, "-m", module, str(Path(folder) / "result"), *map(str, arguments)]
        line = worker
        if ranks > 1 or hosts:
            where = ["--hosts", ",".join(hosts)] if hosts else []
            launch = [sys.executable, "-m", "ringattn.cli", "launch", "-n", str(ranks), *where]
            line = [*launch, "--threads", str(threads), "--", *worker]
        environment = {**base, "RINGATTN_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            if expect_failure:
                return None
            raise RuntimeError(f"{' '.join(line)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return [json.loads(Path(f"{folder}/result.{rank}").read_text()) for rank in range(ranks)]


def write_result(rank: int, result: object) -> None:
    """Write the result of a worker that `run_ranks` started."""
    Path(f"{sys.argv[1]}.{rank}").write_text(json.dumps(result))


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table."""
    print(f"\n{title}")
    print(indent(format_table(head, [list(map(str, row)) for row in rows], align=">"), "  "), flush=True)
