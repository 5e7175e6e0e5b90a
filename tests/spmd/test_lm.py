"""Language models over a ring of any size give the results of one process."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from ringattn import ArgumentError, Ring, init

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

import mlx_lm
from families import BASE, FAMILIES, build, build_other, words
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from plain_lm import ULPS, greedy, logits

from ringattn import lm
from ringattn.lm.prompt_cache import atomic_files, manifest
from ringattn.lm.sharding import partition
from ringattn.lm.sharding import sharded_cache as caches
from ringattn.lm.sharding.forward_pass import flat, restorable, tokens_of, trim_to
from ringattn.lm.sharding.recurrent_cache import TAIL, RecurrentCache
from ringattn.lm.sharding.sharded_cache import held_bytes
from ringattn.transport.environment import launched_by

STEPS = (100, 1, 1, 3, 90, 5, 1, 1)  # tokens of each call: chunks for all ranks, and few tokens on every rank
SAVED = ["llama", "gemma3", "longcat_flash", "qwen3_5", "falcon_h1"]  # keys, windows, two caches a layer, states, both


@functools.cache
def llama(ring: Ring) -> nn.Module:
    """A model over the ring. Tests share it: they change caches, not models."""
    return lm.shard(build("llama"), ring)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits(ring: Ring, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(caches, "SLACK", 8)
    monkeypatch.setattr(partition, "RUN", 2)
    model = build(name)
    lengths = STEPS if name != "plamo3" else (100, 1, 1, 90)  # mlx-lm's cache may drop one of several
    ids = mx.array(rng.integers(0, BASE["vocab_size"], (1, sum(lengths))))
    whole = logits(model, ids, lengths)
    lm.shard(model, ring)
    sharded = make_prompt_cache(model)
    steps = flat(sharded)
    assert all(isinstance(c, lm.ShardedKVCache) for c in steps)
    start = 0
    for tokens in lengths:
        expected = whole[:, start : start + tokens]
        found = model(ids[:, start : start + tokens], cache=sharded)
        assert steps[0].step is not None
        if steps[0].step.shared:
            expected = steps[0].step.new.shard(expected, ring.rank, axis=1)
        assert found.shape == expected.shape
        error = float(mx.abs(found - expected).max() / mx.abs(expected).max())
        assert error < ULPS * 2**-23, (tokens, error * 2**23)
        start += tokens


@pytest.mark.two_ranks
@pytest.mark.parametrize("name", ["llama", "phi", "stablelm", "gemma3", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_logits_in_16_bits(ring: Ring, rng: np.random.Generator, name: str, dtype: mx.Dtype) -> None:
    """The error is at most twice that of mlx-lm itself; some layers have float32 queries for 16-bit keys."""
    exact, model = build(name), build(name)
    model.set_dtype(dtype)
    ids = mx.array(rng.integers(0, BASE["vocab_size"], (1, 16 * ring.size + 40)))
    expected, plain = exact(ids), model(ids)
    lm.shard(model, ring)
    cache = make_prompt_cache(model)
    found = model(ids, cache=cache)
    own = cache[0].step.new.shard(expected, ring.rank, axis=1)
    scale = mx.abs(expected).max()
    budget = 2 * mx.abs(plain - expected).max() / scale + 4 * mx.finfo(dtype).eps
    assert mx.abs(found - own).max() / scale < budget
    assert mx.abs(model(ids[:, :1], cache=cache)).max() < float("inf")


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


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_held_bytes_are_those_of_the_tokens(ring: Ring, name: str) -> None:
    """Room for more tokens does not count: the arrays grow in steps, in mlx-lm's cache too."""
    model = build(name)
    plain = make_prompt_cache(model)
    lm.shard(model, ring)
    cache = make_prompt_cache(model)
    for layers, length in product((plain, cache), (20 * ring.size + 7, 1, 1)):
        model(mx.zeros((1, length), mx.int32), cache=layers)
    for whole, layer in zip(plain, cache):
        size = sum(x.shape[1] * x.shape[3] * 4 for x in (whole.keys, whole.values))  # of a token, float32
        assert held_bytes([layer]) == layer.layout.local_length(ring.rank) * size
        if layer.window is None:
            assert held_bytes([whole]) == (20 * ring.size + 9) * size < whole.nbytes
    held = ring.all_reduce(mx.array([float(layer.layout.local_length(ring.rank)) for layer in cache]))
    assert held.tolist() == [layer.layout.length for layer in cache]


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
    """Removed tokens have no effect on later ones."""
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


