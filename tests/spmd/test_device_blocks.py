"""Tests of blocks that stay on the GPUs, on a network whose GPUs are the hosts: schedules, slots, results, order."""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from host_network import HostGpu, HostNetwork, use_host_network
from test_gradient import check as check_gradient
from test_ring import LAYOUTS, rows_of, run

import ringattn as ra
from ringattn import backends
from ringattn.autograd import untraced
from ringattn.core.gradients import Gradients, Rows
from ringattn.core.online_softmax import State
from ringattn.errors import ArgumentError
from ringattn.kernels.interface import KernelInputs, OutputSpec
from ringattn.ring import backward, call, loop
from ringattn.ring.blocks import NOTHING, Block
from ringattn.tracing.spans import NO_TRACER, Recorder
from ringattn.transport import Ring
from ringattn.transport.mpi.ring import MpiRing
from ringattn.verify.features import FEATURES
from ringattn.verify.oracle import GradientCase, check, random_case

LONG = 1000  # rows of matrices whose product takes longer than a message


@pytest.fixture
def network(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostNetwork]:
    """The network of `ring`, which for this test has GPUs."""
    if not isinstance(ring, MpiRing) or ring.size == 1:
        pytest.skip("no other GPU")
    monkeypatch.setattr(call, "on_gpu", lambda: True)
    gpu = HostGpu(delay=0.01)
    monkeypatch.setattr(untraced, "driver", lambda: gpu)
    yield use_host_network(ring)
    ring.has_gpus = False
    ring._links = None


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q"])
def test_random_cases(ring: Ring, network: HostNetwork, kind: str, strategy: str) -> None:
    for seed in range(3):
        case = random_case(1000 * LAYOUTS.index(kind) + seed)
        out, lse, layout = run(case, ring, kind, strategy=strategy, backend="reference")
        check(case, out, lse, rows=rows_of(layout, ring.rank), what=f"{seed=} {kind} {strategy}")
    assert network.groups or kind in ("weighted", "one rank")  # all tokens may be on one rank


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q"])
def test_both_ways(both: Ring, network: HostNetwork, strategy: str) -> None:
    case = random_case(7, q_len=90, k_len=90)
    out, lse, layout = run(case, both, "zigzag", strategy=strategy, backend="reference")
    check(case, out, lse, rows=rows_of(layout, both.rank), what=strategy)
    check_gradient(GradientCase.random(case), both, "zigzag", strategy=strategy, backend="reference")
    assert network.groups


@pytest.mark.parametrize("kind", ["zigzag", "scattered", "one rank"])
@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q"])
def test_gradients(ring: Ring, network: HostNetwork, kind: str, strategy: str) -> None:
    for feature in ("causal", "everything, bfloat16", "additive mask"):
        check_gradient(GradientCase.random(FEATURES[feature]()), ring, kind, strategy=strategy, backend="reference")
    assert network.groups or kind in ("weighted", "one rank")  # all tokens may be on one rank


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q"])
def test_gradients_with_a_trace(ring: Ring, network: HostNetwork, strategy: str) -> None:
    """Then each hop is waited for, on the GPUs too."""
    ring.tracer = Recorder(events := deque[tuple](), plain=True)
    try:
        problem = GradientCase.random(FEATURES["causal"]())
        check_gradient(problem, ring, "zigzag", strategy=strategy, backend="reference")
    finally:
        ring.tracer = NO_TRACER
    assert network.groups and events


def test_other_kernels(ring: Ring, network: HostNetwork) -> None:
    """The host's kernel on one rank: all send their blocks through the hosts."""
    case = random_case(3)
    out, lse, layout = run(case, ring, "zigzag", backend="host" if ring.rank == 1 else "reference")
    check(case, out, lse, rows=rows_of(layout, ring.rank), what="mixed")
    problem = GradientCase.random(FEATURES["causal, bfloat16"]())
    for strategy in ("pass_kv", "pass_q"):
        backend = "host" if ring.rank == 1 else "reference"
        check_gradient(problem, ring, "zigzag", strategy=strategy, backend=backend)
    assert network.groups == 0


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q"])
def test_bits_repeat(ring: Ring, network: HostNetwork, strategy: str) -> None:
    case = random_case(5, q_len=300, k_len=300)
    results = [run(case, ring, "zigzag", strategy=strategy, backend="reference")[:2] for _ in range(3)]
    first, *rest = [[np.array(x.astype(mx.float32)) for x in result] for result in results]
    assert all(np.array_equal(a, b) for again in rest for a, b in zip(first, again))


