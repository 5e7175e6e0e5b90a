"""What each rank of the demo runs: ``python -m ringattn.demo.worker FOLDER``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.models.cache import make_prompt_cache

import ringattn as ra
from ringattn import lm
from ringattn.demo.document import prompt
from ringattn.demo.job import Figures, Job, Progress
from ringattn.lm.sharding.sharded_cache import held_bytes
from ringattn.transport.base import Event, Ring

Told = Callable[[int, int], None]


class Rounds:
    """Keeps the events of the last whole round of prefill, and tells `progress` how far it is."""

    def __init__(self, ring: Ring, progress: Progress):
        self.events: list[Event] = []
        self._ring, self._progress = ring, progress
        self._done = self._longest = 0

    def __call__(self, done: int, total: int) -> None:
        if self._ring.trace and done - self._done >= self._longest:
            self.events, self._longest = self._ring.trace, done - self._done
        self._done = done
        self._ring.trace = [] if done < total else None  # events of single tokens are not kept
        if self._ring.rank == 0:
            self._progress.reach(done, total)


def run(job: Job, ring: Ring, progress: Progress) -> Figures:
    """Read, answer, and say what it took."""
    model, tokenizer = lm.load(job.model, mx.float32)
    ids, rounds = prompt(tokenizer, job.document), Rounds(ring, progress)
    if not job.plain:
        lm.shard(model, ring)
    cache = make_prompt_cache(model)
    sent = ring.bytes_sent
    responses = list(_answer(job, model, tokenizer, ids, cache, rounds))
    last = responses[-1]
    return Figures(
        ring.rank,
        len(ids),
        [one.token for one in responses],
        "".join(one.text for one in responses),
        cache[0].offset if job.plain else cache[0].layout.local_length(ring.rank),
        held_bytes(cache),
        ring.bytes_sent - sent,
        last.prompt_tps,
        last.generation_tps,
        rounds.events,
    )


def _answer(job: Job, model: Any, tokenizer: Any, ids: list[int], cache: list, told: Told) -> Iterator[Any]:
    """mlx-lm's responses, by mlx-lm alone or over the ring."""
    options: dict = {"max_tokens": job.most, "prompt_cache": cache, "prompt_progress_callback": told}
    if job.plain:
        return mlx_lm.stream_generate(model, tokenizer, ids, **options)
    return lm.stream_generate(model, tokenizer, ids, prefill_step_size=job.chunk, **options)


def main() -> None:
    """Read the job of the folder named on the command line, run it, and leave the figures there."""
    folder = Path(sys.argv[1])
    job = Job.read(folder)
    with ra.init("solo" if job.plain else None) as ring:
        if ring.size != max(1, job.ranks):
            raise SystemExit(f"ringattn.demo.worker: started with {ring.size} ranks, expected {job.ranks}")
        run(job, ring, Progress(folder)).write(folder)


if __name__ == "__main__":
    main()