@pytest.mark.parametrize("name", ["qwen3", "afm7", "iquestloopcoder", "longcat_flash", "deepseek_v32"])
def test_greedy_tokens(ring: Ring, rng: np.random.Generator, name: str) -> None:
    """mlx-lm's own loop over the ring gives the tokens of one process for prompts of any length."""
    model = build(name, seed=1)
    prompts = [rng.integers(0, BASE["vocab_size"], n).tolist() for n in (1, 2, 37, 131, 303)]
    expected = [greedy(model, prompt, 6) for prompt in prompts]
    lm.shard(model, ring)
    for prompt, tokens in zip(prompts, expected):
        theirs = prompt if ring.rank == 0 else []
        found = [r.token for r in lm.stream_generate(model, words(), theirs, max_tokens=6, prefill_step_size=50)]
        assert found == tokens


def test_a_token_is_decided_by_rank_0(ring: Ring) -> None:
    """Ranks with different samplers continue with the same token."""
    model = llama(ring)
    sampler = lambda logprobs: mx.array([ring.rank + 3])  # noqa: E731
    found = [r.token for r in lm.stream_generate(model, words(), [5], max_tokens=4, sampler=sampler)]
    assert found == [3, 3, 3, 3]


@pytest.mark.parametrize("after, tokens, read", [(0, 0, 0), (1, 0, 100), (3, 0, 300), (4, 0, 302), (6, 1, 303)])
def test_rank_0_ends_a_text(ring: Ring, after: int, tokens: int, read: int) -> None:
    """A text ends between rounds of prefill or between tokens. Its cache holds the tokens read and can be continued."""
    if 100 % ring.size:
        pytest.skip("the rounds are of 100 tokens")
    model = llama(ring)
    cache, asked = make_prompt_cache(model), iter(range(100))
    options = {"stopped": lambda: next(asked) >= after} if ring.rank == 0 else {}
    prompt = [i % 60 for i in range(301)]
    found = lm.stream_generate(
        model, words(), prompt, max_tokens=9, prefill_step_size=100 // ring.size, prompt_cache=cache, **options
    )
    assert (len(list(found)), cache[0].size()) == (tokens, read)
    assert len(list(lm.stream_generate(model, words(), [3], max_tokens=2, prompt_cache=cache))) == 2


def test_a_processor_that_fails_is_an_error_on_all_ranks(ring: Ring) -> None:
    model = llama(ring)

    def fails(tokens: mx.array, logits: mx.array) -> mx.array:
        raise ArgumentError("no such token")

    with pytest.raises(ArgumentError, match=r"no such token"):
        list(lm.stream_generate(model, words(), [5], max_tokens=4, logits_processors=[fails]))
    assert len(list(lm.stream_generate(model, words(), [5], max_tokens=4))) == 4


def test_tokens_go_to_the_rank_with_room_also_where_the_first_layer_has_a_window(
    ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition, "RUN", 4)
    monkeypatch.setattr(caches, "SLACK", 8)
    model = lm.shard(build("gpt_oss"), ring)
    cache = make_prompt_cache(model)
    assert cache[0].window is not None and cache[1].window is None
    model(mx.zeros((1, 16 * ring.size), mx.int32), cache=cache)
    for _ in range(24 * ring.size):
        model(mx.zeros((1, 1), mx.int32), cache=cache)
    held = [cache[1].layout.local_length(rank) for rank in range(ring.size)]
    assert max(held) - min(held) <= 8 + 4, held


SMALL = {  # the defaults of this family are those of the whole model
    **{"q_lora_rank": 16, "qk_rope_head_dim": 8, "o_groups": 2, "o_lora_rank": 16},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    **{"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
}


@pytest.mark.two_ranks
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("phi3small", {}, "has a layer that does its own arithmetic on masks or caches"),
        ("deepseek_v41", SMALL, "has a LayerCache at layer 0, expected KVCache, RotatingKVCache or ArraysCache"),
    ],
)
def test_a_layer_of_another_kind_is_named(ring: Ring, name: str, changes: dict, message: str) -> None:
    """The error comes before anything is computed: the result would be silently wrong."""
    with pytest.raises(lm.UnsupportedModelError, match=rf"^model: {name} [^\n]*{message}[^\n]*$"):
        lm.shard(build_other(name, changes), ring)


