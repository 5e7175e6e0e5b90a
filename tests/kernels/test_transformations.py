"""Tests of `ringattn.attention` under MLX's transformations, on every backend."""

from __future__ import annotations

import mlx.core as mx
import pytest
from attention_cases import BACKENDS, make, normal

import ringattn as ra

TRANSFORMS = {
    "grad": lambda f, x: mx.grad(lambda x: f(x).sum())(x),
    "value_and_grad": lambda f, x: mx.value_and_grad(lambda x: f(x).sum())(x)[1],
    "vjp": lambda f, x: mx.vjp(f, [x], [f(x)])[1][0],
    "jvp": lambda f, x: mx.jvp(f, [x], [mx.ones_like(x)])[1][0],
    "vmap": lambda f, x: mx.vmap(f)(mx.stack([x, x])),
    "compile": lambda f, x: mx.compile(f)(x),
    "grad of checkpoint": lambda f, x: mx.grad(lambda x: mx.checkpoint(f)(x).sum())(x),
    "second derivative": lambda f, x: mx.grad(lambda x: mx.grad(lambda x: f(x).sum())(x).sum())(x),
    "compiled grad": lambda f, x: mx.compile(mx.grad(lambda x: f(x).sum()))(x),
}
OF = ("q", "k", "v", "sinks", "mask", "lse")


def function_of(name: str, backend: str):
    """Return `attention` as a function of one of its arrays, and that array."""
    case = make(5, 7, batch=1)
    arrays = {"q": case.q, "k": case.k, "v": case.v, "sinks": mx.zeros(4), "mask": normal(9, 5, 7)}

    def function(x: mx.array) -> mx.array:
        changed = {**arrays, "q" if name == "lse" else name: x}
        q, k, v = (changed.pop(n) for n in "qkv")
        out, lse = ra.attention(q, k, v, backend=backend, return_lse=True, **changed)
        return lse if name == "lse" else out

    return function, arrays["q" if name == "lse" else name]


REFUSED = ("jvp", "vmap", "compile", "second derivative", "compiled grad")


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("name", OF)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transformations_of_fused_kernels(transform, name, backend):
    """Unsupported transformations raise. MLX does not see the arithmetic of fused kernels, and would return zeros."""
    if (transform, name, backend) == ("compile", "sinks", "host"):
        pytest.skip("sinks come in after the kernel, so compiling for them alone works")
    function, x = function_of(name, backend)
    if (transform, backend) == ("compile", "cuda"):  # nothing is evaluated on the way, so it works
        assert mx.allclose(TRANSFORMS[transform](function, x), function(x), atol=1e-6)
    elif (transform, backend) in (("jvp", "cuda"), ("vmap", "cuda")):
        with pytest.raises((ra.TransformError, ValueError), match="cuda|Not implemented for CustomKernel"):
            mx.eval(TRANSFORMS[transform](function, x))
    elif transform in REFUSED:
        with pytest.raises(ra.TransformError) as caught:
            mx.eval(TRANSFORMS[transform](function, x))
        assert backend in str(caught.value) and "\n" not in str(caught.value)
    else:
        expected = TRANSFORMS[transform](function_of(name, "reference")[0], x)
        assert mx.allclose(TRANSFORMS[transform](function, x), expected, atol=1e-5)
    assert mx.all(mx.isfinite(function(x))), "and works afterwards"


@pytest.mark.parametrize("name", OF)
@pytest.mark.parametrize("transform", [name for name in TRANSFORMS if "compile" not in name])
def test_reference_has_transformations(transform, name):
    function, x = function_of(name, "reference")
    result = TRANSFORMS[transform](function, x)
    assert mx.all(mx.isfinite(result))
    if transform == "vmap":
        assert mx.allclose(result, mx.stack([function(x)] * 2), atol=1e-6)
    elif transform != "second derivative":
        assert mx.any(result != 0)
    elif name not in ("v",):  # out is linear in v
        assert mx.any(mx.abs(result) > 1e-4)


def test_reference_compiles():
    function, x = function_of("q", "reference")
    compiled = mx.compile(function)
    for _ in range(2):
        assert mx.allclose(compiled(x), function(x), atol=1e-6)
        x = x + 1
