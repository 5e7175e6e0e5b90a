"""Wrong input on some ranks or all: every rank raises before any data moves, and the ring works afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import pytest

import ringattn as ra
from ringattn import ArgumentError, ArgumentTypeError, Layout, RingError, TransformError
from ringattn.transport import Ring

CHUNK = 4  # tokens of a rank: two chunks of two, or one of four
Call = Callable[..., Any]


def whole(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def ring_call(ring: Ring) -> tuple[Call, dict]:
    """`ring_attention` and right arguments for it."""
    layout = Layout.zigzag(CHUNK * ring.size, ring.size)
    shapes = {"q": (2, 4, layout.length, 8), "k": (2, 2, layout.length, 8), "v": (2, 2, layout.length, 8)}
    arrays = {name: layout.shard(whole(i, *shape), ring.rank) for i, (name, shape) in enumerate(shapes.items())}
    return ra.ring_attention, {**arrays, "ring": ring, "layout": layout, "mask": "causal"}


def decode_call(ring: Ring) -> tuple[Call, dict]:
    """`decode_attention` and right arguments for it."""
    _, right = ring_call(ring)
    k, v, layout = (right[name] for name in ("k", "v", "layout"))
    return ra.decode_attention, {"q": whole(9, 2, 4, 1, 8), "k": k, "v": v, "ring": ring, "kv_layout": layout}


def gather_call(ring: Ring) -> tuple[Call, dict]:
    """`Layout.gather` and right arguments for it."""
    _, right = ring_call(ring)
    return Layout.gather, {"self": right["layout"], "x": right["k"], "ring": ring, "axis": 2}


def linear_call(ring: Ring) -> tuple[Call, dict]:
    """`ring_linear_attention` and right arguments for it."""
    layout = Layout.zigzag(CHUNK * ring.size, ring.size)
    arrays = {name: layout.shard(x, ring.rank) for name, x in linear_arguments(layout.length).items()}
    return ra.ring_linear_attention, {**arrays, "ring": ring, "layout": layout}


def linear_arguments(tokens: int) -> dict[str, mx.array]:
    shapes = {"q": (2, 2, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 4, tokens, 8)}
    arrays = {name: whole(i, *shape) / 3 for i, (name, shape) in enumerate(shapes.items())}
    return {**arrays, "log_decay": -mx.abs(whole(3, 2, 4, tokens)), "beta": mx.sigmoid(whole(4, 2, 4, tokens))}


def conv_call(ring: Ring) -> tuple[Call, dict]:
    """`ring_short_conv` and right arguments for it."""
    layout = Layout.zigzag(CHUNK * ring.size, ring.size)
    x = layout.shard(whole(0, 2, layout.length, 6), ring.rank, axis=1)
    return ra.ring_short_conv, {"x": x, "weight": whole(1, 6, 4, 1), "ring": ring, "layout": layout}


CALLS = {
    "ring_attention": ring_call,
    "decode_attention": decode_call,
    "gather": gather_call,
    "ring_linear_attention": linear_call,
    "ring_short_conv": conv_call,
}


def works(ring: Ring, name: str = "ring_attention") -> None:
    """The right call of `name` gives the right answer."""
    call, right = CALLS[name](ring)
    assert mx.allclose(call(**right), expected(name, ring), atol=1e-5)


@cache
def expected(name: str, ring: Ring) -> mx.array:
    """This rank's part of the answer of one device."""
    layout = ring_call(ring)[1]["layout"]
    if name == "ring_linear_attention":
        arrays = linear_arguments(layout.length)
        q, k, v = (arrays.pop(part) for part in "qkv")
        return layout.shard(ra.linear_attention(q, k, v, **arrays), ring.rank)
    if name == "ring_short_conv":
        padded = mx.concatenate([mx.zeros((2, 3, 6)), whole(0, 2, layout.length, 6)], 1)
        return layout.shard(mx.conv1d(padded, whole(1, 6, 4, 1), groups=6), ring.rank, axis=1)
    q, k, v = (whole(i, 2, 4 if i == 0 else 2, layout.length, 8) for i in range(3))
    if name == "gather":
        return k
    if name == "decode_attention":
        return ra.attention(decode_call(ring)[1]["q"], k, v)
    return layout.shard(ra.attention(q, k, v, mask="causal"), ring.rank)