@pytest.mark.two_ranks
def test_a_rope_that_follows_the_tokens_of_a_call(ring: Ring) -> None:
    model = build_other("llama", {"max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 2.0}})
    lm.shard(model, ring)
    cache = make_prompt_cache(model)
    model(mx.zeros((1, 64), mx.int32), cache=cache)
    with pytest.raises(lm.UnsupportedModelError, match=r"^model: llama has a rope .* beyond 64 .* this is token 65$"):
        model(mx.zeros((1, 1), mx.int32), cache=cache)


@pytest.mark.two_ranks
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_bits": 4}, "kv_bits: not supported over a ring"),
        ({"max_kv_size": 32}, "max_kv_size: not supported"),
        ({"draft_model": 1}, "draft_model: not supported"),
        ({"input_embeddings": 1}, "input_embeddings: not supported"),
        ({"prefill_step_size": 0}, "prefill_step_size: 0, expected at least 1"),
        ({"chunk": 0}, "chunk: 0, expected at least 1"),
        ({"chunk": 9, "prefill_step_size": 9}, "chunk: not supported over a ring"),
    ],
)
def test_options_that_mean_nothing_here(ring: Ring, options: dict, message: str) -> None:
    model = llama(ring)
    with pytest.raises(ArgumentError, match=f"^{message}"):
        list(lm.stream_generate(model, words(), [5], max_tokens=4, **options))


@pytest.mark.two_ranks
def test_what_cannot_be_sharded(ring: Ring) -> None:
    model = build("llama")
    for cache, name in ((RotatingKVCache(8, keep=4), "RotatingKVCache"), (Other(), "Other")):
        model.make_cache = lambda cache=cache: [KVCache(), cache]
        with pytest.raises(lm.UnsupportedModelError, match=rf"^model: llama has a {name} at layer 1[^\n]*$"):
            lm.shard(model, ring)


class Other(KVCache):
    """A cache of another kind."""


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("again", [1, 2, "size"])
def test_a_saved_cache_goes_on(ring: Ring, rng: np.random.Generator, tmp_path_factory, name: str, again) -> None:
    """A cache is loaded on as many ranks as before or on fewer, and a next turn follows."""
    size = ring.size if again == "size" else min(again, ring.size)
    path = _path(ring, tmp_path_factory)
    model = build(name)
    first, second = (mx.array(rng.integers(0, BASE["vocab_size"], (1, n))) for n in (130, 7))
    plain = make_prompt_cache(model)
    model(first, cache=plain)
    expected = model(second, cache=plain)
    lm.shard(model, ring)
    cache = make_prompt_cache(model)
    model(first, cache=cache)
    lm.save_cache(path, cache, {"model": name}, model=model)
    lm.save_cache(path, cache, {"model": name}, model=model)  # over itself
    ring.barrier()
    assert len(list(path.parent.iterdir())) == ring.size + 1
    some = _first(ring, size)
    if some is not None:
        fewer = lm.shard(build(name), some)
        cache, metadata = lm.load_cache(path, fewer)
        assert metadata == {"model": name}
        found = fewer(second, cache=cache)
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=0, atol=2e-5 * float(expected.max()))
    ring.barrier()


