"""The tokens that a cache holds count as those of a prompt do."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ringattn import Ring

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

import mlx_lm
from families import BASE, build, words
from mlx_lm.sample_utils import make_logits_processors

from ringattn import lm
from ringattn.lm.sharding import history

pytestmark = pytest.mark.two_ranks

PENALTIES = {
    "repetition": {"repetition_penalty": 1.7, "repetition_context_size": 60},
    "presence": {"presence_penalty": 3.0, "presence_context_size": 60},
    "frequency": {"frequency_penalty": 1.0, "frequency_context_size": 60},
}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("how", ["kept", "trimmed", "saved"])
def test_a_penalty_counts_tokens_of_the_cache(
    ring: Ring, rng: np.random.Generator, tmp_path_factory: pytest.TempPathFactory, name: str, how: str
) -> None:
    """Whatever of the context was read before, the answer is that to the whole prompt."""
    prompt = rng.integers(0, BASE["vocab_size"], 50).tolist()
    processors = make_logits_processors(**PENALTIES[name])
    plain = build("llama")
    expected = [
        r.token for r in mlx_lm.stream_generate(plain, words(), prompt, logits_processors=processors, max_tokens=9)
    ]
    free = [r.token for r in mlx_lm.stream_generate(plain, words(), prompt, max_tokens=9)]
    assert expected != free  # else there is nothing to be seen
    model = lm.shard(build("llama"), ring)
    cache = model.make_cache()
    model(mx.array([[*prompt[:40], *([7] * 20 if how == "trimmed" else [])]]), cache=cache)
    if how == "trimmed":
        for layer in cache:
            layer.trim(20)
    if how == "saved":
        path = _shared(ring, tmp_path_factory)
        lm.save_cache(path, cache, model=model)
        cache, _ = lm.load_cache(path, model)
    found = lm.stream_generate(
        model, words(), prompt[40:], logits_processors=processors, max_tokens=9, prompt_cache=cache
    )
    assert [r.token for r in found] == expected


def test_a_cache_knows_its_tokens(ring: Ring, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that windows have dropped, and those that came one by one."""
    monkeypatch.setattr(history, "PARTS", 3)
    model = lm.shard(build("gemma3"), ring)
    cache = model.make_cache()
    ids = rng.integers(0, BASE["vocab_size"], (1, 130))
    assert cache[0].tokens.shape == (1, 0)
    for start, stop in ((0, 110), *((i, i + 1) for i in range(110, 130))):
        model(mx.array(ids[:, start:stop]), cache=cache)
        assert all((layer.tokens == ids[:, :stop]).all() for layer in cache)


def _shared(ring: Ring, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path in a folder that all ranks share."""
    own = mx.array(list(str(tmp_path_factory.mktemp("cache")).encode()), mx.uint8)
    return Path(bytes(ring.broadcast(own).tolist()).decode()) / "cache.json"