def refused(ring: Ring, call: Call, kind: type[BaseException] | tuple, *parts: str) -> str:
    """`call` raises `kind` on this rank, in one line with all of `parts`, and nothing has moved."""
    before = ring.bytes_sent
    with pytest.raises(kind) as caught:
        mx.eval(call())
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, f"{part!r} is not in {text!r}"
    assert ring.bytes_sent == before
    return text


def longer(layout: Layout) -> Layout:
    """A layout in which every rank holds one token more."""
    return layout.extend(Layout.contiguous(layout.size, layout.size, start=layout.stop))


def other_size(layout: Layout) -> Layout:
    return Layout.contiguous(layout.length, layout.size + 1)


# What is wrong on this rank alone can be seen: how the arguments change, and how the message begins and goes on

OPTIONS = {
    "mask misspelt": (lambda a: {"mask": "casual"}, "mask: 'casual'", "'causal'"),
    "mask of another shape": (lambda a: {"mask": mx.ones((3, 77))}, "mask: shape (3, 77)", "broadcasts"),
    "mask of NumPy": (lambda a: {"mask": memoryview(b"x")}, "mask: memoryview", "mx.array"),
    "window": (lambda a: {"window": 0}, "window: 0", "at least 1"),
    "softcap": (lambda a: {"softcap": -1.0}, "softcap: -1.0", "above 0"),
    "scale": (lambda a: {"scale": float("nan")}, "scale: nan", "finite"),
    "sinks": (lambda a: {"sinks": mx.zeros(3)}, "sinks: shape (3,)", "(4,)"),
    "segments": (lambda a: {"segments": (mx.zeros((2, 4)),) * 2}, "segments[0]: mlx.core.float32", "integer"),
    "return_lse": (lambda a: {"return_lse": "no"}, "return_lse: 'no'", "True or False"),
    "out_dtype": (lambda a: {"out_dtype": mx.int8}, "out_dtype: mlx.core.int8", "mx.float16"),
    "backend": (lambda a: {"backend": "gpu"}, "backend: 'gpu'", "'host'"),
    "q": (lambda a: {"q": None}, "q: NoneType", "mx.array"),
    "q, heads": (lambda a: {"q": a["q"][:, :3]}, "q: 3 heads", "multiple of the 2"),
    "k, head_dim": (lambda a: {"k": a["k"][..., :5]}, "k: head_dim 5", "8 as q"),
    "k, local length": (lambda a: {"k": a["k"][:, :, :3], "v": a["v"][:, :, :3]}, "k: 3 tokens", "4"),
    "v, length": (lambda a: {"v": a["v"][:, :, :3]}, "v: 3 tokens", "4 as k"),
    "v, dtype": (lambda a: {"v": a["v"].astype(mx.float16)}, "v: mlx.core.float16", "float32 as q"),
}

