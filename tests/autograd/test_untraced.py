"""Tests of computations that leave a transformation, on a GPU whose memory is the host's."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from host_network import HostGpu

from ringattn.autograd import untraced as module
from ringattn.autograd.custom_function import custom_op
from ringattn.autograd.evaluation import evaluate, start_evaluation
from ringattn.autograd.untraced import untraced
from ringattn.errors import TransformError


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> HostGpu:
    made = HostGpu()
    monkeypatch.setattr(module, "driver", lambda: made)
    return made


def op(x: mx.array, scale: mx.array, seen: list[str]) -> mx.array:
    """``scale * x ** 2``, by functions that MLX must evaluate without waiting."""

    def outside(compute: Callable[..., Sequence[mx.array]]) -> Callable[..., Sequence[mx.array]]:
        def run(*arrays: mx.array) -> Sequence[mx.array]:
            found = compute(*arrays)
            start_evaluation(*found)
            evaluate(*found)
            mx.async_eval(*(x + 1 for x in found))  # raises for traced arrays
            seen.append(threading.current_thread().name)
            return found

        return lambda *arrays: untraced(run, arrays, pytest.fail)

    forward = outside(lambda x, scale: [scale * x * x])
    backward = outside(lambda x, scale, dy, y: [2 * scale * x * dy, (x * x * dy).sum()])
    return custom_op("op", forward, [x, scale], backward)[0]


def in_other_thread(compute: Callable[..., Sequence[mx.array]], *arrays: mx.array) -> Sequence[mx.array]:
    return untraced(compute, arrays, pytest.fail)


def test_gradient_reaches_what_lies_before(gpu: HostGpu) -> None:
    """The graph before the operation stays: evaluating traced arrays elsewhere would cut it, and give zeros."""
    x, scale, seen = mx.array(np.arange(6, dtype=np.float32)), mx.array(3.0), list[str]()
    dx, dscale = mx.grad(lambda x, scale: op(mx.sin(x), scale, seen).sum(), argnums=(0, 1))(x, scale)
    s, c = np.sin(np.arange(6)), np.cos(np.arange(6))
    np.testing.assert_allclose(np.array(dx), 6 * s * c, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dscale.item(), (s * s).sum(), rtol=1e-5)
    assert all(name.startswith("ringattn") for name in seen) and len(seen) == 2
    assert gpu.copied > 0


def test_outside_it_computes_here(gpu: HostGpu) -> None:
    seen: list[str] = []
    assert op(mx.array([2.0]), mx.array(3.0), seen).item() == 12
    assert seen == [threading.current_thread().name] and gpu.copied == 0


def test_it_prepares_while_the_inputs_are_evaluated(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it starts meanwhile starts in order, once they are there."""
    original, prepared, order, started = mx.eval, threading.Event(), list[str](), list[mx.array]()

    def late(*arrays: mx.array) -> None:
        if threading.current_thread() is threading.main_thread():
            assert prepared.wait(20)
            order.append("inputs")
        original(*arrays)

    def compute(x: mx.array) -> Sequence[mx.array]:
        y, z = x * 2, x + 1
        start_evaluation(z)
        start_evaluation(y)
        order.append("prepared")
        monkeypatch.setattr(mx, "async_eval", started.append)
        prepared.set()
        evaluate(y)
        order.append("computed")
        assert started[0] is z and started[1] is y
        return [y]

    def gradient(x: mx.array) -> mx.array:
        forward = partial(in_other_thread, compute)
        return custom_op("op", forward, [x], lambda x, dy, y: [2 * dy])[0]

    monkeypatch.setattr(mx, "eval", late)
    [y], [dx] = mx.vjp(lambda x: [gradient(mx.sin(x))], [mx.array([0.5])], [mx.array([1.0])])
    assert list(dict.fromkeys(order)) == ["prepared", "inputs", "computed"]
    monkeypatch.undo()
    np.testing.assert_allclose([y.item(), dx.item()], [2 * np.sin(0.5), 2 * np.cos(0.5)], rtol=1e-6)