@pytest.mark.parametrize("name", SAVED)
def test_a_cache_of_one_rank_is_loaded_by_all(
    ring: Ring, rng: np.random.Generator, tmp_path_factory, name: str
) -> None:
    """Each rank gets its part of the keys, and all states, bit for bit: also those to which the cache can go back."""
    path = _path(ring, tmp_path_factory)
    model = build(name)
    prompt = rng.integers(0, BASE["vocab_size"], 130).tolist()
    kept = 0 if name == "gemma3" else 130 - TAIL  # its windows have dropped tokens
    turn = [*prompt[:kept], 5, 6, 7]
    expected = [r.token for r in mlx_lm.stream_generate(model, words(), turn, max_tokens=5)]
    alone = lm.shard(build(name), init("solo"))
    cache = alone.make_cache()
    list(lm.stream_generate(alone, words(), prompt, max_tokens=3, prompt_cache=cache, prefill_step_size=40))
    if ring.rank == 0:
        lm.save_cache(path, cache, model=alone)
    ring.barrier()
    lm.shard(model, ring)
    loaded, _ = lm.load_cache(path, model)
    for before, after in zip(flat(cache), flat(loaded), strict=True):
        if isinstance(before, RecurrentCache):
            assert list(before.states) == list(after.states) == [kept, 132, 133]
            for one, other in zip(before.states.values(), after.states.values()):
                assert all(x.dtype == y.dtype and mx.array_equal(x, y) for x, y in zip(one, other, strict=True))
    assert tokens_of(loaded)[:130] == prompt
    assert restorable(loaded, 129) == (129 if name in ("llama", "longcat_flash") else kept)
    trim_to(loaded, kept)
    found = lm.stream_generate(model, words(), turn[kept:], max_tokens=5, prompt_cache=loaded)
    assert [r.token for r in found] == expected


def _first(ring: Ring, size: int) -> Ring | None:
    """Make a ring of the first `size` ranks, where the transport allows it; ``None`` on the other ranks."""
    if size == ring.size:
        return ring
    if size == 1:
        return init("solo") if ring.rank == 0 else None
    if launched_by() == "mlx":
        pytest.skip("no ring of a part of the ranks")
    return ring.split(0 if ring.rank < size else None)


def _path(ring: Ring, tmp_path_factory) -> Path:
    """The path of a manifest in a new folder that all ranks share."""
    own = mx.array(list(str(tmp_path_factory.mktemp("cache")).encode()), mx.uint8)
    return Path(bytes(ring.broadcast(own).tolist()).decode()) / "cache.json"


def _saved(ring: Ring, tmp_path_factory, model: nn.Module) -> tuple[Path, list[lm.ShardedKVCache]]:
    """Make and save a cache of 100 tokens."""
    path = _path(ring, tmp_path_factory)
    cache = make_prompt_cache(model)
    model(mx.zeros((1, 100), mx.int32), cache=cache)
    lm.save_cache(path, cache, model=model)
    return path, cache


def _on_rank_0(ring: Ring, change: Callable[[], object]) -> None:
    """Change something on rank 0 that all ranks see."""
    ring.barrier()
    if ring.rank == 0:
        change()
    ring.barrier()


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "layers": (lambda: build("gemma3"), r"module mlx_lm.models.gemma3_text, expected mlx_lm.models.llama"),
    "kind": (lambda: build("qwen3"), r"module mlx_lm.models.qwen3, expected mlx_lm.models.llama"),
    "rope": (lambda: build("llama with scaled rope"), r"rope_scaling \{.*'factor': 2.0.*\}, expected None"),
    "heads": (lambda: build("llama", num_key_value_heads=4), r"num_key_value_heads 4, expected 2"),
    "head_dim": (lambda: build("llama", head_dim=8), r"head_dim 8, expected 16"),
    "weights": (lambda: build("llama", seed=1), r"parameters with the digest [0-9a-f]{32}, expected [0-9a-f]{32}"),
    "dtype": (lambda: _in_float16(build("llama")), r"parameters of float16, expected float32"),
    "states": (lambda: build("falcon_h1"), r"module mlx_lm.models.falcon_h1, expected mlx_lm.models.llama"),
}


def _in_float16(model: nn.Module) -> nn.Module:
    model.set_dtype(mx.float16)
    return model


@pytest.mark.two_ranks
@pytest.mark.parametrize("name", OTHERS)
def test_a_cache_of_another_model_is_refused_on_all_ranks(ring: Ring, tmp_path_factory, name: str) -> None:
    """Such a cache would give wrong numbers, or an error inside the next call."""
    make, message = OTHERS[name]
    path, _ = _saved(ring, tmp_path_factory, lm.shard(make(), ring))
    with pytest.raises(lm.CacheFileError, match=rf"^[^\n]*cache.json: another model's: {message}$"):
        lm.load_cache(path, llama(ring))