WRONG = {
    "ring_attention": {
        **OPTIONS,
        "strategy": (lambda a: {"strategy": "pass_x"}, "strategy: 'pass_x'", "'pass_kv', 'pass_q', 'gather'"),
        "q, local length": (lambda a: {"q": a["q"][:, :, :3]}, "q: 3 tokens", "4"),
        "layout of more tokens": (lambda a: {"layout": longer(a["layout"])}, "q: 4 tokens", "5"),
        "layout of another size": (
            lambda a: {"layout": other_size(a["layout"])},
            "layout: for ",
            "the size of the ring",
        ),
        "layout of another type": (lambda a: {"layout": [[(0, 4)]]}, "layout: list", "a Layout"),
        "kv_layout of more tokens": (lambda a: {"kv_layout": longer(a["layout"])}, "k: 4 tokens", "kv_layout gives"),
        "kv_layout of another size": (lambda a: {"kv_layout": other_size(a["layout"])}, "kv_layout: for "),
        "one array for two layouts": (
            lambda a: {
                "segments": mx.zeros((2, 4), mx.int32),
                "kv_layout": Layout.contiguous(4 * a["ring"].size, a["ring"].size, start=3),
            },
            "segments: array",
            "a pair",
        ),
    },
    "decode_attention": {
        **OPTIONS,
        "start": (lambda a: {"start": 1.5}, "start: 1.5", "an integer"),
        "kv_layout of more tokens": (lambda a: {"kv_layout": longer(a["kv_layout"])}, "k: 4 tokens", "5"),
        "kv_layout of another size": (lambda a: {"kv_layout": other_size(a["kv_layout"])}, "kv_layout: for "),
        "kv_layout of another type": (lambda a: {"kv_layout": None}, "kv_layout: NoneType", "a Layout"),
    },
    "gather": {
        "x": (lambda a: {"x": [1, 2]}, "x: list", "mx.array"),
        "local length": (lambda a: {"x": a["x"][:, :, 1:]}, "x: 3 tokens", "4"),
        "axis": (lambda a: {"axis": 4}, "axis: 4", "4 dimensions"),
        "axis of another type": (lambda a: {"axis": None}, "axis: None", "an integer"),
        "layout of another size": (lambda a: {"self": other_size(a["self"])}, "layout: for ", "the size of the ring"),
    },
    "ring_linear_attention": {
        "q": (lambda a: {"q": None}, "q: NoneType", "mx.array"),
        "k, heads": (lambda a: {"k": a["k"][:, :1]}, "k: shape (2, 1, 4, 8)", "(2, 2, 4, 8) as q"),
        "v, heads": (lambda a: {"v": a["v"][:, :3]}, "v: 3 heads", "multiple of the 2"),
        "log_decay": (lambda a: {"log_decay": a["log_decay"][:, :2]}, "log_decay: shape (2, 2, 4)", "(2, 4, 4, 8)"),
        "beta": (lambda a: {"beta": 1.0}, "beta: float", "mx.array"),
        "state": (lambda a: {"state": mx.zeros((2, 4, 8, 9))}, "state: shape (2, 4, 8, 9)", "(2, 4, 8, 8)"),
        "return_state": (lambda a: {"return_state": "no"}, "return_state: 'no'", "True or False"),
        "out_dtype": (lambda a: {"out_dtype": mx.int8}, "out_dtype: mlx.core.int8", "mx.float16"),
        "layout of more tokens": (lambda a: {"layout": longer(a["layout"])}, "q: 4 tokens", "5"),
        "layout of another size": (lambda a: {"layout": other_size(a["layout"])}, "layout: for ", "size of the ring"),
    },
    "ring_short_conv": {
        "x": (lambda a: {"x": a["x"][:, :, 0]}, "x: shape (2, 4)", "3 dimensions"),
        "weight": (lambda a: {"weight": mx.zeros((5, 4, 1))}, "weight: shape (5, 4, 1)", "(6, kernel, 1)"),
        "state": (lambda a: {"state": mx.zeros((2, 4, 6))}, "state: shape (2, 4, 6)", "(2, 3, 6)"),
        "layout of more tokens": (lambda a: {"layout": longer(a["layout"])}, "x: 4 tokens", "5"),
    },
}

ROWS = [(name, case) for name, cases in WRONG.items() for case in cases]


@pytest.mark.parametrize("name,case", [row for row in ROWS if row[1] not in OPTIONS or row[1].startswith("mask")])
def test_wrong_on_every_rank(ring, name, case):
    """Each rank gets the error of its own arguments (what a ring of one finds wrong is in ``tests/``)."""
    call, right = CALLS[name](ring)
    change, begin, *parts = WRONG[name][case]
    text = refused(ring, lambda: call(**{**right, **change(right)}), ArgumentError, *parts, "expected")
    assert text.startswith(begin)
    works(ring, name)


