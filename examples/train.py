"""Train a small GPT on CPython's help texts, each sequence spread over the ranks of a ring.

    ringattn launch -n 4 -- examples/train.py --out run      # on four processes
    python examples/train.py --out alone                     # the same in one

Documents are packed into sequences of bytes. `segments` keeps them apart, and the layout is zigzag. The loss of every
step is that of one process, up to rounding. A run that is started again continues from its last checkpoint.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import sys
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import AdamW
from mlx.utils import tree_flatten, tree_unflatten

import ringattn as ra
from ringattn.training import Batch, checkpoint, mean_loss, shard_batch, sum_gradients

BYTES = 256


class Attention(nn.Module):
    def __init__(self, dims: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(dims, 3 * dims, bias=False)
        self.out = nn.Linear(dims, dims, bias=False)

    def __call__(self, x: mx.array, batch: Batch, ring: ra.Ring, layout: ra.Layout) -> mx.array:
        shape = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
        q, k, v = (y.reshape(shape).swapaxes(1, 2) for y in mx.split(self.project(x), 3, axis=-1))
        q, k = rotated(q, batch.positions), rotated(k, batch.positions)
        out = ra.ring_attention(q, k, v, ring=ring, layout=layout, mask="causal", segments=batch.segments)
        return self.out(out.swapaxes(1, 2).reshape(x.shape))


def rotated(x: mx.array, positions: mx.array) -> mx.array:
    """Rotary embedding (Su et al., arXiv 2104.09864) at any positions. `mx.fast.rope` needs consecutive ones."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * mx.exp(-mx.log(10000.0) * mx.arange(half) / half)
    cos, sin = mx.cos(angles), mx.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return mx.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


class Layer(nn.Module):
    def __init__(self, dims: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(dims, heads)
        self.before = nn.RMSNorm(dims)
        self.between = nn.RMSNorm(dims)
        self.up = nn.Linear(dims, 4 * dims, bias=False)
        self.down = nn.Linear(4 * dims, dims, bias=False)

    def __call__(self, x: mx.array, batch: Batch, ring: ra.Ring, layout: ra.Layout) -> mx.array:
        x = x + self.attention(self.before(x), batch, ring, layout)
        return x + self.down(nn.gelu(self.up(self.between(x))))


class Model(nn.Module):
    def __init__(self, dims: int, heads: int, layers: int, recompute: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, dims)
        self.layers = [Layer(dims, heads) for _ in range(layers)]
        self.last = nn.RMSNorm(dims)
        self.head = nn.Linear(dims, BYTES, bias=False)
        self.recompute = recompute

    def __call__(self, batch: Batch, ring: ra.Ring, layout: ra.Layout) -> mx.array:
        x = self.embed(batch.tokens)
        for layer in self.layers:
            run = checkpoint(layer, lambda x, layer=layer: layer(x, batch, ring, layout)) if self.recompute else layer
            x = run(x) if self.recompute else run(x, batch, ring, layout)
        return self.head(self.last(x))


def packed(step: int, batch: int, length: int) -> tuple[mx.array, mx.array]:
    """Sequences of a step ``[batch, length]`` from documents in random order, and the documents' ids."""
    random = np.random.default_rng(step)
    names = sorted(topics)
    tokens = np.zeros((batch, length), np.int32)
    ids = np.zeros((batch, length), np.int32)
    for row in range(batch):
        at = document = 0
        while at < length:
            text = topics[names[random.integers(len(names))]].encode()[: length - at]
            tokens[row, at : at + len(text)] = np.frombuffer(text, np.uint8)
            ids[row, at : at + len(text)] = document
            at += len(text)
            document += 1
    return mx.array(tokens), mx.array(ids)


class RefusedError(Exception):
    """Problem that the user has to solve; rank 0 prints it."""


def refuse(ring: ra.Ring, problem: str | None) -> None:
    """Raise `RefusedError` on all ranks where rank 0 has a problem. Collective."""
    if ring.broadcast(mx.array(problem is not None)).item():
        raise RefusedError(problem)


class Run:
    """Training run with its folder: ``checkpoint.safetensors``, ``losses.csv``, and ``losses.png`` with `plot`."""

    def __init__(self, ring: ra.Ring, model: Model, optimizer: AdamW, folder: Path, plot: bool) -> None:
        self.ring = ring
        self.model = model
        self.optimizer = optimizer
        self.folder = folder
        self.plot = plot
        self.losses: list[float] = []
        optimizer.init(model.trainable_parameters())
        self._load()

    @property
    def _file(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def _load(self) -> None:
        """Load the last checkpoint, if there is one. Rank 0 reads it and broadcasts it."""
        stored = {}
        if self.ring.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            stored = mx.load(str(self._file)) if self._file.exists() else {}
        own = {"losses": mx.zeros(0), **self._state()}
        other = bool(stored) and set(stored) != set(own)
        refuse(self.ring, f"{self._file}: holds another model; give another --out, or remove it" if other else None)
        state = {name: self.ring.broadcast((stored or own)[name] if self.ring.rank == 0 else None) for name in own}
        self.losses = state.pop("losses").tolist()
        tree = tree_unflatten(list(state.items()))
        self.model.update(tree["model"])
        self.optimizer.state = tree["optimizer"]

    def _state(self) -> dict[str, mx.array]:
        return dict(tree_flatten({"model": self.model.parameters(), "optimizer": self.optimizer.state}))

    def save(self) -> None:
        """Write a checkpoint. The old file stays until the new one is complete."""
        if self.ring.rank == 0:
            part = self._file.with_suffix(".part.safetensors")
            mx.save_safetensors(str(part), {"losses": mx.array(self.losses), **self._state()})
            os.replace(part, self._file)
            if self.plot:
                self._draw()

    def _draw(self) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4))
        axes.plot(range(1, len(self.losses) + 1), np.array(self.losses) / np.log(2))
        axes.set(xlabel="step", ylabel="loss, bits a byte", title=f"{self.ring.size} ranks")
        axes.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(self.folder / "losses.png", dpi=120)
        plt.close(figure)

    def step(self, layout: ra.Layout, rows: int) -> float:
        """Train one step. Return the loss, which is the same on every rank."""
        tokens, ids = packed(len(self.losses), rows, layout.length)
        batch = shard_batch(tokens, layout, self.ring, segments=ids)

        def loss(model: Model) -> mx.array:
            each = nn.losses.cross_entropy(model(batch, self.ring, layout), batch.targets)
            return mean_loss(each, self.ring, weights=batch.weights)

        value, gradients = nn.value_and_grad(self.model, loss)(self.model)
        self.optimizer.update(self.model, sum_gradients(gradients, self.ring))
        mx.eval(self.model.parameters(), self.optimizer.state)
        self.losses.append(value.item())
        return self.losses[-1]


