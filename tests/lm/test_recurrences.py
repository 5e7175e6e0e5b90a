"""A sequence cut into pieces, whose maps are chained, gives the outputs and the state of the whole sequence."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

import families
from mlx_lm.models import bailing_hybrid, bailing_moe_linear, gated_delta, jamba, mamba, recurrent_gemma, rwkv7, ssm

from ringattn.core.affine import AffineMap, states_of_spans
from ringattn.lm.sharding import elementwise_recurrences, recurrences
from ringattn.ring.states import BeforeAndAfter

CUTS = (0, 7, 8, 23)
BATCH, HEADS, KEYS, VALUES = 2, 4, 6, 5
ULP = 2.0**-23


class Pieces:
    """A cache of a recurrent layer whose calls are the spans of a sequence, one after the other."""

    shared = True

    def __init__(self) -> None:
        self.maps: list[AffineMap] = []

    @property
    def is_first(self) -> bool:
        return not self.maps

    def chain(self, state: mx.array, own: AffineMap, transition: tuple[int, ...], matrix: bool) -> BeforeAndAfter:
        assert own.offset.shape == state.shape and own.offset.dtype == mx.float32
        assert self.is_first if own.transition is None else own.transition.shape == transition
        self.maps.append(own)
        states = states_of_spans(state, self.maps, matrix)
        return BeforeAndAfter(states[-2:-1], states[-1])


class Case(NamedTuple):
    """A recurrence: over the ring, and mlx-lm's. `tokens` are cut along `axis`."""

    run: Callable[..., Any]
    plain: Callable[..., Any]  # also gives the whole, in float64
    tokens: dict[str, mx.array]
    rest: dict[str, Any]
    state: tuple[str, mx.array]
    axis: int = 1


def normal(rng: np.random.Generator, *shape: int) -> mx.array:
    return mx.array(rng.standard_normal(shape), mx.float32)


def delta_rule(rng: np.random.Generator) -> Case:
    rows = (BATCH, CUTS[-1], HEADS)
    q, k = gated_delta.normalize_qk(normal(rng, *rows, KEYS), normal(rng, *rows, KEYS), inv_scale=KEYS**-0.5, eps=1e-6)
    tokens = {"q": q, "k": k, "v": normal(rng, *rows, VALUES), "a": normal(rng, *rows, KEYS), "b": normal(rng, *rows)}
    rest = {"A_log": normal(rng, HEADS, 1), "dt_bias": normal(rng, HEADS, KEYS)}
    state = normal(rng, BATCH, HEADS, VALUES, KEYS)
    return Case(recurrences.gated_delta, gated_delta.gated_delta_update, tokens, rest, ("state", state))


def selective_heads(rng: np.random.Generator) -> Case:
    rows = (BATCH, CUTS[-1])
    tokens = {"x": normal(rng, *rows, HEADS, VALUES), "dt": normal(rng, *rows, HEADS)}
    tokens |= {name: normal(rng, *rows, 2, KEYS) for name in "BC"}
    rest = {name: normal(rng, HEADS) for name in ("A_log", "D", "dt_bias")}
    state = normal(rng, BATCH, HEADS, VALUES, KEYS)
    plain = lambda x, *args, **options: ssm.ssm_update(x, *args, **options)  # noqa: E731
    return Case(recurrences.selective_state, plain, tokens, rest, ("state", state))


def constant_decay(module: Any) -> Callable[[np.random.Generator], Case]:
    def case(rng: np.random.Generator) -> Case:
        rows = (BATCH, HEADS, CUTS[-1])
        tokens = {"q": normal(rng, *rows, KEYS), "k": normal(rng, *rows, KEYS), "v": normal(rng, *rows, VALUES)}
        rest = {"g": -mx.abs(normal(rng, HEADS)) / 4, "scale": KEYS**-0.5}
        state = ("h", normal(rng, BATCH, HEADS, KEYS, VALUES))
        return Case(recurrences.constant_decay, module.recurrent_gla, tokens, rest, state, axis=2)

    return case


def rwkv(rng: np.random.Generator) -> Case:
    rows = (BATCH, CUTS[-1], HEADS, KEYS)
    tokens = {name: normal(rng, *rows) for name in "rkvb"}
    tokens["w"] = mx.sigmoid(normal(rng, *rows))
    unit = normal(rng, *rows)
    tokens["a"] = -unit / mx.linalg.norm(unit, axis=-1, keepdims=True)
    tokens["b"] = -tokens["a"] * mx.sigmoid(tokens["b"])
    layer = families.build("rwkv7").layers[0].attn
    state = normal(rng, BATCH, HEADS, KEYS, KEYS)
    return Case(recurrences.wkv7, rwkv7.Rwkv7TimeMixing._wkv7, tokens, {"layer": layer}, ("state", state))