@pytest.mark.parametrize("name,case", ROWS)
def test_wrong_on_one_rank(ring, name, case):
    """The others are told whose arguments were wrong, and in which way."""
    call, right = CALLS[name](ring)
    change, begin, *parts = WRONG[name][case]
    bad = len(case) % ring.size
    wrong = change(right) if ring.rank == bad else {}
    text = refused(ring, lambda: call(**{**right, **wrong}), ArgumentError, *parts, "expected")
    assert text.startswith(begin if ring.rank == bad else f"rank {bad}: {begin}")
    works(ring, name)


@pytest.mark.parametrize("name", ["ring_attention", "decode_attention"])
def test_an_error_that_nobody_foresaw(ring, name):
    """Whatever a check runs into on one rank, the others do not wait for it."""

    class Odd(int):
        def __lt__(self, other: object) -> bool:
            raise KeyError("odd")

    call, right = CALLS[name](ring)
    bad = ring.size - 1
    if ring.rank == bad:
        refused(ring, lambda: call(**{**right, "window": Odd(3)}), KeyError, "odd")
    else:
        refused(ring, lambda: call(**right), ArgumentError, f"rank {bad}: ", "odd")
    works(ring, name)


# What differs between ranks: the arguments of rank 0 and of the others, and what the message says differs