@pytest.mark.two_ranks
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mamba_d_state": 8}, r"cache 0 with .*state 0 \(1, 6, 8, 8\) float32, expected .*state 0 \(1, 6, 8, 16\)"),
        ({"mamba_d_conv": 3}, r"cache 0 with inputs 0 \(1, 2, 112\) float32, .*, expected inputs 0 \(1, 3, 112\)"),
        ({"num_hidden_layers": 3}, "6 caches, expected 4"),
    ],
)
def test_a_cache_with_other_states_is_one_line(ring: Ring, tmp_path_factory, monkeypatch, changes, message) -> None:
    """Also where the fingerprint does not show it, as where a version of mlx-lm keeps something else."""
    path, cache = _saved(ring, tmp_path_factory, lm.shard(build("falcon_h1", **changes), ring))
    model = lm.shard(build("falcon_h1"), ring)
    monkeypatch.setattr(manifest, "difference", lambda found, expected: None)
    with pytest.raises(lm.CacheFileError, match=rf"^[^\n]*cache.json: another model's: {message}[^\n]*$"):
        lm.load_cache(path, model)
    for use in (
        lambda: lm.save_cache(path, cache, model=model),
        lambda: list(lm.stream_generate(model, words(), [5], prompt_cache=cache)),
    ):
        with pytest.raises(ArgumentError, match=r"^(prompt_)?cache: (cache 0 with|6 |3 )[^\n]*, expected [^\n]*$"):
            use()
    mx.eval(model(mx.zeros((1, 100), mx.int32), cache=model.make_cache()))  # the ring still works


@pytest.mark.two_ranks
@pytest.mark.parametrize("name", ["llama", "falcon_h1"])
def test_layers_of_other_tokens_are_one_line(ring: Ring, tmp_path_factory, name: str) -> None:
    """A user may have trimmed a part of the caches."""
    model = lm.shard(build(name), ring)
    path, cache = _saved(ring, tmp_path_factory, model)
    flat(cache)[-1].trim(100)
    message = r"cache: 0 tokens in one layer and 100 in another, expected equal counts$"
    with pytest.raises(ArgumentError, match=message):
        lm.save_cache(path, cache, model=model)
    with pytest.raises(ArgumentError, match=message):
        list(lm.stream_generate(model, words(), [5], prompt_cache=cache))


@pytest.mark.two_ranks
@pytest.mark.parametrize("name", ["llama", "qwen3_5"])
def test_a_file_that_is_torn_is_named(ring: Ring, tmp_path_factory, name: str) -> None:
    model = lm.shard(build(name), ring)
    path, cache = _saved(ring, tmp_path_factory, model)
    file = sorted(path.parent.glob("*.safetensors"))[-1]
    whole = file.read_bytes()
    _on_rank_0(ring, lambda: file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1])))
    with pytest.raises(ArgumentError, match=r"safetensors: torn or changed: digest [0-9a-f]+, expected"):
        lm.load_cache(path, model)
    _on_rank_0(ring, lambda: file.write_bytes(whole[:-1]))
    with pytest.raises(ArgumentError, match=r"safetensors: torn or changed: bytes \d+, expected"):
        lm.load_cache(path, model)
    with pytest.raises(lm.CacheFileError, match=r"none.json: No such file"):
        lm.load_cache(path.with_name("none.json"), model)
    model(mx.zeros((1, 1), mx.int32), cache=cache)  # the ring still works


TORN = "not the manifest of a prompt cache, or torn"


@pytest.mark.two_ranks
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text[:-9], TORN),
        (lambda text: "[]", TORN),
        (lambda text: "5", TORN),
        (lambda text: "{}", TORN),
        (lambda text: "[" * 10**5, TORN),
        (lambda text: "\xff", TORN),
        (lambda text: text.replace('cache": 4', 'cache": 3'), "of version 3, expected 4"),
        (lambda text: text.replace('"start": 0', '"start": 1'), "torn or changed: a checksum of"),
        (lambda text: _changed(text, "files", lambda files: files[::-1]), "torn or changed: a checksum of"),
        (lambda text: _changed(text, "layers", lambda layers: layers[:-1]), "torn or changed: a checksum of"),
        (lambda text: _changed(text, "layouts", lambda _: []), "torn or changed: a checksum of"),
    ],
)
def test_a_manifest_that_is_wrong_is_one_line(ring: Ring, tmp_path_factory, change, message: str) -> None:
    """Files in another order count too: their keys would be used for other tokens."""
    model = llama(ring)
    path, _ = _saved(ring, tmp_path_factory, model)
    text = change(path.read_text())
    if text == path.read_text():
        pytest.skip("one file has no order")
    _on_rank_0(ring, lambda: path.write_text(text, encoding="latin-1"))
    with pytest.raises(lm.CacheFileError, match=rf"^[^\n]*cache.json: {message}[^\n]*$"):
        lm.load_cache(path, model)


