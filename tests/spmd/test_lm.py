"""Language models over a ring of any size give what they give in one process."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ringattn import ArgumentError, Ring, init

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from families import BASE, FAMILIES, build, words
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from ringattn import lm
from ringattn.comm import launched_by
from ringattn.lm import cache as caches
from ringattn.lm import steps

STEPS = (100, 1, 1, 3, 90, 5, 1, 1)  # tokens of each call: chunks for all ranks, and few tokens on every rank
ULPS = 32  # of the largest logit, float32


@pytest.mark.parametrize("name", FAMILIES)
def test_logits(ring: Ring, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(caches, "SLACK", 8)
    monkeypatch.setattr(steps, "RUN", 2)
    model = build(name)
    plain = make_prompt_cache(model)
    lm.shard(model, ring)
    sharded = make_prompt_cache(model)
    assert all(type(c) is lm.ShardedKVCache for c in sharded)
    for tokens in STEPS:
        ids = mx.array(rng.integers(0, BASE["vocab_size"], (1, tokens)))
        expected, found = model(ids, cache=plain), model(ids, cache=sharded)
        assert sharded[0].step is not None
        if sharded[0].step.shared:
            expected = sharded[0].step.new.shard(expected, ring.rank, axis=1)
        assert found.shape == expected.shape
        error = float(mx.abs(found - expected).max() / mx.abs(expected).max())
        assert error < ULPS * 2**-23, (tokens, error * 2**23)


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_each_rank_holds_its_part(ring: Ring, name: str) -> None:
    model = lm.shard(build(name), ring)
    cache = make_prompt_cache(model)
    model(mx.zeros((1, 20 * ring.size + 7), mx.int32), cache=cache)
    for layer in cache:
        tokens = layer.layout.local_length(ring.rank)
        assert [x.shape[2] for x in layer.state] == [tokens, tokens]
        most = layer.layout.length if layer.window is None else layer.window - 1 + layer.layout.length
        assert layer.layout.stop == 20 * ring.size + 7 and layer.layout.length <= most
    total = sum(c.nbytes for c in cache)
    whole = float(ring.all_reduce(mx.array(float(total))).item())
    assert total <= 1.5 * whole / ring.size


def test_window_layers_forget(ring: Ring) -> None:
    model = lm.shard(build("gemma3"), ring)
    cache = make_prompt_cache(model)
    for _ in range(6):
        model(mx.zeros((1, 100), mx.int32), cache=cache)
    for layer in cache:
        if layer.window is not None:
            assert layer.layout.length <= layer.window - 1 + 100 and not layer.is_trimmable()
        else:
            assert layer.layout.length == 600


def test_trim(ring: Ring, rng: np.random.Generator) -> None:
    """Tokens taken back leave no trace."""
    model = build("llama")
    ids = mx.array(rng.integers(0, BASE["vocab_size"], (1, 130)))
    expected = model(ids, cache=make_prompt_cache(model))
    lm.shard(model, ring)
    cache = make_prompt_cache(model)
    model(ids[:, :111], cache=cache)
    model(ids[:, :9], cache=cache)
    assert [c.trim(20) for c in cache] == [20] * 4
    found = [model(ids[:, 100:101], cache=cache), model(ids[:, 101:104], cache=cache)]
    np.testing.assert_allclose(np.concatenate(found, 1), np.array(expected)[:, 100:104], atol=1e-4)


def test_greedy_tokens(ring: Ring, rng: np.random.Generator) -> None:
    """mlx-lm's own loop over the ring: the tokens of one process, whatever the length of the prompt."""
    from mlx_lm.generate import generate_step

    model = build("qwen3", seed=1)
    prompts = [rng.integers(0, BASE["vocab_size"], n).tolist() for n in (1, 2, 37, 131, 403)]
    expected = [[token for token, _ in generate_step(mx.array(p), model, max_tokens=9)] for p in prompts]
    lm.shard(model, ring)
    for prompt, tokens in zip(prompts, expected):
        theirs = prompt if ring.rank == 0 else []
        found = [r.token for r in lm.stream_generate(model, words(), theirs, max_tokens=9, chunk=50)]
        assert found == tokens


def test_a_token_is_decided_by_rank_0(ring: Ring) -> None:
    """Ranks whose samplers disagree still go on with the same token."""
    model = lm.shard(build("llama"), ring)
    sampler = lambda logprobs: mx.array([ring.rank + 3])  # noqa: E731
    found = [r.token for r in lm.stream_generate(model, words(), [5], max_tokens=4, sampler=sampler)]
    assert found == [3, 3, 3, 3]


@pytest.mark.parametrize("after, tokens, read", [(0, 0, 0), (1, 0, 100), (3, 0, 300), (4, 0, 302), (6, 1, 303)])
def test_rank_0_ends_a_text(ring: Ring, after: int, tokens: int, read: int) -> None:
    """Between rounds of prefill or between tokens; the cache holds what was read until then, and goes on from there."""
    if 100 % ring.size:
        pytest.skip("the rounds are of 100 tokens")
    model = lm.shard(build("llama"), ring)
    cache, asked = make_prompt_cache(model), iter(range(100))
    options = {"stopped": lambda: next(asked) >= after} if ring.rank == 0 else {}
    prompt = [i % 90 for i in range(301)]
    found = lm.stream_generate(
        model, words(), prompt, max_tokens=9, chunk=100 // ring.size, prompt_cache=cache, **options
    )
    assert (len(list(found)), cache[0].size()) == (tokens, read)
    assert len(list(lm.stream_generate(model, words(), [3], max_tokens=2, prompt_cache=cache))) == 2