DIFFERENT = {
    "ring_attention": {
        "scale": (lambda a: {"scale": 0.5}, lambda a: {}, "scale differs"),
        "window": (lambda a: {"window": 3}, lambda a: {"window": 4}, "window differs between ranks: 3 on rank 0, 4 on"),
        "window and none": (
            lambda a: {"window": (3, 1)},
            lambda a: {},
            "window differs between ranks: (3, 1) on rank 0",
        ),
        "mask": (
            lambda a: {"mask": None},
            lambda a: {},
            "mask differs between ranks: None on rank 0, 'causal' on rank",
        ),
        "mask and none": (
            lambda a: {"mask": "causal"},
            lambda a: {"mask": None},
            "mask differs between ranks: 'causal' on",
        ),
        "mask and array": (
            lambda a: {},
            lambda a: {"mask": mx.ones((4, a["layout"].length), mx.bool_)},
            "mask differs between ranks: 'causal' on rank 0, mlx.core.bool array of batch 1, heads 1, columns",
        ),
        "kind of mask": (
            lambda a: {"mask": mx.ones((4, a["layout"].length), mx.bool_)},
            lambda a: {"mask": mx.zeros((4, a["layout"].length))},
            "mask differs",
        ),
        "softcap": (lambda a: {"softcap": 30.0}, lambda a: {"softcap": 30.5}, "softcap differs"),
        "sinks": (lambda a: {"sinks": mx.zeros(4)}, lambda a: {}, "sinks differs"),
        "values of sinks": (
            lambda a: {"sinks": mx.array([0.0, 0, 0, 1])},
            lambda a: {"sinks": mx.array([0.0, 0, 0, 2])},
            "sinks differs",
        ),
        "segments": (lambda a: {"segments": mx.zeros((2, 4), mx.int32)}, lambda a: {}, "segments differs"),
        "dtype": (lambda a: {n: a[n].astype(mx.float16) for n in "qkv"}, lambda a: {}, "dtype differs"),
        "out_dtype": (lambda a: {"out_dtype": mx.float16}, lambda a: {}, "out_dtype differs"),
        "batch": (lambda a: {n: a[n][:1] for n in "qkv"}, lambda a: {}, "batch differs"),
        "heads of q": (lambda a: {"q": a["q"][:, :2]}, lambda a: {}, "heads of q differs"),
        "heads of k": (lambda a: {n: a[n][:, :1] for n in "kv"}, lambda a: {}, "heads of k differs"),
        "head_dim": (lambda a: {n: a[n][..., :4] for n in "qk"}, lambda a: {}, "head_dim differs"),
        "head_dim of v": (lambda a: {"v": a["v"][..., :4]}, lambda a: {}, "head_dim of v differs"),
        "strategy": (
            lambda a: {"strategy": "pass_q"},
            lambda a: {"strategy": "pass_kv"},
            "strategy differs between ranks: 'pass_q' on rank 0, 'pass_kv' on rank",
        ),
        "strategy and none": (lambda a: {"strategy": "pass_kv"}, lambda a: {}, "strategy differs"),
        "layout": (
            lambda a: {"layout": Layout.cyclic(a["layout"].length, a["layout"].size, 1)},
            lambda a: {},
            "layout differs",
        ),
        "start of a layout": (
            lambda a: {"layout": Layout.zigzag(a["layout"].length, a["layout"].size, start=1)},
            lambda a: {},
            "layout differs",
        ),
        "kv_layout": (
            lambda a: {"kv_layout": Layout.cyclic(a["layout"].length, a["layout"].size, 1)},
            lambda a: {},
            "kv_layout differs",
        ),
    },
    "decode_attention": {
        "scale": (lambda a: {"scale": 0.5}, lambda a: {}, "scale differs"),
        "window": (lambda a: {"window": 3}, lambda a: {}, "window differs between ranks: 3 on rank 0, None on"),
        "mask": (lambda a: {"mask": None}, lambda a: {}, "mask differs between ranks: None on rank 0, 'causal' on"),
        "softcap": (lambda a: {"softcap": 30.0}, lambda a: {}, "softcap differs"),
        "values of sinks": (lambda a: {"sinks": mx.zeros(4)}, lambda a: {"sinks": mx.ones(4)}, "sinks differs"),
        "start": (lambda a: {"start": 1}, lambda a: {"start": 0}, "start differs"),
        "q": (lambda a: {"q": mx.zeros((2, 4, 2, 8))}, lambda a: {}, "q differs"),
        "dtype": (lambda a: {n: a[n].astype(mx.float16) for n in "qkv"}, lambda a: {}, "q differs"),
        "heads of k": (lambda a: {n: a[n][:, :1] for n in "kv"}, lambda a: {}, "heads of k differs"),
        "head_dim of v": (lambda a: {"v": a["v"][..., :4]}, lambda a: {}, "head_dim of v differs"),
        "kv_layout": (
            lambda a: {"kv_layout": Layout.cyclic(a["kv_layout"].length, a["kv_layout"].size, 1)},
            lambda a: {},
            "kv_layout differs",
        ),
        "segments": (
            lambda a: {"segments": (mx.zeros((2, 1), mx.int32), mx.zeros((2, 4), mx.int32))},
            lambda a: {},
            "segments differs",
        ),
    },
    "gather": {
        "axis": (lambda a: {"axis": 1, "x": a["x"].swapaxes(1, 2)}, lambda a: {}, "axis differs"),
        "dtype": (lambda a: {"x": a["x"].astype(mx.int32)}, lambda a: {}, "dtype differs"),
        "shape": (lambda a: {"x": a["x"][..., :3]}, lambda a: {}, "shape of x differs"),
        "layout": (
            lambda a: {"self": Layout.cyclic(a["self"].length, a["self"].size, 1)},
            lambda a: {},
            "layout differs",
        ),
    },
    "ring_linear_attention": {
        "scale": (lambda a: {"scale": 0.5}, lambda a: {}, "scale differs"),
        "out_dtype": (lambda a: {"out_dtype": mx.float16}, lambda a: {}, "out_dtype differs"),
        "beta": (
            lambda a: {"beta": None},
            lambda a: {},
            "beta differs between ranks: None on rank 0, mlx.core.float32",
        ),
        "log_decay": (
            lambda a: {"log_decay": mx.broadcast_to(a["log_decay"][..., None], (2, 4, 4, 8))},
            lambda a: {},
            "log_decay differs between ranks: mlx.core.float32 of 4 dimensions on rank 0",
        ),
        "dtype": (lambda a: {n: a[n].astype(mx.float16) for n in "qkv"}, lambda a: {}, "dtype differs"),
        "heads of v": (
            lambda a: {n: a[n][:, :2] for n in ("v", "log_decay", "beta")},
            lambda a: {},
            "heads of v differs",
        ),
        "head_dim of v": (lambda a: {"v": a["v"][..., :4]}, lambda a: {}, "head_dim of v differs"),
        "layout": (
            lambda a: {"layout": Layout.cyclic(a["layout"].length, a["layout"].size, 1)},
            lambda a: {},
            "layout differs",
        ),
    },
    "ring_short_conv": {
        "weight": (lambda a: {"weight": a["weight"][:, :3]}, lambda a: {}, "weight differs"),
        "dtype": (lambda a: {n: a[n].astype(mx.float16) for n in ("x", "weight")}, lambda a: {}, "x differs"),
        "layout": (
            lambda a: {"layout": Layout.cyclic(a["layout"].length, a["layout"].size, 1)},
            lambda a: {},
            "layout differs",
        ),
    },
}


