"""What each rank of the demo runs: ``python -m ringattn.demo.worker FOLDER``."""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

import ringattn as ra
from ringattn.comm.base import Event, Ring
from ringattn.demo import smollm
from ringattn.demo.check import Sample, sample_error
from ringattn.demo.job import Figures, Job, Progress, Timeline
from ringattn.demo.memory import PeakMemory


class _Trace(list[Event]):
    """A trace that also moves the progress bar, hop by hop."""

    def __init__(self, progress: Progress, before: int):
        super().__init__()
        self._progress, self._before = progress, before

    def append(self, event: Event) -> None:
        super().append(event)
        if event.kind == "compute":
            self._progress.reach(self._before + event.hop + 1)


class Attention:
    """The attention of every layer, around the ring. Keeps a timeline and a sample of each."""

    def __init__(self, job: Job, ring: Ring, layout: ra.Layout, progress: Progress):
        self.job, self.ring, self.layout, self.progress = job, ring, layout, progress
        self.positions = layout.positions(ring.rank)
        self.timelines: list[Timeline] = []
        self.samples: list[Sample] = []

    def __call__(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Causal attention of this rank's queries over the keys of all ranks."""
        trace = _Trace(self.progress, len(self.timelines) * self.job.layer_steps)
        self.ring.barrier()  # otherwise a rank that comes late to this layer would look like a slow transfer
        self.ring.trace, start = trace, time.time()
        strategy = self.job.strategy
        result = ra.ring_attention(q, k, v, ring=self.ring, layout=self.layout, mask="causal", strategy=strategy)
        out = cast(mx.array, result)  # a pair only with return_lse
        mx.eval(out)
        stop, self.ring.trace = time.time(), None
        self.timelines.append(Timeline(start, stop, list(trace)))
        # The sample keeps k and v until the check, just as a language model would keep them in its cache.
        self.samples.append(Sample.take(q, k, v, out, self.positions, self.job.samples))
        return out


def run(job: Job, tokens: np.ndarray, ring: Ring, folder: Path) -> Figures:
    """This rank's tokens through the first layers, then the check of what came out."""
    layout, progress = ra.Layout.zigzag(job.tokens, ring.size), Progress(folder, ring.rank)
    model = smollm.load_model(Path(job.model))
    layers = [smollm.load_layer(model, index) for index in range(job.layers)]
    x = smollm.embed(model, mx.array(layout.shard(tokens, ring.rank, axis=0)))
    mx.eval(x)
    model = model._replace(tensors={})  # from here on only the layers' weights are needed
    attention = Attention(job, ring, layout, progress)

    gc.collect()
    mx.clear_cache()
    ring.barrier()
    memory, sent, start = PeakMemory(), ring.bytes_sent, time.perf_counter()
    for index, layer in enumerate(layers, 1):
        x = smollm.run_layer(model, layer, x, attention.positions, attention)
        progress.reach(index * job.layer_steps)
    ring.barrier()
    seconds, sent, growth = time.perf_counter() - start, ring.bytes_sent - sent, memory.growth()

    np.save(folder / f"hidden-{ring.rank}.npy", np.array(x))
    # Only now, as the check needs all keys on every rank.
    error = float(np.max([sample_error(sample, layout, ring) for sample in attention.samples]))
    key_bytes = 2 * model.kv_heads * model.head_dim * x.itemsize
    return Figures(ring.rank, len(attention.positions), seconds, sent, key_bytes, growth, error, attention.timelines)


def main() -> None:
    """Read the job of the folder named on the command line, run it, and leave the figures there."""
    folder = Path(sys.argv[1])
    job, tokens = Job.read(folder)
    with ra.init("solo" if job.ranks == 1 else None) as ring:
        if ring.size != job.ranks:
            raise SystemExit(f"ringattn.demo.worker: started with {ring.size} ranks, expected {job.ranks}")
        run(job, tokens, ring, folder).write(folder)


if __name__ == "__main__":
    main()
