"""Wrong arguments of linear attention. The error is one line: argument, value, expectation."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import ringattn as ra
from ringattn import ArgumentError, ArgumentTypeError, Layout


def x(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.zeros(shape, dtype)


RIGHT = {
    "q": x(2, 2, 5, 8),
    "k": x(2, 2, 5, 8),
    "v": x(2, 4, 5, 6),
    "log_decay": x(2, 4, 5),
    "beta": x(2, 4, 5, dtype=mx.bfloat16),
    "state": x(2, 4, 6, 8),
}
VALUES = [  # the argument, its value, parts of the message
    ("q", x(2, 5, 8), "(2, 5, 8)", "4 dimensions"),
    ("k", x(2, 1, 5, 8), "(2, 1, 5, 8)", "(2, 2, 5, 8) as q"),
    ("v", x(1, 4, 5, 6), "(1, 4, 5, 6)", "batch 2"),
    ("v", x(2, 4, 7, 6), "(2, 4, 7, 6)", "tokens 5"),
    ("v", x(2, 3, 5, 6), "3 heads", "multiple of the 2"),
    ("v", x(2, 0, 5, 6), "at least 1 head"),
    ("v", x(2, 4, 5, 0), "at least 1"),
    ("log_decay", x(2, 2, 5), "(2, 2, 5)", "(2, 4, 5) or (2, 4, 5, 8)"),
    ("log_decay", x(2, 4, 5, 1), "(2, 4, 5, 1)", "(2, 4, 5) or (2, 4, 5, 8)"),
    ("beta", x(2, 4, 5, 8), "(2, 4, 5, 8)", "(2, 4, 5)"),
    ("state", x(2, 4, 8, 6), "(2, 4, 8, 6)", "(2, 4, 6, 8)"),
    ("scale", float("nan"), "nan", "finite"),
]
TYPES = [
    ("q", np.zeros((2, 2, 5, 8)), "ndarray", "mx.array"),
    ("q", x(2, 2, 5, 8, dtype=mx.int32), "int32", "float16, bfloat16 or float32"),
    ("k", x(2, 2, 5, 8, dtype=mx.float16), "float16", "float32 as q"),
    ("log_decay", x(2, 4, 5, dtype=mx.int32), "int32", "float16, bfloat16 or float32"),
    ("beta", 1.0, "float", "mx.array"),
    ("state", x(2, 4, 6, 8, dtype=mx.bfloat16), "bfloat16", "float32"),
    ("scale", "1", "'1'", "a number"),
    ("return_state", 1, "1", "True or False"),
    ("out_dtype", mx.int32, "int32", "mx.float16, mx.bfloat16 or mx.float32"),
]


def call(**changed) -> None:
    arguments = {**RIGHT, **changed}
    q, k, v = (arguments.pop(name) for name in "qkv")
    ra.linear_attention(q, k, v, **arguments)


def rejects(run, name: str, parts: tuple[str, ...], kind: type[ArgumentError]) -> None:
    with pytest.raises(ArgumentError) as caught:
        run()
    text = str(caught.value)
    assert type(caught.value) is kind and text.startswith(f"{name}: ") and "\n" not in text, text
    assert all(part in text for part in parts), text


def test_right_arguments() -> None:
    call()
    for name in ("log_decay", "beta", "state"):
        call(**{name: None})


@pytest.mark.parametrize(("name", "value", "parts"), [(name, value, parts) for name, value, *parts in VALUES])
def test_wrong_values(name: str, value: object, parts: list[str]) -> None:
    rejects(lambda: call(**{name: value}), name, tuple(parts), ArgumentError)


@pytest.mark.parametrize(("name", "value", "parts"), [(name, value, parts) for name, value, *parts in TYPES])
def test_wrong_types(name: str, value: object, parts: list[str]) -> None:
    rejects(lambda: call(**{name: value}), name, tuple(parts), ArgumentTypeError)


@pytest.mark.parametrize(
    ("name", "value", "parts", "kind"),
    [
        ("x", x(5, 3), ("(5, 3)", "3 dimensions"), ArgumentError),
        ("x", x(2, 4, 3), ("4 tokens", "5"), ArgumentError),
        ("x", None, ("NoneType",), ArgumentTypeError),
        ("weight", x(3, 1, 4), ("(3, 1, 4)", "(3, kernel, 1)"), ArgumentError),
        ("weight", x(3, 0, 1), ("(3, 0, 1)", "(3, kernel, 1)"), ArgumentError),
        ("weight", x(3, 4, 1, dtype=mx.float16), ("float16", "float32 as x"), ArgumentTypeError),
        ("bias", x(4), ("(4,)", "(3,)"), ArgumentError),
        ("state", x(2, 4, 3), ("(2, 4, 3)", "(2, 3, 3)"), ArgumentError),
        ("state", x(2, 3, 3, dtype=mx.float16), ("float16", "float32"), ArgumentTypeError),
        ("layout", None, ("NoneType", "a Layout"), ArgumentTypeError),
        ("return_state", None, ("None", "True or False"), ArgumentTypeError),
    ],
)
def test_wrong_arguments_of_the_convolution(
    name: str, value: object, parts: tuple[str, ...], kind: type[ArgumentError]
) -> None:
    with ra.init("solo") as ring:
        given = {"x": x(2, 5, 3), "weight": x(3, 4, 1), "layout": Layout.contiguous(5, 1), name: value}
        rejects(lambda: ra.ring_short_conv(given.pop("x"), given.pop("weight"), ring=ring, **given), name, parts, kind)
