"""A chat over a ring: after every turn the cache is that of the template of the whole conversation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from ringattn import Ring, grid

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

import mlx_lm
from families import build, words

from ringattn.cli.session import Session

ROLES = "{% set roles = {'system': 'w52', 'user': 'w53', 'assistant': 'w54'} %}"
NEXT = "{% if add_generation_prompt %}w51 w54 {% endif %}"
TEMPLATES = {
    "chatml": "{% for m in messages %}w51 {{ roles[m['role']] }} {{ m['content'] }} w55 w56 {% endfor %}",
    "bos": "w50 {% for m in messages %}{{ roles[m['role']] }} {{ m['content'] }} {% endfor %}",
    "system last": "{% for m in messages %}{% if loop.last %}w52 w57 {% endif %}{{ m['content'] }} w55 {% endfor %}",
    "answers cut": "{% for m in messages %}{{ roles[m['role']] }} {{ m['content'].split()[0] }} {% endfor %}",
}
TURNS = ("w1 w2 w3", "w4 w5", "w6 w7 w8 w9")


def session(ring: Ring, template: str, family: str, **options: Any) -> Session:
    tokenizer = words()
    tokenizer._tokenizer.chat_template = ROLES + TEMPLATES[template] + NEXT
    tokenizer.has_chat_template = True
    defaults = {
        **dict.fromkeys(("weights", "prompt_cache_file", "seed", "system_prompt", "chat_template_config")),
        "save_prompt_cache": None,
        "prefill_step_size": 40,
        "max_tokens": 6,
        "model": "x",
        **{"temp": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
    }
    return Session(grid(ring), build(family), tokenizer, {**defaults, **options})


def expected(chat: Session, messages: list[dict[str, str]], family: str) -> tuple[list[int], list[int]]:
    """The ids of the template of the messages, and what plain mlx-lm answers to them."""
    text = chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = chat.tokenizer.encode(text, add_special_tokens=False)
    return ids, [r.token for r in mlx_lm.stream_generate(build(family), chat.tokenizer, ids, max_tokens=6)]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_cached(ring: Ring, template: str, family: str) -> None:
    """Also where windows have dropped what another template would need."""
    chat = session(ring, template, family)
    messages: list[dict[str, str]] = []
    for text in TURNS:
        messages.append({"role": "user", "content": text})
        ids, answer = expected(chat, messages, family)
        new = chat.tokens(text)
        assert new == (ids[chat.cache[0].size() :] if ring.rank == 0 else [])
        assert chat.answer(new) is not None
        assert all(layer.tokens.tolist() == [[*ids, *answer]] for layer in chat.cache)
        messages.append({"role": "assistant", "content": chat.tokenizer.decode(answer)})


def test_only_what_is_new_is_read(ring: Ring) -> None:
    """Where a template leaves earlier turns as they were."""
    chat = session(ring, "chatml", "llama")
    chat.answer(chat.tokens(TURNS[0]))
    held = chat.cache[0].size()
    assert len(chat.tokens(TURNS[1])) == (10 if ring.rank == 0 else 0)
    assert chat.cache[0].size() == held


def test_a_question_that_is_interrupted(ring: Ring) -> None:
    chat = session(ring, "chatml", "llama")
    chat.answer(chat.tokens(TURNS[0]))
    held = chat.cache[0].tokens.tolist()
    assert chat.answer(chat.tokens("w9 " * 200), stopped=lambda: True) is None
    assert chat.cache[0].tokens.tolist() == held
    other = session(ring, "chatml", "llama")
    other.answer(other.tokens(TURNS[0]))
    assert chat.tokens(TURNS[1]) == other.tokens(TURNS[1])


def test_a_conversation_that_is_saved(ring: Ring, tmp_path_factory: pytest.TempPathFactory) -> None:
    """It goes on as if it had not been, though the template changes the turn before."""
    own = mx.array(list(str(tmp_path_factory.mktemp("cache")).encode()), mx.uint8)
    path = Path(bytes(ring.broadcast(own).tolist()).decode()) / "cache.json"
    chat = session(ring, "system last", "llama", save_prompt_cache=path)
    chat.answer(chat.tokens(TURNS[0]))
    chat.save()
    again = session(ring, "system last", "llama", prompt_cache_file=path)
    for one in (chat, again):
        one.answer(one.tokens(TURNS[1]))
    assert again.cache[0].tokens.tolist() == chat.cache[0].tokens.tolist()
