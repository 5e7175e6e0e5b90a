"""SmolLM2-135M over a ring: tokens compared with plain mlx-lm, times of prefill and decoding, memory and traffic."""

from __future__ import annotations

import sys
import time
from statistics import median

import ringattn as ra  # before MLX, for its BLAS
from ringattn import lm
from ringattn.lm.sharding.sharded_cache import held_bytes

import mlx.core as mx  # isort: skip
from mlx.utils import tree_map  # isort: skip

from .common import run_ranks, show, write_result

LENGTHS = (1, 2, 61, 500, 1999, 6000)  # tokens of a prompt
NEW = 16  # tokens of an answer
PREFILL = 2048  # tokens
HELD = 1024  # tokens per rank before decoding
STEPS = 12


def main() -> None:
    """Measure and print all four."""
    alone = run_ranks("benchmarks.lm", 1, 2, "plain")[0]
    rows = []
    for ranks in (1, 2, 3, 4):
        found = run_ranks("benchmarks.lm", ranks, max(1, 2 // ranks), "tokens")
        equal = [all(one["tokens"][i] == alone["tokens"][i] for one in found) for i in range(len(LENGTHS))]
        bytes_sent = [sum(one["bytes"][i] for one in found) for i in range(len(LENGTHS))]
        held = [max(one["cache"][i] for one in found) for i in range(len(LENGTHS))]
        for i, length in enumerate(LENGTHS):
            share = held[i] / alone["cache"][i]
            rows.append([ranks, length, "equal" if equal[i] else "DIFFER", f"{held[i] / 1e6:.1f}", f"{share:.2f}",
                         f"{bytes_sent[i] / 1e6:.1f}"])  # fmt: skip
    head = ["ranks", "prompt", f"{NEW} greedy tokens", "cache of a rank, MB", "of one process's", "sent by all, MB"]
    show("SmolLM2-135M, float32, against plain mlx-lm", head, rows)
    one, two = ([run_ranks("benchmarks.lm", ranks, 1, "prefill") for _ in range(3)] for ranks in (1, 2))
    slow, fast = (median(max(rank["seconds"] for rank in run) for run in runs) for runs in (one, two))
    show(f"Prefill of {PREFILL} tokens, one core a rank (aim: 1.80)", ["ranks", "seconds", "speed-up"],
         [[1, f"{slow:.2f}", ""], [2, f"{fast:.2f}", f"{slow / fast:.2f}"]])  # fmt: skip
    times = {ranks: [run_ranks("benchmarks.lm", ranks, 1, "decode") for _ in range(3)] for ranks in (1, 2)}
    one_s, two_s = (median(max(rank["seconds"] for rank in run) for run in times[ranks]) for ranks in (1, 2))
    show(f"Decoding, {HELD} cached tokens a rank, one core a rank (aim: 1.15)", ["ranks", "ms a token", "ratio"],
         [[1, f"{one_s * 1e3:.1f}", ""], [2, f"{two_s * 1e3:.1f}", f"{two_s / one_s:.2f}"]])  # fmt: skip


def worker() -> None:
    """Measure on one rank."""
    from pydoc_data.topics import topics

    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    mx.set_default_device(mx.cpu)
    with ra.init() as ring:
        model, tokenizer = lm.load("smollm2", mx.float32)
        mx.eval(model.parameters())
        text = mx.array(tokenizer.encode("\n\n".join(topics.values())[:40000]))
        if sys.argv[2] == "plain":
            result = {"tokens": [], "cache": []}
            for length in LENGTHS:
                cache = make_prompt_cache(model)
                steps = generate_step(text[:length], model, max_tokens=NEW, prompt_cache=cache)
                result["tokens"].append([token for token, _ in steps])
                result["cache"].append(held_bytes(cache))
            write_result(ring.rank, result)
            return
        lm.shard(model, ring)
        if sys.argv[2] == "tokens":
            result = {"tokens": [], "cache": [], "bytes": []}
            for length in LENGTHS:
                cache = make_prompt_cache(model)
                before = ring.bytes_sent
                found = lm.stream_generate(
                    model, tokenizer, text[:length], max_tokens=NEW, prompt_cache=cache, prefill_step_size=512
                )
                result["tokens"].append([response.token for response in found])
                result["cache"].append(held_bytes(cache))
                result["bytes"].append(ring.bytes_sent - before)
            write_result(ring.rank, result)
        elif sys.argv[2] == "prefill":
            write_result(ring.rank, {"seconds": _prefill(ring, model, text[:PREFILL])})
        else:
            write_result(ring.rank, {"seconds": _decode(ring, model, text)})


def _prefill(ring: ra.Ring, model, ids: mx.array) -> float:
    """Seconds of the second prefill of a whole prompt in one round."""
    for _ in range(2):
        cache = model.make_cache()
        ring.barrier()
        start = time.perf_counter()
        model(ids[None], cache=cache)
        mx.eval(tree_map(lambda c: c.state, cache))
        ring.barrier()
        seconds = time.perf_counter() - start
    return seconds


def _decode(ring: ra.Ring, model, text: mx.array) -> float:
    """Median seconds of a step with one new token."""
    cache = model.make_cache()
    times = []
    model(text[None, : HELD * ring.size], cache=cache)
    for i in range(STEPS):
        start = time.perf_counter()
        mx.eval(model(text[None, i : i + 1], cache=cache))
        times.append(time.perf_counter() - start)
    return median(times)


if __name__ == "__main__":
    worker()