@pytest.mark.parametrize("name,case", [(name, case) for name, cases in DIFFERENT.items() for case in cases])
def test_different_arguments(ring, name, case):
    """All ranks get the same text, which says what differs and who gave what."""
    if ring.size == 1:
        pytest.skip("there is no other rank")
    call, right = CALLS[name](ring)
    first, others, what = DIFFERENT[name][case]
    change = (others if ring.rank else first)(right)
    others_name = "rank 1" if ring.size == 2 else "ranks 1"
    text = refused(ring, lambda: call(**{**right, **change}), ArgumentError, what, "on rank 0", f"on {others_name}")
    assert text.startswith(f"{name}: ")
    texts = {bytes(reply) for reply in ring.exchange([memoryview(text.encode())])}
    assert len(texts) == 1
    works(ring, name)


def test_what_may_differ(ring):
    """The kernel and whether to return the lse are each rank's own affair."""
    call, right = ring_call(ring)
    expected = call(**right)
    for backend in ("host", "reference"):
        out = call(**right, backend=backend if ring.rank % 2 else None, return_lse=ring.rank == 0)
        assert isinstance(out, tuple) == (ring.rank == 0)
        assert mx.allclose(out[0] if ring.rank == 0 else out, expected, atol=1e-5)


@pytest.mark.parametrize("first", CALLS)
@pytest.mark.parametrize("others", CALLS)
def test_different_calls(ring, first, others):
    if ring.size == 1 or first == others:
        pytest.skip("there is no other call")
    call, right = CALLS[others if ring.rank else first](ring)
    told = f"rank 0 called {first}", f"called {others}"
    refused(ring, lambda: call(**right), ArgumentError, *told)
    works(ring, first)
    works(ring, others)


def test_a_call_against_a_barrier(ring):
    if ring.size == 1:
        pytest.skip("there is no other rank")
    call, right = ring_call(ring)
    refused(ring, (lambda: call(**right)) if ring.rank else ring.barrier, ArgumentError, "barrier", "ring_attention")
    works(ring)


@pytest.mark.parametrize("name", ["ring_attention", "decode_attention"])
def test_an_error_and_a_difference_at_once(ring, name):
    """An error goes before a difference, and nobody waits for a second round."""
    call, right = CALLS[name](ring)
    wrong = {"scale": 0.1 * (ring.rank + 1), **({"window": 0} if ring.rank == 0 else {})}
    begin = "" if ring.rank == 0 else "rank 0: "
    refused(ring, lambda: call(**{**right, **wrong}), ArgumentError, f"{begin}window: 0, expected")
    works(ring, name)


def test_errors_on_several_ranks(ring):
    """Each has its own; those without hear of the first."""
    call, right = ring_call(ring)
    wrong = {0: {"window": -5}, 1: {"softcap": 0}}.get(ring.rank, {})
    told = {0: "window: -5", 1: "softcap: 0"}.get(ring.rank, "rank 0: window: -5")
    text = refused(ring, lambda: call(**{**right, **wrong}), ArgumentError)
    assert text.startswith(told)
    works(ring)


