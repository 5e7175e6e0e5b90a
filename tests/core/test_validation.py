"""Wrong arguments of functions that need no ring. The error is one line: argument, value, expectation.

Tests of wrong arguments on several ranks are in ``spmd/test_wrong_input.py``.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import ringattn as ra
from ringattn import ArgumentError, ArgumentTypeError, Layout

NAN, INF = float("nan"), float("inf")


def rejects(call, name: str, *parts: str, kind: type[ArgumentError] = ArgumentError) -> None:
    """Check that `call` raises `kind` with one line that begins with `name` and contains all `parts`."""
    with pytest.raises(ArgumentError) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is kind, f"{type(caught.value).__name__}: {text}"
    assert "\n" not in text and len(text) < 400
    assert text.startswith(name), text
    for part in parts:
        assert part in text, f"{part!r} is not in {text!r}"


def x(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.zeros(shape, dtype)


class TwoLines:
    def __repr__(self) -> str:
        return "two\nlines"


# attention

RIGHT = {"q": x(2, 4, 5, 8), "k": x(2, 2, 7, 8), "v": x(2, 2, 7, 6)}
SEGMENTS = x(2, 5, dtype=mx.int32), x(2, 7, dtype=mx.int32)

VALUES = [  # the argument, its value, parts of the message
    ("q", {"q": x(4, 5, 8)}, "(4, 5, 8)", "4 dimensions"),
    ("q", {"q": mx.array(1.0)}, "()", "4 dimensions"),
    ("k", {"k": x(2, 2, 7, 8, 1)}, "(2, 2, 7, 8, 1)", "4 dimensions"),
    ("v", {"v": x(7, 6)}, "(7, 6)", "4 dimensions"),
    ("q", {"q": x(2, 5, 5, 8)}, "5 heads", "multiple of the 2"),
    ("q", {"q": x(2, 1, 5, 8)}, "1 heads", "multiple of the 2"),
    ("q", {"q": x(2, 0, 5, 8)}, "0 heads", "multiple of the 2"),
    ("q", {"k": x(2, 0, 7, 8), "v": x(2, 0, 7, 6)}, "4 heads", "0 heads of k"),
    ("k", {"k": x(2, 2, 7, 16)}, "head_dim 16", "8 as q"),
    ("k", {"q": x(2, 4, 5, 0), "k": x(2, 2, 7, 0)}, "head_dim 0", "at least 1"),
    ("k", {"k": x(3, 2, 7, 8)}, "batch 3", "2 as q"),
    ("v", {"v": x(1, 2, 7, 6)}, "batch 1", "2 as q"),
    ("v", {"v": x(2, 4, 7, 6)}, "4 heads", "2 as k"),
    ("v", {"v": x(2, 2, 8, 6)}, "8 tokens", "7 as k"),
    ("window", {"window": 0}, "0", "at least 1"),
    ("window", {"window": -3}, "-3", "at least 1"),
    ("window", {"window": (-1, 2)}, "(-1, 2)", "at least 0"),
    ("window", {"window": [4, -2]}, "(4, -2)", "at least 0"),
    ("softcap", {"softcap": 0}, "0", "above 0"),
    ("softcap", {"softcap": -30.0}, "-30.0", "above 0"),
    ("softcap", {"softcap": NAN}, "nan", "finite"),
    ("softcap", {"softcap": INF}, "inf", "finite"),
    ("scale", {"scale": NAN}, "nan", "finite"),
    ("scale", {"scale": -INF}, "-inf", "finite"),
    ("sinks", {"sinks": x(2)}, "(2,)", "(4,)"),
    ("sinks", {"sinks": x(4, 1)}, "(4, 1)", "(4,)"),
    ("sinks", {"sinks": mx.array(0.0)}, "()", "(4,)"),
    ("mask", {"mask": "casual"}, "'casual'", "'causal'"),
    ("mask", {"mask": ""}, "''", "'causal'"),
    ("mask", {"mask": "two\nlines"}, "'causal'"),
    ("mask", {"mask": x(5, 8)}, "(5, 8)", "broadcasts to (2, 4, 5, 7)"),
    ("mask", {"mask": x(2, 2, 5, 7)}, "(2, 2, 5, 7)", "broadcasts to (2, 4, 5, 7)"),
    ("mask", {"mask": x(1, 1, 1, 5, 7)}, "(1, 1, 1, 5, 7)", "broadcasts to (2, 4, 5, 7)"),
    ("mask", {"mask": x(0, 7)}, "(0, 7)", "broadcasts to (2, 4, 5, 7)"),
    ("offset", {"offset": 2, "positions": (range(5), range(7))}, "2 together with positions", "one of the two"),
    ("offset", {"offset": 2**31}, str(2**31), "32 bits"),
    ("offset", {"offset": -(2**31) - 1}, str(-(2**31) - 1), "at least"),
    ("offset", {"offset": 2**31 - 3}, str(2**31 - 3), "int32"),
    ("positions[0]", {"positions": ([4, 3, 2, 1, 0], range(7))}, "not ascending", "ascending"),
    ("positions[1]", {"positions": (range(5), mx.array([0, 1, 2, 3, 4, 6, 5]))}, "not ascending", "ascending"),
    ("positions[0]", {"positions": (range(4), range(7))}, "(4,)", "(5,)"),
    ("positions[1]", {"positions": (range(5), np.zeros((7, 1), np.int32))}, "(7, 1)", "(7,)"),
    ("positions[0]", {"positions": ([0, 1, 2, 3, 2**31], range(7))}, str(2**31), "int32"),
    ("positions[1]", {"positions": (range(5), [-(2**40), *range(6)])}, "int32"),
    ("segments[0]", {"segments": (x(2, 6, dtype=mx.int32), SEGMENTS[1])}, "(2, 6)", "(2, 5)"),
    ("segments[1]", {"segments": (SEGMENTS[0], x(7, dtype=mx.int32))}, "(7,)", "(2, 7)"),
    ("segments[1]", {"segments": (SEGMENTS[0], x(1, 7, dtype=mx.int32))}, "(1, 7)", "(2, 7)"),
    ("segments[1]", {"segments": (SEGMENTS[0], mx.full((2, 7), 2**32, dtype=mx.int64))}, str(2**32), "int32"),
    ("segments[0]", {"segments": (mx.full((2, 5), 2**31, dtype=mx.uint32), SEGMENTS[1])}, str(2**31), "int32"),
    ("backend", {"backend": "gpu"}, "'gpu'", "'host'", "'reference'"),
    ("backend", {"backend": 3}, "3", "'host'"),
    ("backend", {"backend": ["host"]}, "['host']", "'reference'"),
]

TYPES = [
    ("q", {"q": np.zeros((2, 4, 5, 8), np.float32)}, "ndarray", "mx.array"),
    ("k", {"k": [[1.0]]}, "list", "mx.array"),
    ("v", {"v": None}, "NoneType", "mx.array"),
    ("q", {"q": 1.0}, "float", "mx.array"),
    ("k", {"k": x(2, 2, 7, 8, dtype=mx.float16)}, "float16", "float32 as q"),
    ("v", {"v": x(2, 2, 7, 6, dtype=mx.bfloat16)}, "bfloat16", "float32 as q"),
    ("q", {"q": x(2, 4, 5, 8, dtype=mx.int32)}, "int32", "float16, bfloat16 or float32"),
    ("k", {"k": x(2, 2, 7, 8, dtype=mx.uint8)}, "uint8", "float16, bfloat16 or float32"),
    ("v", {"v": x(2, 2, 7, 6, dtype=mx.complex64)}, "complex64", "float16, bfloat16 or float32"),
    ("window", {"window": 2.0}, "2.0", "an int, a pair"),
    ("window", {"window": True}, "True", "an int, a pair"),
    ("window", {"window": "5"}, "'5'", "an int, a pair"),
    ("window", {"window": (1, 2, 3)}, "(1, 2, 3)", "a pair"),
    ("window", {"window": (1, None)}, "(1, None)", "a pair of ints"),
    ("window", {"window": np.ones((3, 3), int)}, "(3, 3)", "an int, a pair"),
    ("softcap", {"softcap": "30"}, "'30'", "a number"),
    ("softcap", {"softcap": mx.ones((2, 2))}, "(2, 2)", "a number"),
    ("scale", {"scale": True}, "True", "a number"),
    ("scale", {"scale": mx.ones((3, 3))}, "(3, 3)", "a number"),
    ("scale", {"scale": [1.0] * 500}, "[1.0, 1.0", "a number"),
    ("scale", {"scale": TwoLines()}, "two lines", "a number"),
    ("sinks", {"sinks": [0.0] * 4}, "list", "mx.array"),
    ("sinks", {"sinks": np.zeros(4, np.float32)}, "ndarray", "mx.array"),
    ("sinks", {"sinks": x(4, dtype=mx.int32)}, "int32", "float16, bfloat16 or float32"),
    ("mask", {"mask": np.ones((5, 7), bool)}, "ndarray", "mx.array"),
    ("mask", {"mask": True}, "bool", "mx.array"),
    ("mask", {"mask": x(5, 7, dtype=mx.int32)}, "int32", "bool, float16"),
    ("mask", {"mask": x(5, 7, dtype=mx.uint8)}, "uint8", "bool, float16"),
    ("offset", {"offset": 1.0}, "1.0", "an integer"),
    ("offset", {"offset": mx.array(1)}, "array", "an integer"),
    ("positions", {"positions": mx.arange(5)}, "array", "a pair"),
    ("positions", {"positions": (range(5),)}, "tuple", "a pair"),
    ("positions[0]", {"positions": (5, range(7))}, "int", "positions"),
    ("positions[0]", {"positions": ("01234", range(7))}, "str", "positions"),
    ("positions[0]", {"positions": ([0.5, 1, 2, 3, 4], range(7))}, "float64", "int32"),
    ("positions[1]", {"positions": (range(5), mx.arange(7).astype(mx.float32))}, "float32", "int32"),
    ("positions[1]", {"positions": (range(5), mx.arange(7).astype(mx.bfloat16))}, "bfloat16", "int32"),
    ("segments", {"segments": SEGMENTS[0]}, "array", "a pair"),
    ("segments", {"segments": (*SEGMENTS, SEGMENTS[0])}, "tuple", "a pair"),
    ("segments[0]", {"segments": (np.zeros((2, 5), int), SEGMENTS[1])}, "ndarray", "mx.array"),
    ("segments[1]", {"segments": (SEGMENTS[0], None)}, "NoneType", "mx.array"),
    ("segments[0]", {"segments": (x(2, 5), SEGMENTS[1])}, "float32", "integer"),
    ("segments[1]", {"segments": (SEGMENTS[0], x(2, 7, dtype=mx.bool_))}, "bool", "integer"),
    ("return_lse", {"return_lse": 1}, "1", "True or False"),
    ("return_lse", {"return_lse": None}, "None", "True or False"),
    ("out_dtype", {"out_dtype": mx.int32}, "int32", "mx.float16"),
    ("out_dtype", {"out_dtype": "float16"}, "'float16'", "mx.float16"),
    ("out_dtype", {"out_dtype": np.float16}, "numpy.float16", "mx.float16"),
]


@pytest.mark.parametrize("name,wrong,parts", [(name, wrong, parts) for name, wrong, *parts in VALUES])
def test_attention_values(name, wrong, parts):
    rejects(lambda: ra.attention(**{**RIGHT, **wrong}), f"{name}: ", *parts, "expected")


@pytest.mark.parametrize("name,wrong,parts", [(name, wrong, parts) for name, wrong, *parts in TYPES])
def test_attention_types(name, wrong, parts):
    rejects(lambda: ra.attention(**{**RIGHT, **wrong}), f"{name}: ", *parts, "expected", kind=ArgumentTypeError)


def test_what_the_tables_start_from_is_right():
    assert ra.attention(**RIGHT, segments=SEGMENTS, mask="causal", window=2, sinks=x(4)).shape == (2, 4, 5, 6)


def test_nothing_is_evaluated_before_the_checks():
    """Errors must not wait for a computation, nor fail under a trace. So messages do not show values of arrays."""

    def function(scale: mx.array) -> mx.array:
        return ra.attention(**RIGHT, scale=scale)

    rejects(lambda: mx.compile(function)(mx.array(1.0)), "scale: ", "array", "expected", kind=ArgumentTypeError)


def test_one_except_catches_all():
    for base in (ra.RingAttentionError, ValueError):
        with pytest.raises(base):
            ra.attention(**RIGHT, window=0)
        with pytest.raises(base):
            ra.attention(**RIGHT, window="0")
    with pytest.raises(TypeError):
        ra.attention(**RIGHT, window="0")


# Layout

CONTIGUOUS, EMPTY = Layout.contiguous(5, 2), Layout([[], []])

LAYOUT_VALUES = {
    "no rank": (lambda: Layout([]), "spans", "no rank", "at least one"),
    "a span descends": (lambda: Layout([[(4, 2)]]), "spans[0]", "(4, 2)", "start <= stop"),
    "spans descend": (lambda: Layout([[(4, 6), (0, 4)]]), "spans[0]", "(0, 4)", "(4, 6)", "ascending"),
    "spans of a rank overlap": (lambda: Layout([[], [(0, 4), (3, 6)]]), "spans[1]", "(3, 6)", "overlap", "ascending"),
    "spans of two ranks overlap": (lambda: Layout([[(0, 4)], [(3, 6)]]), "spans", "(3, 6)", "overlap", "exactly once"),
    "spans of two ranks are equal": (
        lambda: Layout([[(0, 4)], [(0, 4)]]),
        "spans",
        "(0, 4)",
        "overlap",
        "exactly once",
    ),
    "a gap": (lambda: Layout([[(0, 2)], [(3, 6)]]), "spans", "(3, 6)", "gap", "exactly once"),
    "a gap in one rank": (lambda: Layout([[(0, 2), (3, 6)]]), "spans", "(3, 6)", "gap", "exactly once"),
    "another start": (lambda: Layout([[(2, 4)]], 0), "start", "0", "2"),
    "a position of 33 bits": (lambda: Layout([[(0, 2**31)]]), "spans[0]", str(2**31), "32 bits"),
    "contiguous, n": (lambda: Layout.contiguous(-1, 2), "n", "-1", "at least 0"),
    "contiguous, size": (lambda: Layout.contiguous(4, 0), "size", "0", "at least 1"),
    "contiguous, the end": (lambda: Layout.contiguous(10, 1, start=2**31 - 5), "spans[0]", str(2**31 + 5), "32 bits"),
    "zigzag, n": (lambda: Layout.zigzag(-4, 2), "n", "-4", "at least 0"),
    "zigzag, size": (lambda: Layout.zigzag(4, -2), "size", "-2", "at least 1"),
    "cyclic, n": (lambda: Layout.cyclic(-4, 2, 1), "n", "-4", "at least 0"),
    "cyclic, size": (lambda: Layout.cyclic(4, 0, 1), "size", "0", "at least 1"),
    "cyclic, chunk": (lambda: Layout.cyclic(4, 2, 0), "chunk", "0", "at least 1"),
    "weighted, n": (lambda: Layout.weighted(-4, [1]), "n", "-4", "at least 0"),
    "a negative weight": (lambda: Layout.weighted(4, [1, -0.5]), "weights", "-0.5", "at least 0"),
    "a weight of NaN": (lambda: Layout.weighted(4, [1, NAN]), "weights", "nan", "finite"),
    "an infinite weight": (lambda: Layout.weighted(4, [1, INF]), "weights", "inf", "finite"),
    "no weight above 0": (lambda: Layout.weighted(4, [0, 0.0]), "weights", "[0, 0.0]", "above 0"),
    "no weight": (lambda: Layout.weighted(4, []), "weights", "[]", "above 0"),
    "rank": (lambda: CONTIGUOUS.positions(2), "rank", "2", "less than 2"),
    "rank below 0": (lambda: CONTIGUOUS.local_length(-1), "rank", "-1", "at least 0"),
    "shard, rank": (lambda: CONTIGUOUS.shard(x(1, 1, 5, 1), 7), "rank", "7", "less than 2"),
    "shard, axis": (lambda: CONTIGUOUS.shard(x(1, 1, 5, 1), 0, axis=4), "axis", "4", "4 dimensions"),
    "shard, axis below": (lambda: CONTIGUOUS.shard(x(5, 1), 0, axis=-3), "axis", "-3", "2 dimensions"),
    "shard, a scalar": (lambda: CONTIGUOUS.shard(mx.array(1), 0, axis=0), "axis", "0", "0 dimensions"),
    "shard, length": (lambda: CONTIGUOUS.shard(x(1, 1, 6, 1), 0), "x", "6 tokens", "expected 5"),
    "shard, wrong axis": (lambda: CONTIGUOUS.shard(x(1, 5, 6, 1), 0), "x", "6 tokens on axis 2", "expected 5"),
    "shard, nothing": (lambda: EMPTY.shard(x(1, 1, 6, 1), 0), "x", "6 tokens", "expected 0"),
    "unshard, count": (lambda: CONTIGUOUS.unshard([x(1, 1, 3, 1)]), "parts", "1 arrays", "expected 2"),
    "unshard, length": (
        lambda: CONTIGUOUS.unshard([x(1, 1, 3, 1), x(1, 1, 3, 1)]),
        "parts[1]",
        "3 tokens",
        "expected 2",
    ),
    "unshard, axis": (lambda: CONTIGUOUS.unshard([x(3), x(2)]), "axis", "2", "1 dimensions"),
    "extend, size": (lambda: CONTIGUOUS.extend(Layout.contiguous(1, 3, start=5)), "other", "3 ranks", "expected 2"),
    "extend, start": (
        lambda: CONTIGUOUS.extend(Layout.contiguous(1, 2, start=4)),
        "other",
        "starts at 4",
        "expected 5",
    ),
    "extend, no start": (lambda: CONTIGUOUS.extend(EMPTY), "other", "starts at 0", "expected 5"),
}

LAYOUT_TYPES = {
    "no spans": (lambda: Layout(None), "spans", "None", "a sequence"),
    "a number for a rank": (lambda: Layout([3]), "spans[0]", "3", "a sequence"),
    "a span for a rank": (lambda: Layout([(0, 4)]), "spans[0]", "0", "a pair"),
    "a triple": (lambda: Layout([[(0, 4, 1)]]), "spans[0]", "(0, 4, 1)", "a pair"),
    "a float": (lambda: Layout([[], [(0, 4.0)]]), "spans[1]", "4.0", "an integer"),
    "start": (lambda: Layout([[]], "0"), "start", "'0'", "an integer"),
    "n": (lambda: Layout.contiguous(4.0, 2), "n", "4.0", "an integer"),
    "n of an array": (lambda: Layout.zigzag(np.ones((2, 2)), 2), "n", "(2, 2)", "an integer"),
    "size": (lambda: Layout.zigzag(4, True), "size", "True", "an integer"),
    "chunk": (lambda: Layout.cyclic(4, 2, None), "chunk", "None", "an integer"),
    "weights": (lambda: Layout.weighted(4, 3), "weights", "3", "a sequence"),
    "a weight": (lambda: Layout.weighted(4, [1, "2"]), "weights", "'2'", "a number"),
    "a weight of two": (lambda: Layout.weighted(4, np.ones((2, 2))), "weights", "(2,)", "a number"),
    "rank": (lambda: CONTIGUOUS.positions(0.0), "rank", "0.0", "an integer"),
    "x": (lambda: CONTIGUOUS.shard([1, 2, 3, 4, 5], 0, axis=0), "x", "list", "mx.array or a NumPy array"),
    "axis": (lambda: CONTIGUOUS.shard(x(5), 0, axis=0.0), "axis", "0.0", "an integer"),
    "parts": (lambda: CONTIGUOUS.unshard(3), "parts", "3", "a sequence"),
    "a part": (lambda: CONTIGUOUS.unshard([x(3), [1, 2]], axis=0), "parts[1]", "list", "mx.array or a NumPy array"),
    "other": (lambda: CONTIGUOUS.extend([[(5, 6)], []]), "other", "[[(5, 6)], []]", "a Layout"),
}


@pytest.mark.parametrize("case", LAYOUT_VALUES)
def test_layout_values(case):
    call, name, *parts = LAYOUT_VALUES[case]
    rejects(call, f"{name}: ", *parts, "expected")


@pytest.mark.parametrize("case", LAYOUT_TYPES)
def test_layout_types(case):
    call, name, *parts = LAYOUT_TYPES[case]
    rejects(call, f"{name}: ", *parts, "expected", kind=ArgumentTypeError)


# merge

PARTIAL = x(1, 2, 3, 4), x(1, 2, 3)

MERGE_VALUES = {
    "none": (lambda: ra.merge(), "partials", "none", "at least one"),
    "lse of another shape": (lambda: ra.merge((PARTIAL[0], x(1, 2, 4))), "partials[0]", "(1, 2, 4)", "last axis"),
    "lse with a last axis": (lambda: ra.merge((PARTIAL[0], x(1, 2, 3, 1))), "partials[0]", "(1, 2, 3, 1)", "last axis"),
    "a scalar": (lambda: ra.merge((mx.array(1.0), mx.array(1.0))), "partials[0]", "()", "last axis"),
    "another shape": (
        lambda: ra.merge(PARTIAL, (x(1, 2, 5, 4), x(1, 2, 5))),
        "partials[1]",
        "(1, 2, 5, 4)",
        "(1, 2, 3, 4)",
    ),
    "another head_dim": (lambda: ra.merge(PARTIAL, (x(1, 2, 3, 8), PARTIAL[1])), "partials[1]", "(1, 2, 3, 8)"),
    "another dtype": (
        lambda: ra.merge(PARTIAL, PARTIAL, (PARTIAL[0].astype(mx.float16), PARTIAL[1])),
        "partials[2]",
        "float16",
        "float32, as in partials[0]",
    ),
}

MERGE_TYPES = {
    "an array": (lambda: ra.merge(PARTIAL[0]), "partials[0]", "array", "a pair"),
    "a list of partials": (lambda: ra.merge([PARTIAL, PARTIAL, PARTIAL]), "partials[0]", "list", "a pair"),
    "nothing": (lambda: ra.merge(PARTIAL, None), "partials[1]", "NoneType", "a pair"),
    "NumPy": (lambda: ra.merge(tuple(map(np.array, PARTIAL))), "partials[0]", "ndarray", "mx.array"),
    "integers": (lambda: ra.merge((PARTIAL[0].astype(mx.int32), PARTIAL[1])), "partials[0]", "int32", "float16"),
    "lse in half": (lambda: ra.merge((PARTIAL[0], PARTIAL[1].astype(mx.float16))), "partials[0]", "float16", "float32"),
}


@pytest.mark.parametrize("case", MERGE_VALUES)
def test_merge_values(case):
    call, name, *parts = MERGE_VALUES[case]
    rejects(call, f"{name}: ", *parts, "expected")


@pytest.mark.parametrize("case", MERGE_TYPES)
def test_merge_types(case):
    call, name, *parts = MERGE_TYPES[case]
    rejects(call, f"{name}: ", *parts, "expected", kind=ArgumentTypeError)


# init

INIT = {
    "backend": ({"backend": "gpu"}, ArgumentError, "backend", "'gpu'", "'mpi', 'mlx', 'solo'"),
    "backend of another type": ({"backend": 3}, ArgumentError, "backend", "3", "'solo'"),
    "comm for solo": ({"backend": "solo", "comm": object()}, ArgumentError, "comm", "'mpi'", "'solo'"),
    "timeout below 0": ({"backend": "solo", "timeout": -1.0}, ArgumentError, "timeout", "-1.0", "positive"),
    "timeout of 0": ({"backend": "solo", "timeout": 0}, ArgumentError, "timeout", "0", "positive"),
    "timeout of NaN": ({"backend": "solo", "timeout": NAN}, ArgumentError, "timeout", "nan", "finite"),
    "endless timeout": ({"backend": "solo", "timeout": INF}, ArgumentError, "timeout", "inf", "finite"),
    "timeout of text": (
        {"backend": "solo", "timeout": "60"},
        ArgumentTypeError,
        "timeout: ",
        "'60'",
        "expected a number",
    ),
    "timeout of a flag": (
        {"backend": "solo", "timeout": True},
        ArgumentTypeError,
        "timeout: ",
        "True",
        "expected a number",
    ),
}


@pytest.mark.parametrize("case", INIT)
def test_init(case):
    wrong, kind, name, *parts = INIT[case]
    rejects(lambda: ra.init(**wrong), name, *parts, kind=kind)


@pytest.mark.parametrize("value", ["soon", "-5", "nan"])
def test_timeout_of_the_environment(monkeypatch, value):
    monkeypatch.setenv("RINGATTN_TIMEOUT", value)
    rejects(lambda: ra.init("solo"), "RINGATTN_TIMEOUT", "number of seconds", value.strip("-"))


# A ring of one rank has the checks of a larger one


@pytest.mark.parametrize("ring", [None, "solo", 3])
def test_not_a_ring(ring):
    q, layout = x(1, 1, 5, 8), Layout.contiguous(5, 1)
    told = (type(ring).__name__, "ringattn.init()", "expected")
    for call in (
        lambda: ra.ring_attention(q, q, q, ring=ring, layout=layout),
        lambda: ra.decode_attention(q, q, q, ring=ring, kv_layout=layout),
        lambda: layout.gather(q, ring),
        lambda: ra.ring_linear_attention(q, q, q, ring=ring, layout=layout),
        lambda: ra.ring_short_conv(q[0], q[0], ring=ring, layout=layout),
    ):
        rejects(call, "ring: ", *told, kind=ArgumentTypeError)


SOLO = [(name, wrong, ArgumentError, parts) for name, wrong, *parts in VALUES]
SOLO += [(name, wrong, ArgumentTypeError, parts) for name, wrong, *parts in TYPES]
ABSENT = ("offset", "positions")


@pytest.mark.parametrize("name,wrong,kind,parts", [row for row in SOLO if not row[0].startswith(ABSENT)])
def test_ring_and_decode_attention_say_the_same(name, wrong, kind, parts):
    """All three functions check their shared options alike, and the ring works afterwards."""
    ring, layout = ra.init("solo"), Layout.contiguous(5, 1, start=2)
    kv_layout = Layout.contiguous(7, 1)
    if "q" in wrong and isinstance(wrong["q"], mx.array) and wrong["q"].ndim == 4 and wrong["q"].shape[1] == 0:
        parts = parts[:1]
    call = {**RIGHT, **wrong}
    for function, where in (
        (ra.ring_attention, {"layout": layout, "kv_layout": kv_layout}),
        (ra.decode_attention, {"kv_layout": kv_layout}),
    ):
        rejects(lambda: function(**call, ring=ring, **where), f"{name}: ", *parts, "expected", kind=kind)  # noqa: B023
        assert function(**RIGHT, ring=ring, **where).shape == (2, 4, 5, 6)
