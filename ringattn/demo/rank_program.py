"""Program of each rank of the demo: ``python -m ringattn.demo.rank_program FOLDER``."""

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
from ringattn.demo.task import ProgressFile, RankResult, ReadingTask
from ringattn.lm.sharding.sharded_cache import contents, held_bytes, held_tokens

ProgressCallback = Callable[[int, int], None]


def run(task: ReadingTask, grid: ra.Grid, progress: ProgressFile) -> RankResult:
    """Read the document, answer the question, and return the result of this rank."""
    model, tokenizer = lm.load(task.model, mx.float32, grid=grid)
    ids = prompt(tokenizer, task.document)
    ring = grid.column
    callback = progress.write if grid.ring.rank == 0 else None
    if not task.plain:
        lm.shard(model, grid)
    cache = make_prompt_cache(model)
    sent = ring.bytes_sent
    responses = list(_answer(task, model, tokenizer, ids, cache, callback))
    last = responses[-1]
    return RankResult(
        rank=grid.ring.rank,
        prompt=len(ids),
        tokens=[response.token for response in responses],
        text="".join(response.text for response in responses),
        held=held_tokens(cache, ring.rank),
        contents=contents(cache),
        cache=held_bytes(cache),
        sent=ring.bytes_sent - sent,
        prompt_tps=last.prompt_tps,
        generation_tps=last.generation_tps,
    )


def _answer(
    task: ReadingTask, model: Any, tokenizer: Any, ids: list[int], cache: list, callback: ProgressCallback | None
) -> Iterator[Any]:
    """Responses of mlx-lm, by plain mlx-lm or over the ring."""
    options: dict = {"max_tokens": task.max_tokens, "prompt_cache": cache, "prompt_progress_callback": callback}
    if task.plain:
        return mlx_lm.stream_generate(model, tokenizer, ids, **options)
    return lm.stream_generate(model, tokenizer, ids, prefill_step_size=task.chunk, **options)


def main() -> None:
    """Run the task of the folder that the command line names, and write the result there."""
    folder = Path(sys.argv[1])
    task = ReadingTask.read(folder)
    with ra.init("solo" if task.plain else None) as ring:
        if ring.size != max(1, task.ranks):
            raise SystemExit(f"ringattn.demo.rank_program: started with {ring.size} ranks, expected {task.ranks}")
        with ra.grid(ring, task.tensor) as grid:
            run(task, grid, ProgressFile(folder)).write(folder)


if __name__ == "__main__":
    main()