def test_a_processor_that_fails_is_an_error_on_all_ranks(ring: Ring) -> None:
    model = lm.shard(build("llama"), ring)

    def fails(tokens: mx.array, logits: mx.array) -> mx.array:
        raise ArgumentError("no such token")

    with pytest.raises(ArgumentError, match=r"no such token"):
        list(lm.stream_generate(model, words(), [5], max_tokens=4, logits_processors=[fails]))
    assert len(list(lm.stream_generate(model, words(), [5], max_tokens=4))) == 4


def test_what_cannot_be_sharded(ring: Ring) -> None:
    model = build("llama")
    for cache, name in ((RotatingKVCache(8, keep=4), "RotatingKVCache"), (Other(), "Other")):
        model.make_cache = lambda cache=cache: [KVCache(), cache]
        with pytest.raises(lm.UnsupportedModelError, match=rf"^model: llama has a {name} at layer 1[^\n]*$"):
            lm.shard(model, ring)


class Other(KVCache):
    """A cache of another kind."""


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("again", [1, 2, "size"])
def test_a_saved_cache_goes_on(ring: Ring, rng: np.random.Generator, tmp_path_factory, name: str, again) -> None:
    """On as many ranks as before or on fewer, with a next turn after it."""
    size = ring.size if again == "size" else min(again, ring.size)
    path = Path(bytes(ring.broadcast(_text(tmp_path_factory.mktemp("cache"))).tolist()).decode()) / "cache.json"
    model = build(name)
    first, second = (mx.array(rng.integers(0, BASE["vocab_size"], (1, n))) for n in (130, 7))
    plain = make_prompt_cache(model)
    model(first, cache=plain)
    expected = model(second, cache=plain)
    lm.shard(model, ring)
    cache = make_prompt_cache(model)
    model(first, cache=cache)
    lm.save_cache(path, cache, {"model": name})
    lm.save_cache(path, cache, {"model": name})  # over itself
    ring.barrier()
    assert len(list(path.parent.iterdir())) == ring.size + 1
    some = _first(ring, size)
    if some is not None:
        fewer = lm.shard(build(name), some)
        cache, metadata = lm.load_cache(path, fewer)
        assert metadata == {"model": name}
        found = fewer(second, cache=cache)
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=0, atol=1e-5 * float(expected.max()))
    ring.barrier()


def _first(ring: Ring, size: int) -> Ring | None:
    """The ring of the first `size` ranks, also over a transport that has no `split`, if it can be had."""
    if size == ring.size:
        return ring
    if size == 1:
        return init("solo") if ring.rank == 0 else None
    if launched_by() == "mlx":
        pytest.skip("no ring of a part of the ranks")
    return ring.split(0 if ring.rank < size else None)


def test_a_cache_file_that_is_wrong(ring: Ring, tmp_path_factory) -> None:
    path = Path(bytes(ring.broadcast(_text(tmp_path_factory.mktemp("cache"))).tolist()).decode()) / "cache.json"
    model = lm.shard(build("llama"), ring)
    cache = make_prompt_cache(model)
    model(mx.zeros((1, 100), mx.int32), cache=cache)
    lm.save_cache(path, cache)
    with pytest.raises(lm.CacheFileError, match=r"cache.json: another model's: its layers"):
        lm.load_cache(path, lm.shard(build("gemma3"), ring))
    files = sorted(path.parent.glob("*.safetensors"))
    ring.barrier()
    if ring.rank == 0:
        whole = files[-1].read_bytes()
        files[-1].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    ring.barrier()
    with pytest.raises(ArgumentError, match=r"safetensors: torn or changed: a digest of [0-9a-f]+, expected"):
        lm.load_cache(path, model)
    ring.barrier()
    if ring.rank == 0:
        path.write_text(path.read_text()[:-9])
    ring.barrier()
    with pytest.raises(lm.CacheFileError, match=r"cache.json: not the manifest of a prompt cache, or torn"):
        lm.load_cache(path, model)
    with pytest.raises(lm.CacheFileError, match=r"none.json: No such file"):
        lm.load_cache(path.with_name("none.json"), model)
    model(mx.zeros((1, 1), mx.int32), cache=cache)  # the ring still works


def _text(path: Path) -> mx.array:
    return mx.array(list(str(path).encode()), mx.uint8)


def test_what_a_round_sends_stops_growing(ring: Ring) -> None:
    """Against a long cache the queries travel: the prompt's traffic is linear, though every round sees all before."""
    model = lm.shard(build("llama"), ring)
    cache, sent = make_prompt_cache(model), []
    for _ in range(16):
        before = ring.bytes_sent
        model(mx.zeros((1, 32 * ring.size), mx.int32), cache=cache)
        sent.append(ring.all_reduce(mx.array(float(ring.bytes_sent - before))).item())
    assert max(sent[6:]) <= 1.05 * min(sent[6:]), sent