def test_an_error_in_the_inputs_reaches_what_waits_for_them(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = mx.eval, list[BaseException]()

    def fail(*arrays: mx.array) -> None:
        if threading.current_thread() is threading.main_thread():
            raise RuntimeError("no memory")
        original(*arrays)

    def compute(x: mx.array) -> Sequence[mx.array]:
        y = x * 2
        try:
            evaluate(y)
        except RuntimeError as error:
            seen.append(error)
            raise
        return [y]

    def gradient(x: mx.array) -> mx.array:
        forward = partial(in_other_thread, compute)
        return custom_op("op", forward, [x], lambda x, dy, y: [2 * dy])[0]

    monkeypatch.setattr(mx, "eval", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        mx.vjp(lambda x: [gradient(x)], [mx.array([0.5])], [mx.array([1.0])])
    assert len(seen) == 1


def test_compile_is_refused(gpu: HostGpu) -> None:
    with pytest.raises(TransformError):
        mx.compile(lambda x: op(x, mx.array(3.0), []))(mx.array([2.0]))


def test_an_exception_reaches_the_caller(gpu: HostGpu) -> None:
    def wrong(*_: mx.array) -> Sequence[mx.array]:
        raise OverflowError("too much")

    def gradient(x: mx.array) -> mx.array:
        return custom_op("op", lambda x: [x * 2], [x], lambda *arrays: untraced(wrong, arrays, pytest.fail))[0].sum()

    with pytest.raises(OverflowError, match="too much"):
        mx.grad(gradient)(mx.array([1.0, 2.0]))


def test_interruption_ends_the_other_thread(gpu: HostGpu) -> None:
    """As when the ring breaks because its user presses Ctrl-C."""
    stopped, told = threading.Event(), list[BaseException]()

    def endless(*_: mx.array) -> Sequence[mx.array]:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        assert stopped.wait(20)
        raise RuntimeError("ended")

    def interrupt(error: BaseException) -> None:
        told.append(error)
        stopped.set()

    def gradient(x: mx.array) -> mx.array:
        return custom_op("op", lambda x: [x * 2], [x], lambda *arrays: untraced(endless, arrays, interrupt))[0].sum()

    with pytest.raises(KeyboardInterrupt):
        mx.grad(gradient)(mx.array([1.0, 2.0]))
    assert [type(error) for error in told] == [KeyboardInterrupt]


def test_interruption_before_the_inputs_are_there_ends_the_other_thread(
    gpu: HostGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else no later computation would begin, and the process would not end."""
    submit, told = ThreadPoolExecutor.submit, list[BaseException]()

    def interrupted(*arguments: Any) -> None:
        submit(*arguments)
        raise KeyboardInterrupt

    def forward(*arrays: mx.array) -> Sequence[mx.array]:
        return untraced(lambda x: [x * 2], arrays, told.append)

    def gradient(x: mx.array) -> mx.array:
        return custom_op("op", forward, [x], lambda x, dy, y: [2 * dy])[0].sum()

    x = mx.array([1.0, 2.0])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ThreadPoolExecutor, "submit", interrupted)
        mx.grad(gradient)(x)
    assert [type(error) for error in told] == [KeyboardInterrupt]
    assert mx.grad(gradient)(x).tolist() == [2, 2]


def test_each_thread_has_another_one(gpu: HostGpu) -> None:
    """The calls of two rings, which their ranks may make in different orders, do not wait for each other."""
    both = threading.Barrier(2, timeout=20)

    def compute(x: mx.array) -> Sequence[mx.array]:
        both.wait()
        return [x * 2]

    def gradient(x: mx.array) -> mx.array:
        return custom_op("op", partial(in_other_thread, compute), [x], lambda x, dy, y: [2 * dy])[0].sum()

    def call(_: int) -> list:
        mx.set_default_stream(mx.new_stream(mx.cpu))
        return mx.grad(gradient)(mx.array([1.0, 2.0])).tolist()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(call, range(2))) == [[2, 2], [2, 2]]
