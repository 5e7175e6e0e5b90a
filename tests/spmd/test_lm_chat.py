"""A chat over a ring: after every turn the cache is that of the template of the whole conversation."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from ringattn import Ring, grid

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from families import build, words
from plain_lm import greedy

from ringattn.cli.session import Session
from ringattn.lm.sharding.forward_pass import flat, size_of, tokens_of
from ringattn.lm.sharding.recurrent_cache import TAIL

pytestmark = pytest.mark.two_ranks

ROLES = "{% set roles = {'system': 'w52', 'user': 'w53', 'assistant': 'w54'} %}"
NEXT = "{% if add_generation_prompt %}w51 w54 {% endif %}"
TEMPLATES = {
    "chatml": "{% for m in messages %}w51 {{ roles[m['role']] }} {{ m['content'] }} w55 w56 {% endfor %}",
    "bos": "w50 {% for m in messages %}{{ roles[m['role']] }} {{ m['content'] }} {% endfor %}",
    "system last": "{% for m in messages %}{% if loop.last %}w52 w57 {% endif %}{{ m['content'] }} w55 {% endfor %}",
    "answers cut": "{% for m in messages %}{{ roles[m['role']] }} {{ m['content'].split()[0] }} {% endfor %}",
    "thinking": "{% for m in messages %}w51 {{ roles[m['role']] }} "
    "{{ 'w60 ' + m['content'].split()[-1] if m['role'] == 'assistant' else m['content'] }} w55 {% endfor %}",
}
NEXT_OF = {"thinking": NEXT.replace("w54", "w54 w59")}  # an answer begins with its thoughts, which a next turn drops
HYBRIDS = ["qwen3_5", "falcon_h1"]
TURNS = ("w1 w2 w3", "w4 w5", "w6 w7 w8 w9")


def session(ring: Ring, template: str, family: str, **options: Any) -> Session:
    tokenizer = words()
    tokenizer._tokenizer.chat_template = ROLES + TEMPLATES[template] + NEXT_OF.get(template, NEXT)
    tokenizer.has_chat_template = True
    defaults = {
        **dict.fromkeys(("weights", "prompt_cache_file", "seed", "system_prompt", "chat_template_config")),
        "save_prompt_cache": None,
        "prefill_step_size": 40,
        "max_tokens": 4,
        "model": "x",
        **{"temp": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
    }
    return Session(grid(ring), build(family), tokenizer, {**defaults, **options})


def expected(chat: Session, messages: list[dict[str, str]], family: str) -> tuple[list[int], list[int]]:
    """The ids of the template of the messages, and what plain mlx-lm answers to them."""
    text = chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = chat.tokenizer.encode(text, add_special_tokens=False)
    return ids, greedy(plain(family), ids, chat.options["max_tokens"])


@cache
def plain(family: str) -> nn.Module:
    """A model of the family for mlx-lm alone."""
    return build(family)


@pytest.mark.parametrize("family", ["llama", "gemma3", *HYBRIDS])
@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_cached(ring: Ring, template: str, family: str) -> None:
    """Also where windows have dropped what another template would need, or a state is not kept."""
    chat = session(ring, template, family)
    messages: list[dict[str, str]] = []
    for text in TURNS:
        messages.append({"role": "user", "content": text})
        ids, answer = expected(chat, messages, family)
        new = chat.tokens(text)
        assert new == (ids[size_of(chat.cache) :] if ring.rank == 0 else [])
        assert chat.answer(new) is not None
        assert all(layer.tokens.tolist() == [[*ids, *answer]] for layer in flat(chat.cache))
        messages.append({"role": "assistant", "content": chat.tokenizer.decode(answer)})


@pytest.mark.parametrize("family", ["llama", *HYBRIDS])
def test_only_what_is_new_is_read(ring: Ring, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a template leaves earlier turns as they were."""
    chat = session(ring, "chatml", family)
    chat.answer(chat.tokens(TURNS[0]))
    held = size_of(chat.cache)
    assert len(chat.tokens(TURNS[1])) == (10 if ring.rank == 0 else 0)
    assert size_of(chat.cache) == held
    assert "again" not in capsys.readouterr().err
    chat.reset()
    new = chat.tokens(TURNS[1])
    assert size_of(chat.cache) == 0 and len(new) == (8 if ring.rank == 0 else 0)


@pytest.mark.parametrize("family", ["llama", *HYBRIDS])
def test_thoughts_that_the_next_turn_drops(ring: Ring, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A cache with states goes back to the last one before, at most `TAIL` tokens earlier, and says so on rank 0."""
    chat = session(ring, "thinking", family)
    prompt = 0
    for text in ("w1 " * 100, *TURNS):
        new = chat.tokens(text)
        kept = size_of(chat.cache)
        assert kept == (0 if not prompt else prompt - 1 if family == "llama" else prompt - TAIL)
        said = capsys.readouterr().err
        if ring.rank or family == "llama" or not prompt:
            assert not said
        else:
            again = f"{kept} are reused and {len(new)} read, {TAIL - 1} of these again"
            assert (
                said
                == f"Prompt of {kept + len(new)} tokens: {again}: no state of the recurrent layers is kept there.\n"
            )
        chat.answer(new)
        prompt = size_of(chat.cache) - chat.options["max_tokens"]


@pytest.mark.parametrize("family", ["llama", *HYBRIDS])
@pytest.mark.parametrize("rounds", [0, 2])
def test_a_question_that_is_interrupted(ring: Ring, family: str, rounds: int) -> None:
    """Nothing of it stays, and the earlier conversation is not read again."""
    chat = session(ring, "chatml", family)
    chat.answer(chat.tokens(TURNS[0]))
    held = tokens_of(chat.cache)
    asked = iter(range(100))
    assert chat.answer(chat.tokens("w9 " * 200), stopped=lambda: next(asked) >= rounds) is None
    assert tokens_of(chat.cache) == held
    other = session(ring, "chatml", family)
    other.answer(other.tokens(TURNS[0]))
    assert chat.tokens(TURNS[1]) == other.tokens(TURNS[1])


@pytest.mark.parametrize("family", ["llama", *HYBRIDS])
def test_an_answer_that_is_interrupted(ring: Ring, family: str) -> None:
    """Only the token that was not printed is dropped from the cache."""
    chat = session(ring, "chatml", family)
    calls = iter(range(100))  # two rounds of the prompt, then one for each token
    assert chat.answer(chat.tokens(TURNS[0]), stopped=lambda: next(calls) >= 4) is not None
    held = size_of(chat.cache)
    chat.tokens(TURNS[1])
    assert size_of(chat.cache) == held - 1


@pytest.mark.parametrize("family", ["llama", *HYBRIDS])
@pytest.mark.parametrize("template", ["thinking", "system last"])
def test_a_conversation_that_is_saved(
    ring: Ring, tmp_path_factory: pytest.TempPathFactory, template: str, family: str
) -> None:
    """It goes on as if it had not been, though the template changes the turn before."""
    own = mx.array(list(str(tmp_path_factory.mktemp("cache")).encode()), mx.uint8)
    path = Path(bytes(ring.broadcast(own).tolist()).decode()) / "cache.json"
    chat = session(ring, template, family, save_prompt_cache=path)
    chat.answer(chat.tokens("w1 " * 100))
    chat.save()
    again = session(ring, template, family, prompt_cache_file=path)
    new = [one.tokens(TURNS[1]) for one in (chat, again)]
    assert new[0] == new[1] and size_of(chat.cache) == size_of(again.cache)
    for one, ids in zip((chat, again), new):
        one.answer(ids)
    assert tokens_of(again.cache) == tokens_of(chat.cache)