def test_a_call_does_not_wait_for_its_last_hops(
    ring: Ring, network: HostNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for its keys and values, and for all hops but the last two."""
    case = replace(random_case(5, q_len=120, k_len=120), options={"mask": "causal"})
    evaluate, waits = mx.eval, []

    def counted(*arrays: mx.array) -> None:
        if arrays and sys._getframe(1).f_globals["__name__"].startswith("ringattn"):
            waits.append(arrays)
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", counted)
    out, lse, layout = run(case, ring, "zigzag", strategy="pass_kv", backend="reference")
    assert len(waits) == 1 + ring.size - 2
    monkeypatch.undo()
    check(case, out, lse, rows=rows_of(layout, ring.rank), what="zigzag")


def sum_late(inputs: KernelInputs, state: State | None = None) -> mx.array:
    """Sums of values, as a kernel that has long to do before it reads them."""
    inputs.arrive()
    ones = mx.ones((LONG, LONG))
    zero = (ones @ ones)[0, 0] * 0
    total = (inputs.v + zero).sum(axis=2, keepdims=True)
    return mx.broadcast_to(total, (*inputs.rows, total.shape[3])) + (0 if state is None else state.acc)


def state_late(self: object, inputs: KernelInputs, state: State | None = None) -> State:
    acc = sum_late(inputs, state)
    return State(acc, acc[..., 0] * 0, acc[..., 0] * 0 + 1)


def finish_late(self: object, inputs: KernelInputs, output: OutputSpec, state: State | None = None) -> tuple:
    acc = sum_late(inputs, state)
    return acc, acc[..., 0]


@pytest.mark.parametrize("ways", [False, True])
def test_a_block_waits_for_its_slot(
    ring: Ring, network: HostNetwork, monkeypatch: pytest.MonkeyPatch, ways: bool
) -> None:
    """No block arrives in memory that a kernel still has to read, in this call or in the one before."""
    if ways and ring.size == 2:
        pytest.skip("one link")
    monkeypatch.setattr(ring, "both_ways", ways)
    kernel = type(backends.select("reference"))
    monkeypatch.setattr(kernel, "forward", state_late)
    monkeypatch.setattr(kernel, "finish", finish_late)
    layout = ra.Layout.contiguous(8 * ring.size, ring.size)
    calls = []
    for n in range(3):
        v = mx.full((1, 1, 8, 8), 1.0 + ring.rank + 10 * n)
        out = ra.ring_attention(v, v, v, ring=ring, layout=layout, strategy="pass_kv", backend="reference")
        calls.append((out, 8 * sum(1.0 + rank + 10 * n for rank in range(ring.size))))
    assert [out[0, 0, 0, 0].item() for out, _ in calls] == [expected for _, expected in calls]


def backward_late(self: object, inputs: KernelInputs, rows: Rows, sums: Gradients) -> Gradients:
    """Means of the other side's values, by a kernel that prepares before its inputs are there and has long to do."""

    def mean_late(x: mx.array) -> mx.array:
        ones = mx.ones((LONG, LONG))
        return (x + (ones @ ones)[0, 0] * 0).mean(axis=2, keepdims=True)

    q, v = mean_late(inputs.q), mean_late(inputs.v)
    return Gradients(sums.q + v, sums.k + q, sums.v + q)


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q"])
def test_a_block_waits_for_the_gradients_that_stay(
    ring: Ring, network: HostNetwork, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """Those that travel leave before; the block that both are computed on stays in its slot."""
    monkeypatch.setattr(type(backends.select("reference")), "backward", backward_late)
    layout = ra.Layout.contiguous(8 * ring.size, ring.size)
    x = mx.full((1, 1, 8, 8), 1.0 + ring.rank)

    def attend(*arrays: mx.array) -> list[mx.array]:
        arrays = tuple(mx.sin(mx.arcsin(y / 100)) * 100 for y in arrays)  # evaluated in the gradient alone
        return [ra.ring_attention(*arrays, ring=ring, layout=layout, strategy=strategy, backend="reference")]

    expected = mx.full(x.shape, ring.size * (ring.size + 1) / 2)
    for _ in range(3):
        found = mx.vjp(attend, [x, x, x], [mx.ones_like(x)])[1]
        assert all(mx.allclose(dx, expected, rtol=1e-4) for dx in found)


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q"])
def test_gradients_leave_before_those_that_stay_are_computed(
    ring: Ring, network: HostNetwork, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    events: list[str] = []

    def noted(name: str, method: Callable) -> Callable:
        return lambda *arguments: events.append(name) or method(*arguments)

    monkeypatch.setattr(loop.Held, "until", noted("leave", loop.Held.until))
    monkeypatch.setattr(backward.Passing, "settle", noted("stay", backward.Passing.settle))
    monkeypatch.setattr(backward, "evaluate", noted("wait", backward.evaluate))
    monkeypatch.setattr(backward, "start_evaluation", noted("return", backward.start_evaluation))
    case = GradientCase.random(replace(random_case(5, q_len=64, k_len=64), options={"mask": "causal"}))
    check_gradient(case, ring, "zigzag", strategy=strategy, backend="reference")
    first = events.index("stay")  # a forward pass by pass-Q has states that leave
    assert events[first:] == ["stay", "wait", *(["leave", "stay"] * (ring.size - 1)), "return"]


def test_calls_one_after_the_other(ring: Ring, network: HostNetwork) -> None:
    """The next call begins before the results of the last one are there."""
    cases = [replace(random_case(seed, q_len=700, k_len=700), options={"mask": "causal"}) for seed in range(4)]
    results = [run(case, ring, "zigzag", strategy="pass_kv", backend="reference") for case in cases]
    for case, (out, lse, layout) in zip(cases, results):
        check(case, out, lse, rows=rows_of(layout, ring.rank), what="zigzag")


def test_bytes(ring: Ring, network: HostNetwork) -> None:
    """As many bytes travel as through the hosts."""
    case = random_case(11, q_len=120, k_len=120)
    sent = []
    for backend in ("reference", "host"):
        before = ring.bytes_sent
        run(case, ring, "zigzag", strategy="pass_kv", backend=backend)
        sent.append(ring.bytes_sent - before)
    assert sent[0] == 2 * sent[1]  # this network's messages are the ring's own, and count once more


def test_wrong_input_leaves_no_message(ring: Ring, network: HostNetwork) -> None:
    """Ranks post messages before they agree; those of a call that they do not agree on are dropped."""
    case = random_case(5, q_len=60, k_len=60)
    good = run(case, ring, "zigzag", strategy="pass_kv", backend="reference")[0]
    groups = network.groups
    with pytest.raises(ArgumentError, match="window differs between ranks"):
        run(case, ring, "zigzag", strategy="pass_kv", backend="reference", window=3 + ring.rank)
    with pytest.raises(ArgumentError, match="strategy: .pass_x."):
        run(case, ring, "zigzag", strategy="pass_kv" if ring.rank != 1 else "pass_x", backend="reference")
    assert network.groups == groups and ring.links is not None and not ring.links.peers
    again = run(case, ring, "zigzag", strategy="pass_kv", backend="reference")[0]
    assert mx.array_equal(good, again)


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q"])
def test_an_error_in_keys_is_one_of_all_ranks(ring: Ring, network: HostNetwork, strategy: str) -> None:
    """Keys that cannot be computed are noticed before any data move, and the ring still works."""
    layout = ra.Layout.contiguous(16 * ring.size, ring.size)
    x = mx.ones((1, 1, 16, 16))
    stream = mx.new_stream(mx.cpu)
    late = (mx.ones((LONG, LONG), stream=stream) @ mx.ones((LONG, LONG), stream=stream))[:16, :16] * 0
    singular = mx.linalg.inv(late, stream=stream).reshape(x.shape)

    def attend(k: mx.array) -> mx.array:
        return ra.ring_attention(x, k, x, ring=ring, layout=layout, strategy=strategy, backend="reference")

    with pytest.raises(RuntimeError if ring.rank == 1 else ArgumentError, match="Inverse"):
        attend(singular if ring.rank == 1 else x)
    for one in 2 * [stream, mx.default_stream(mx.default_device())]:
        with suppress(RuntimeError):  # MLX keeps the error of a CPU stream for its next work, too
            mx.synchronize(one)
    assert not ring.broken and mx.allclose(attend(x), x)


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q"])
def test_memory_is_free_when_a_call_ends(ring: Ring, network: HostNetwork, strategy: str) -> None:
    """No block lives on until Python's garbage collection, which may come much later."""
    case = GradientCase.random(random_case(5, q_len=64, k_len=64))
    check_gradient(case, ring, "zigzag", strategy=strategy, backend="reference")
    gc.collect()
    gc.disable()
    try:
        check_gradient(case, ring, "zigzag", strategy=strategy, backend="reference")
        alive = [x for x in gc.get_objects() if isinstance(x, Block) and x is not NOTHING]
    finally:
        gc.enable()
    assert not alive
