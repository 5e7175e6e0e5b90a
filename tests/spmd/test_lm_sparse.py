"""The choice of an indexer over a ring is that of one process, ties included."""

from __future__ import annotations

import io
import os

import mlx.core as mx
import numpy as np
import pytest

from ringattn import Layout, Ring

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from families import BASE, build
from mlx_lm.models.cache import make_prompt_cache

from ringattn import lm
from ringattn.core.intervals import positions
from ringattn.lm.sharding import sparse
from ringattn.lm.sharding.forward_pass import flat
from ringattn.lm.sharding.sparse import Candidates, choose

pytestmark = pytest.mark.two_ranks


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("values", [1, 2, 40], ids="values={}".format)
@pytest.mark.parametrize("tokens", [23, 90])
def test_the_choice_of_all_ranks(ring: Ring, rng: np.random.Generator, queries: int, values: int, tokens: int) -> None:
    """Few values are many ties. The last rank may hold nothing."""
    scores = mx.array(rng.integers(0, values, (1, 1, queries, tokens)).astype(np.float32))
    holders = rng.integers(0, max(1, ring.size - 1), tokens)
    spans = tuple(tuple((i, i + 1) for i in range(tokens) if holders[i] == rank) for rank in range(ring.size))
    layout = Layout(spans)
    own = mx.array(positions(layout.spans[ring.rank]), mx.int32)
    found = Candidates(scores[..., own], own, 11, layout, ring).mask(layout)
    expected = choose(scores, 11)[..., own]
    assert mx.array_equal(found[..., own], expected)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_logits_in_16_bits(ring: Ring, rng: np.random.Generator, dtype: mx.Dtype) -> None:
    """Scores of 16 bits have many ties, and a token that one process does not choose changes the logits.

    In one layer, since rounding in an earlier one changes the scores and by that the choice.
    """
    exact, model = build("deepseek_v32", num_hidden_layers=1), build("deepseek_v32", num_hidden_layers=1)
    model.set_dtype(dtype)
    ids = mx.array(rng.integers(0, BASE["vocab_size"], (1, 16 * ring.size + 40)))
    expected, plain = exact(ids), model(ids)
    lm.shard(model, ring)
    cache = make_prompt_cache(model)
    found = model(ids, cache=cache)
    plain = cache[0][0].step.new.shard(plain, ring.rank, axis=1)
    scale = mx.abs(expected).max()
    assert mx.abs(found - plain).max() / scale < 8 * mx.finfo(dtype).eps


def test_scores_are_made_in_blocks(ring: Ring, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank has the scores of all of its queries at once."""
    sizes: list[int] = []
    plain = choose
    monkeypatch.setattr(sparse, "SCORES", 400)
    monkeypatch.setattr(sparse, "choose", lambda scores, count: sizes.append(scores.size) or plain(scores, count))
    model = build("deepseek_v32", num_hidden_layers=1)
    ids = mx.array(rng.integers(0, BASE["vocab_size"], (1, 100 * ring.size)))
    expected = model(ids)
    lm.shard(model, ring)
    cache = make_prompt_cache(model)
    found = model(ids, cache=cache)
    own = cache[0][0].step.new.shard(expected, ring.rank, axis=1)
    assert mx.abs(found - own).max() / mx.abs(expected).max() < 32 * 2**-23
    assert sizes and max(sizes) <= max(400, 100 * ring.size)


def test_decoding_keeps_no_graph(ring: Ring) -> None:
    """The indexer's keys and values are evaluated with each token, below and above its number of tokens."""
    model = lm.shard(build("deepseek_v32"), ring)
    for tokens in (3, 60):
        cache = make_prompt_cache(model)
        model(mx.zeros((1, tokens), mx.int32), cache=cache)
        sizes = []
        for _ in range(6):
            mx.eval(model(mx.zeros((1, 1), mx.int32), cache=cache))
            sizes.append(sum(_edges(x) for layer in flat(cache) for x in (layer.keys, layer.values)))
        assert sizes[-1] == sizes[1], (tokens, sizes)


def _edges(x: mx.array) -> int:
    """The number of operations that an array is waiting for."""
    text = io.StringIO()
    mx.export_to_dot(text, x)
    return text.getvalue().count("->")