class Progress:
    """Output of rank 0: ``losses.csv``, and a bar on a terminal or some lines elsewhere."""

    def __init__(self, folder: Path, losses: list[float], steps: int) -> None:
        self._file = (folder / "losses.csv").open("w", newline="")
        csv.writer(self._file).writerows(enumerate(losses, 1))
        self._steps = steps
        self._every = max(1, steps // 10)
        self._bar = click.progressbar(length=steps, label="training", item_show_func=lambda x: x and f"loss {x:.4f}")
        if losses:
            click.echo(f"going on after step {len(losses)}, loss {losses[-1]:.4f}")
            self._bar.update(len(losses))

    def step(self, number: int, loss: float) -> None:
        """Record a step."""
        csv.writer(self._file).writerow((number, loss))
        self._file.flush()
        if sys.stdout.isatty():
            self._bar.update(1, loss)
        elif number % self._every == 0 or number == self._steps:
            click.echo(f"step {number} of {self._steps}, loss {loss:.4f}")


@click.command(help=__doc__.split("\n\n")[0], context_settings={"show_default": True})
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--steps", default=200, type=click.IntRange(1), help="Steps in all, those before a restart included.")
@click.option("--tokens", default=1024, type=click.IntRange(2), help="Bytes of a sequence, over all ranks.")
@click.option("--batch", default=1, type=click.IntRange(1), help="Sequences of a step.")
@click.option("--dims", default=128, type=click.IntRange(2), help="Width of the model.")
@click.option("--heads", default=4, type=click.IntRange(1))
@click.option("--layers", default=4, type=click.IntRange(1))
@click.option("--rate", default=1e-3, type=click.FloatRange(0), help="Learning rate.")
@click.option("--recompute", is_flag=True, help="Keep only attention's results for the gradient: less memory.")
@click.option("--save-every", default=50, type=click.IntRange(1), help="Steps between checkpoints.")
@click.option("--plot", is_flag=True, help="Draw losses.png at each checkpoint; needs the extra 'plot'.")
def main(**options) -> None:
    given = SimpleNamespace(**options)
    if given.dims % (2 * given.heads):
        wrong = f"{given.dims}, expected a multiple of twice --heads {given.heads}"
        raise click.BadParameter(wrong, param_hint="--dims")
    code = 0
    with ra.init() as ring:
        try:
            train(ring, given)
        except RefusedError as error:
            code = 1
            if ring.rank == 0:
                click.echo(f"Error: {error}", err=True)
    sys.exit(code)


def train(ring: ra.Ring, given: SimpleNamespace) -> None:
    """Train from the last checkpoint to the last step."""
    missing = given.plot and importlib.util.find_spec("matplotlib") is None
    refuse(ring, "--plot: matplotlib is not installed: pip install 'ringattn[plot]'" if missing else None)
    mx.random.seed(0)
    model = Model(given.dims, given.heads, given.layers, given.recompute)
    run = Run(ring, model, AdamW(learning_rate=given.rate), given.out, given.plot)
    layout = ra.Layout.zigzag(given.tokens, ring.size)
    show = Progress(given.out, run.losses, given.steps) if ring.rank == 0 else None
    for i in range(len(run.losses), given.steps):
        loss = run.step(layout, given.batch)
        if show is not None:
            show.step(i + 1, loss)
        if (i + 1) % given.save_every == 0 or i + 1 == given.steps:
            run.save()


if __name__ == "__main__":
    main()