def real_gated(rng: np.random.Generator) -> Case:
    rows = (BATCH, CUTS[-1], KEYS)
    tokens = {"x": normal(rng, *rows), "a": mx.sigmoid(normal(rng, *rows))}
    state = ("h0", normal(rng, BATCH, KEYS))
    return Case(elementwise_recurrences.real_gated, recurrent_gemma.rnn_scan, tokens, {}, state)


def selective_scan(family: str) -> Callable[[np.random.Generator], Case]:
    def case(rng: np.random.Generator) -> Case:
        layer = families.build(family).layers[0]
        layer = layer.mamba if family == "jamba" else layer.mixer
        tokens = {"x": normal(rng, BATCH, CUTS[-1], layer.intermediate_size)}
        rest = {"layer": layer, "A": -mx.exp(layer.A_log)}
        state = ("state", normal(rng, BATCH, layer.intermediate_size, layer.ssm_state_size))
        plain = jamba.JambaMambaMixer.ssm_step if family == "jamba" else token_by_token
        return Case(elementwise_recurrences.selective_scan, plain, tokens, rest, state)

    return case


def token_by_token(layer: Any, x: mx.array, A: mx.array, state: mx.array) -> tuple[mx.array, mx.array]:
    """Run the `ssm_step` of mlx-lm's Mamba, which takes one token, on all of x."""
    out = []
    for t in range(x.shape[1]):
        one, state = mamba.MambaBlock.ssm_step(layer, x[:, t], A, state)
        out.append(one)
    return mx.stack(out, axis=1), state


CASES: dict[str, Callable[[np.random.Generator], Case]] = {
    "gated delta rule": delta_rule,
    "Mamba 2": selective_heads,
    "constant decay": constant_decay(bailing_moe_linear),
    "constant decay in chunks": constant_decay(bailing_hybrid),
    "RWKV-7": rwkv,
    "Griffin": real_gated,
    "Jamba": selective_scan("jamba"),
    "Mamba": selective_scan("mamba"),
    "Falcon Mamba": selective_scan("falcon_mamba"),
}


def call(run: Callable[..., Any], options: dict[str, Any], *before: Any) -> tuple[mx.array, mx.array]:
    """Call `run`; a method gets its layer first."""
    layer = [options["layer"]] if "layer" in options else []
    return run(*before, *layer, **{name: x for name, x in options.items() if name != "layer"})


@pytest.mark.parametrize("zeros", [True, False], ids=["from zeros", "from a state"])
@pytest.mark.parametrize("name", CASES)
def test_pieces(monkeypatch: pytest.MonkeyPatch, name: str, zeros: bool) -> None:
    """The error against float64 is at most twice that of mlx-lm on the whole sequence in float32, plus a few ulps."""
    monkeypatch.setattr(elementwise_recurrences, "BLOCK", 6)
    run, plain, tokens, rest, (key, state), axis = CASES[name](np.random.default_rng(5))
    state = mx.zeros_like(state) if zeros else state
    wide = {name: x.astype(mx.float64) for name, x in {**tokens, key: state}.items()}
    exact = call(plain, {**rest, **wide})
    whole = call(plain, {**rest, **tokens, key: state})
    cache = Pieces()
    outs = []
    for start, stop in zip(CUTS, CUTS[1:]):
        piece = {name: mx.split(x, [start, stop], axis)[1] for name, x in tokens.items()}
        out, after = call(run, {**rest, **piece, key: None if zeros else state}, plain, cache)
        outs.append(out)
    outs = mx.concatenate(outs, axis)
    for found, one, right in zip((outs, after), whole, exact):
        right = right.reshape(found.shape)
        scale = mx.abs(right).max().item()
        allowed = 2 * mx.abs(one.reshape(found.shape) - right).max().item() + 8 * ULP * scale
        assert mx.abs(found - right).max().item() <= allowed


@pytest.mark.parametrize("module", [bailing_moe_linear, bailing_hybrid], ids=["rounded", "exact"])
def test_decays_near_1_are_those_of_mlx_lm(module: Any) -> None:
    """mlx-lm may round a decay to the dtype of the layer: 0.998 is 1 in bfloat16. All ranks use the same one."""
    rng = np.random.default_rng(5)
    rows = (1, HEADS, 512)
    q, k, v = (normal(rng, *rows, dim).astype(mx.bfloat16) for dim in (KEYS, KEYS, VALUES))
    g = mx.array([-1e-3, -2e-3, -4e-3, -0.1])
    zeros = mx.zeros((1, HEADS, KEYS, VALUES))
    right, state = module.recurrent_gla(q, k, v, g, scale=1.0, h=zeros)
    cache = Pieces()
    for part in (slice(256), slice(256, None)):
        piece = [x[:, :, part] for x in (q, k, v)]
        found, after = recurrences.constant_decay(module.recurrent_gla, cache, *piece, g, 1.0, None)
    for one, other in ((found, right[:, :, 256:]), (after, state)):
        errors = mx.abs(one - other).max(axis=(0, 2, 3)) / mx.abs(other).max(axis=(0, 2, 3))
        assert errors.max().item() < 2**-7, errors
