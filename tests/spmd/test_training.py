"""Tests of the training helpers: a ring of any size trains like one process."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

import ringattn as ra
from ringattn import training
from ringattn.ring import loop
from ringattn.training import checkpoint, mean_loss, shard_batch, sum_gradients
from ringattn.transport import Ring

VOCABULARY, DIMS, HEADS, TOKENS = 17, 16, 2, 61


class Attention(nn.Module):
    """Attention layer of a transformer, over a ring or, without one, in this process."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(DIMS, 3 * DIMS)
        self.out = nn.Linear(DIMS, DIMS)
        self.sinks = mx.zeros(HEADS)

    def __call__(self, x: mx.array, batch: training.Batch, ring: Ring | None, layout: ra.Layout) -> mx.array:
        q, k, v = (
            part.reshape(*x.shape[:2], HEADS, DIMS // HEADS).swapaxes(1, 2)
            for part in mx.split(self.project(x), 3, axis=-1)
        )
        if ring is None:
            ids = None if batch.segments is None else (batch.segments, batch.segments)
            out = ra.attention(q, k, v, mask="causal", segments=ids, sinks=self.sinks)
        else:
            out = ra.ring_attention(
                q, k, v, ring=ring, layout=layout, mask="causal", segments=batch.segments, sinks=self.sinks
            )
        return x + self.out(out.swapaxes(1, 2).reshape(x.shape))


class Model(nn.Module):
    def __init__(self, how: str = "keep") -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, DIMS), nn.Embedding(TOKENS, DIMS)
        self.layers = [Attention() for _ in range(2)]
        self.head = nn.Linear(DIMS, VOCABULARY)
        self.how = how

    def __call__(self, batch: training.Batch, ring: Ring | None, layout: ra.Layout) -> mx.array:
        x = self.embed(batch.tokens) + self.place(batch.positions)
        for layer in self.layers:
            if self.how == "keep":
                x = layer(x, batch, ring, layout)
            else:
                wrap = checkpoint if self.how == "ours" else nn.utils.checkpoint
                x = wrap(layer, lambda x, layer=layer: layer(x, batch, ring, layout))(x)
        return self.head(x)


def model(how: str = "keep") -> Model:
    mx.random.seed(3)
    made = Model(how)
    mx.eval(made.parameters())
    return made


def data() -> tuple[mx.array, mx.array]:
    r = np.random.default_rng(0)
    ids = np.sort(r.integers(0, 4, (2, TOKENS)), 1)
    ids[:, -5:] = -1
    return mx.array(r.integers(0, VOCABULARY, (2, TOKENS))), mx.array(ids.astype(np.int32))


def step(made: Model, ring: Ring, over: Ring | None, layout: ra.Layout):
    """Compute the loss and its gradients."""
    tokens, ids = data()
    batch = shard_batch(tokens, layout, ring, segments=ids)

    def loss(made: Model) -> mx.array:
        losses = nn.losses.cross_entropy(made(batch, over, layout), batch.targets)
        return mean_loss(losses, ring, weights=batch.weights)

    value, gradients = nn.value_and_grad(made, loss)(made)
    return value, sum_gradients(gradients, ring, bucket_bytes=1000)


def alone():
    """Compute the same in this process, without the helpers."""
    tokens, ids = data()
    with ra.init("solo") as one:
        batch = shard_batch(tokens, ra.Layout.contiguous(TOKENS, 1), one, segments=ids)
        made = model()

        def loss(made: Model) -> mx.array:
            losses = nn.losses.cross_entropy(made(batch, None, ra.Layout.contiguous(TOKENS, 1)), batch.targets)
            return (losses * batch.weights).sum() / batch.weights.sum()

        return nn.value_and_grad(made, loss)(made)


@pytest.mark.parametrize("kind", ["zigzag", "lopsided", "weighted"])
def test_loss_and_gradients_are_those_of_one_process(ring: Ring, kind: str) -> None:
    spans = {
        "zigzag": lambda: ra.Layout.zigzag(TOKENS, ring.size),
        "lopsided": lambda: ra.Layout(  # the other ranks have one padding token each
            [[(0, TOKENS - ring.size + 1)], *([(TOKENS - r, TOKENS - r + 1)] for r in range(ring.size - 1, 0, -1))]
        ),
        "weighted": lambda: ra.Layout.weighted(TOKENS, range(1, ring.size + 1)),
    }
    value, gradients = step(model(), ring, ring, spans[kind]())
    expected, exact = alone()
    assert mx.allclose(value, expected, rtol=1e-6)
    for (name, got), (_, want) in zip(tree_flatten(gradients), tree_flatten(exact)):
        assert mx.allclose(got, want, rtol=1e-4, atol=1e-7), name
    assert len(set(map(float, ring.all_reduce(mx.eye(ring.size)[ring.rank] * value)))) == 1, "the same on every rank"