def _changed(text: str, name: str, change: Callable[[Any], Any]) -> str:
    found = json.loads(text)
    return json.dumps({**found, name: change(found[name])})


@pytest.mark.parametrize("fails", ["write", "write_manifest", "publish"])
def test_a_save_that_fails_leaves_nothing(ring: Ring, tmp_path_factory, monkeypatch, fails: str) -> None:
    """The save fails on the last rank. All ranks raise, the cache saved before stays, and the next save works."""
    model = llama(ring)
    path, cache = _saved(ring, tmp_path_factory, model)
    before = {file.name for file in path.parent.iterdir()}
    plain = getattr(atomic_files.Part, fails)

    def failing(part: atomic_files.Part, what: Any = None) -> None:
        plain(part, *(() if what is None else (what,)))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        if ring.rank == ring.size - 1:
            patched.setattr(atomic_files.Part, fails, failing)
        with pytest.raises((OSError, ArgumentError), match="No space left on device"):
            lm.save_cache(path, cache, model=model)
    ring.barrier()
    if fails == "publish":  # too late: a manifest names the new files
        assert not list(path.parent.glob("*.new"))
    else:
        assert {file.name for file in path.parent.iterdir()} == before
    lm.load_cache(path, model)
    lm.save_cache(path, cache, model=model)
    ring.barrier()
    assert len(list(path.parent.iterdir())) == ring.size + 1


@pytest.mark.two_ranks
def test_a_save_in_a_folder_that_is_not_there(ring: Ring, tmp_path_factory) -> None:
    """The error is an OSError, though MLX raises another type."""
    model = llama(ring)
    path, cache = _saved(ring, tmp_path_factory, model)
    with pytest.raises(OSError, match="No such file or directory"):
        lm.save_cache(path.parent / "none" / "cache.json", cache, model=model)


def test_a_save_sweeps_what_others_left(ring: Ring, tmp_path_factory) -> None:
    """Files of killed processes are removed. Files that another process is writing, and other names, stay."""
    model = llama(ring)
    path, cache = _saved(ring, tmp_path_factory, model)
    dead = "0123456789ab-1of2"
    alive = "ba9876543210-1of2"
    orphans = [f"cache.json.{dead}.safetensors", f"cache.json.{dead}.new", "cache.json.0123456789ab-0.new"]
    others = [f"cache.json.{alive}.safetensors", "cache.json.old", "cache.json.copy.safetensors"]
    _on_rank_0(ring, lambda: [path.with_name(name).write_text("x") for name in orphans + others])
    with atomic_files.Part(path, alive) as part:
        if ring.rank == 0:
            part.write({"x": mx.zeros(3)})
        ring.barrier()
        lm.save_cache(path, cache, model=model)
        ring.barrier()
        found = {file.name for file in path.parent.iterdir()}
        ring.barrier()
    assert not found & set(orphans) and found >= set(others)
    assert len(found) == ring.size + 1 + len(others)


def test_what_a_round_sends_stops_growing(ring: Ring) -> None:
    """With a long cache the queries are sent, so a prompt's traffic is linear although every round sees all tokens."""
    model = llama(ring)
    cache, sent = make_prompt_cache(model), []
    for _ in range(16):
        before = ring.bytes_sent
        model(mx.zeros((1, 32 * ring.size), mx.int32), cache=cache)
        sent.append(ring.all_reduce(mx.array(float(ring.bytes_sent - before))).item())
    assert max(sent[6:]) <= 1.05 * min(sent[6:]), sent