@pytest.mark.parametrize("kind", [ArgumentTypeError, TypeError, ValueError])
def test_a_wrong_type_is_a_type_error_where_it_happened(ring, kind):
    call, right = ring_call(ring)
    wrong = {"window": "5"} if ring.rank == 0 else {}
    refused(ring, lambda: call(**{**right, **wrong}), kind if ring.rank == 0 else ArgumentError, "window: '5'")


# Transformations

TRANSFORMS = {
    "grad": lambda f, x: mx.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: mx.vjp(f, [x], [f(x)])[1][0],
    "jvp": lambda f, x: mx.jvp(f, [x], [mx.ones_like(x)])[1][0],
    "vmap": lambda f, x: mx.vmap(f)(x[None]),
    "compile": lambda f, x: mx.compile(f)(x),
}


REFUSED = [("decode_attention", name) for name in TRANSFORMS]
NOT_OF_A_RING = ("jvp", "vmap", "compile", "second derivative")
REFUSED += [(call, name) for call in ("ring_attention", "ring_linear_attention") for name in NOT_OF_A_RING]
TRANSFORMS["second derivative"] = lambda f, x: mx.grad(lambda x: mx.grad(lambda x: f(x).sum())(x).sum())(x)


@pytest.mark.parametrize("argument", ["q", "v"])
@pytest.mark.parametrize("name,transform", REFUSED)
def test_transformations_on_every_rank(ring, name, argument, transform):
    """They are refused, never zeros; and nobody is left waiting."""
    call, right = CALLS[name](ring)
    function = lambda x: call(**{**right, argument: x})  # noqa: E731
    with pytest.raises(TransformError) as caught:
        mx.eval(TRANSFORMS[transform](function, right[argument]))
    assert name in str(caught.value) and "\n" not in str(caught.value)
    works(ring, name)


def test_a_gradient_on_one_rank(ring):
    """The others go on to something else, and all hear who is where."""
    call, right = CALLS["ring_attention"](ring)
    function = lambda x: call(**{**right, "q": x})  # noqa: E731
    if ring.size == 1:
        assert mx.any(TRANSFORMS["grad"](function, right["q"]) != 0)
    elif ring.rank == 0:
        with pytest.raises(ArgumentError, match="rank 0 called the gradient of ring_attention"):
            TRANSFORMS["grad"](function, right["q"])
    else:
        function(right["q"])
        refused(ring, lambda: call(**right), ArgumentError, "rank 0 called the gradient of ring_attention")
    works(ring)


@pytest.mark.parametrize("name,transform", [row for row in REFUSED if row[1] != "second derivative"])
def test_transformations_on_one_rank(ring, name, transform):
    """The others get their result, or hear why not."""
    call, right = CALLS[name](ring)
    function = lambda x: call(**{**right, "q": x})  # noqa: E731
    if ring.rank == 0:
        with pytest.raises(TransformError):
            mx.eval(TRANSFORMS[transform](function, right["q"]))
    else:
        if transform == "vjp":  # which calls the function twice
            function(right["q"])
        try:
            assert mx.all(mx.isfinite(function(right["q"])))
        except ArgumentError as error:
            assert str(error).startswith("rank 0: "), error  # noqa: PT017
    works(ring, name)


# Threads


@pytest.mark.parametrize("name", CALLS)
def test_a_second_thread(ring, name):
    """A ring runs one call at a time: another thread gets an error at once, and the call goes on."""
    call, right = CALLS[name](ring)
    mx.eval([x for x in right.values() if isinstance(x, mx.array)])
    errors = []

    def other() -> None:
        try:
            call(**right)
        except RingError as error:
            errors.append(str(error))

    before = ring.bytes_sent
    with ring.call("a call of the first thread"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(10)
    assert not thread.is_alive()
    assert len(errors) == 1 and name in errors[0] and "another thread" in errors[0]
    assert ring.bytes_sent == before
    works(ring, name)