@pytest.mark.parametrize("how", ["ours", "mlx"])
def test_checkpoint_changes_nothing_but_memory(ring: Ring, how: str) -> None:
    layout = ra.Layout.zigzag(TOKENS, ring.size)
    value, gradients = step(model(), ring, ring, layout)
    again, recomputed = step(model(how), ring, ring, layout)
    assert mx.array_equal(value, again)
    for (name, got), (_, want) in zip(tree_flatten(recomputed), tree_flatten(gradients)):
        assert mx.allclose(got, want, rtol=1e-5, atol=1e-8), name


def test_checkpoint_does_not_run_the_ring_forward_again(ring: Ring, monkeypatch) -> None:
    runs = []
    monkeypatch.setattr(loop, "forward", lambda call, run=loop.forward: runs.append(1) or run(call))
    counts = {}
    for how in ("keep", "ours", "mlx"):
        runs.clear()
        step(model(how), ring, ring, ra.Layout.zigzag(TOKENS, ring.size))
        counts[how] = len(runs)
    assert counts == {"keep": 2, "ours": 2, "mlx": 4}


def test_a_rank_with_nothing_to_predict_takes_part(ring: Ring) -> None:
    """The weights of one rank are all 0. The gradient through its keys comes from the other ranks."""
    layout = ra.Layout.contiguous(8 * ring.size, ring.size)
    x = mx.array(np.random.default_rng(ring.rank).standard_normal((1, 2, 8, 16)).astype(np.float32))
    weights = mx.zeros((1, 2, 8, 16)) + float(ring.rank == ring.size - 1)

    def loss(x: mx.array) -> mx.array:
        return mean_loss(ra.ring_attention(x, x, x, ring=ring, layout=layout), ring, weights=weights)

    assert mx.any(mx.grad(loss)(x) != 0)


def test_no_weight_at_all_is_a_loss_of_zero(ring: Ring) -> None:
    x = mx.ones((1, 2, 8, 16)) * mx.inf
    assert mean_loss(x, ring, weights=mx.zeros(x.shape)).item() == 0


def test_batches(ring: Ring) -> None:
    tokens, ids = data()
    layout = ra.Layout.zigzag(TOKENS, ring.size)
    batch = shard_batch(tokens, layout, ring, segments=ids)
    whole = [layout.gather(x, ring, axis=1) for x in (batch.tokens, batch.targets, batch.weights, batch.segments)]
    assert mx.array_equal(whole[0], tokens) and mx.array_equal(whole[3], ids)
    assert mx.array_equal(whole[1][:, :-1], tokens[:, 1:])
    at = np.array(ids)
    same = (at[:, 1:] == at[:, :-1]) & (at[:, 1:] >= 0)
    np.testing.assert_array_equal(np.array(whole[2]), np.concatenate([same, np.zeros((2, 1))], 1))
    assert mx.array_equal(batch.positions, mx.array(layout.positions(ring.rank)))


@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
def test_sum_gradients(ring: Ring, bucket_bytes: int) -> None:
    tree = {
        "a": mx.ones((3, 5)) * ring.rank,
        "b": [mx.ones(7, mx.float16), {"c": mx.array(2.0)}],
        "d": mx.zeros((0, 4)),
    }
    total = sum_gradients(tree, ring, bucket_bytes=bucket_bytes)
    ranks = sum(range(ring.size))
    assert mx.all(total["a"] == ranks) and mx.all(total["b"][0] == ring.size) and total["b"][1]["c"] == 2 * ring.size
    assert tree_map(lambda x: (x.shape, x.dtype), total) == tree_map(lambda x: (x.shape, x.dtype), tree)


def test_wrong_input_is_heard_everywhere(ring: Ring) -> None:
    bad = mx.ones(3 if ring.rank == ring.size - 1 else 4)
    with pytest.raises(ra.ArgumentError, match="weights: shape"):
        mean_loss(mx.ones(4), ring, weights=bad)
    if ring.size > 1:
        with pytest.raises(ra.ArgumentError, match="sum_gradients: digest of the tree differs"):
            sum_gradients([bad], ring)
    with pytest.raises(ra.ArgumentError, match="tokens: 9 tokens, expected 10"):
        shard_batch(mx.zeros((1, 9), mx.int32), ra.Layout.contiguous(10, ring.size), ring)
    with pytest.raises(ra.ArgumentError, match="tokens: mlx.core.float32"):
        shard_batch(mx.zeros((1, 9)), ra.Layout.contiguous(9, ring.size), ring)
    ring.barrier()
