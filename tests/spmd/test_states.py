"""The states of a linear recurrence over a ring of any size are those of one process."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from ringattn import ArgumentError, Layout, Ring
from ringattn.core.affine import AffineMap, states_of_spans
from ringattn.ring.states import ChainCall, chain_inputs, chain_states

LAYOUTS = {
    "contiguous": lambda size: Layout.contiguous(40, size),
    "zigzag": lambda size: Layout.zigzag(40, size),
    "later": lambda size: Layout.contiguous(40, size, start=7),
    "one rank without tokens": lambda size: Layout(((), *Layout.contiguous(40, max(1, size - 1)).spans)[:size], 0),
}


def problem(rng: np.random.Generator, layout: Layout, matrix: bool) -> tuple[mx.array, list[tuple], list[AffineMap]]:
    """The state before the sequence, all spans with their ranks in order, and their maps."""
    spans = sorted((span, rank) for rank, held in enumerate(layout.spans) for span in held)
    state = mx.array(rng.standard_normal((2, 3, 5, 4)), mx.float32)
    shape = (2, 3, 4, 4) if matrix else (2, 3, 1, 4)
    maps = [
        AffineMap(
            mx.array(rng.standard_normal(shape) / 2, mx.float32),
            mx.array(rng.standard_normal((2, 3, 5, 4)), mx.float32),
        )
        for _ in spans
    ]
    maps[0] = AffineMap(None, maps[0].offset + (state @ maps[0].transition if matrix else state * maps[0].transition))
    return state, spans, maps


@pytest.mark.parametrize("matrix", [True, False], ids=["matrix", "decay"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_states(ring: Ring, rng: np.random.Generator, name: str, matrix: bool) -> None:
    layout = LAYOUTS[name](ring.size)
    if not layout.length:
        pytest.skip("no rank has a token")
    state, spans, maps = problem(rng, layout, matrix)
    exact = states_of_spans(state, maps, matrix)
    own = [i for i, (_, rank) in enumerate(spans) if rank == ring.rank]
    call = ChainCall("test", layout, (2, 3, 4, 4) if matrix else (2, 3, 1, 4), matrix)
    before, after = chain_states(ring, call, state, [maps[i] for i in own])
    assert mx.array_equal(after, exact[-1]).item()
    assert len(before) == len(own) and all(mx.array_equal(x, exact[i]).item() for x, i in zip(before, own))


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradient(ring: Ring, rng: np.random.Generator, name: str) -> None:
    """The gradient is that of the sum of all ranks' losses."""
    layout = LAYOUTS[name](ring.size)
    if not layout.length:
        pytest.skip("no rank has a token")
    state, spans, maps = problem(rng, layout, True)
    weights = [mx.array(rng.standard_normal(state.shape), mx.float32) for _ in range(len(spans) + 1)]
    flat = [x for step in maps for x in step if x is not None]

    def rebuilt(arrays: list[mx.array]) -> list[AffineMap]:
        given = iter(arrays)
        return [AffineMap(None if step.transition is None else next(given), next(given)) for step in maps]

    def loss_of_all(arrays: list[mx.array]) -> mx.array:
        states = states_of_spans(state, rebuilt(arrays), True)
        return sum((x * w).sum() for x, w in zip(states[:-1], weights)) + ring.size * (states[-1] * weights[-1]).sum()

    expected = mx.grad(loss_of_all)(flat)
    own = [i for i, (_, rank) in enumerate(spans) if rank == ring.rank]
    call = ChainCall("test", layout, (2, 3, 4, 4), True)
    link = mx.zeros(1)

    def loss(arrays: list[mx.array], link: mx.array) -> mx.array:
        all_maps = rebuilt(arrays)
        before, after = chain_states(ring, call, state, [all_maps[i] for i in own], (link,))
        return sum((x * weights[i]).sum() for x, i in zip(before, own)) + (after * weights[-1]).sum()

    found, _ = mx.grad(loss, argnums=(0, 1))(flat, link)
    at = [sum(1 if step.transition is None else 2 for step in maps[:i]) for i in range(len(maps) + 1)]
    for i in own:
        for x, y in zip(found[at[i] : at[i + 1]], expected[at[i] : at[i + 1]]):
            np.testing.assert_allclose(np.array(x), np.array(y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.int64], ids=["float32", "bfloat16", "int64"])
@pytest.mark.parametrize("halo", [1, 3, 16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_inputs_before_each_span(ring: Ring, rng: np.random.Generator, name: str, halo: int, dtype: mx.Dtype) -> None:
    """A halo may come from several ranks, and from before the sequence."""
    layout = LAYOUTS[name](ring.size)
    state, x = (mx.array(9 * rng.standard_normal((2, n, 5))).astype(dtype) for n in (halo, layout.length))
    whole = mx.concatenate([state, x], axis=1)
    before, after = chain_inputs(ring, "test", layout, state, layout.shard(x, ring.rank, axis=1))
    starts = [start - layout.start for start, _ in layout.spans[ring.rank]]
    assert len(before) == len(starts)
    for found, start in zip([*before, after], [*starts, layout.length]):
        assert found.dtype == dtype and mx.array_equal(found, whole[:, start : start + halo]).item()


def test_states_that_differ_between_ranks(ring: Ring, rng: np.random.Generator) -> None:
    layout = Layout.contiguous(40, ring.size)
    state, spans, maps = problem(rng, layout, True)
    call = ChainCall("test", layout, (2, 3, 4, 4), True)
    own = [maps[i] for i, (_, rank) in enumerate(spans) if rank == ring.rank]
    if ring.size == 1:
        pytest.skip("one rank")
    other = state * (2.0 if ring.rank == 1 else 1.0)
    with pytest.raises(ArgumentError, match=r"^test: states differ between ranks: of norm [\d.]+ on rank"):
        chain_states(ring, call, other, own)
    chain_states(ring, call, state, own)  # the ring still works


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=["float32", "bfloat16", "float16"])
def test_inputs_that_differ_between_ranks(ring: Ring, rng: np.random.Generator, dtype: mx.Dtype) -> None:
    if ring.size == 1:
        pytest.skip("one rank")
    layout = Layout.contiguous(40, ring.size)
    state, x = (mx.array(rng.standard_normal((1, n, 5)), dtype) for n in (3, layout.local_length(ring.rank)))
    state = ring.broadcast(state)
    with pytest.raises(ArgumentError, match=r"^test: inputs before the tokens differ between ranks: of norm [^\n]*$"):
        chain_inputs(ring, "test", layout, state * (1.125 if ring.rank == 1 else 1.0), x)
    chain_inputs(ring, "test", layout, state, x)  # the ring still works
