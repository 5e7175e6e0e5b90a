"""The cache of a chat holds the chat template's text of the whole conversation, whatever it does to earlier turns."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from ringattn import ArgumentError

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from ringattn.lm.conversation import Conversation


class Tokenizer:
    """A tokenizer with a chat template, whose tokens are characters."""

    bos_token = "^"

    def __init__(self, knows_system: bool = True):
        self.knows_system = knows_system

    def apply_chat_template(self, messages: list, tokenize: bool, add_generation_prompt: bool = False, **config: Any):
        self.config = config
        first = messages[0]["role"] == "system"
        if first and not self.knows_system:
            raise ValueError("no system role")
        before = "[system Default]" if self.knows_system and not first else ""
        text = "".join(f"[{m['role']} {m['content']}]" for m in messages)
        return self.bos_token + before + text + "[assistant]" * add_generation_prompt

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(map(ord, self.bos_token * add_special_tokens + text))


def shown(ids: list[int]) -> str:
    return "".join(map(chr, ids))


@pytest.mark.parametrize("knows_system", [True, False])
@pytest.mark.parametrize("system", ["Be brief.", None])
def test_every_turn_is_the_template_of_all(knows_system: bool, system: str | None) -> None:
    talk = Conversation(Tokenizer(knows_system), system, {"enable_thinking": False})
    begin = "^" if not knows_system else f"^[system {system or 'Default'}]"
    if system is not None and not knows_system:
        with pytest.raises(ArgumentError, match=r"^the model's chat template: ValueError: no system role$"):
            talk.ask("x")
        return
    assert shown(talk.ask("x")) == f"{begin}[user x][assistant]"
    talk.end_turn("y")
    assert shown(talk.ask("lost")) == f"{begin}[user x][assistant y][user lost][assistant]"
    talk.end_turn(None)
    assert shown(talk.ask("z")) == f"{begin}[user x][assistant y][user z][assistant]"
    assert talk._tokenizer.config == {"enable_thinking": False}


def test_a_saved_conversation_goes_on() -> None:
    """A conversation keeps its own system prompt when another one is given later."""
    talk = Conversation(Tokenizer(), "Be brief.")
    talk.ask("x")
    talk.end_turn("y")
    again = Conversation(Tokenizer(), "Be long.", metadata=talk.metadata, before=[1, 2, 3])
    assert shown(again.ask("z")) == "^[system Be brief.][user x][assistant y][user z][assistant]"


@pytest.mark.parametrize("knows_system", [True, False])
def test_a_cache_of_unknown_messages_comes_first(knows_system: bool) -> None:
    """Neither bos nor a system prompt follows the tokens of that cache."""
    talk = Conversation(Tokenizer(knows_system), "Be brief.", metadata={"model": "x"}, before=list(map(ord, "^old ")))
    assert shown(talk.ask("x")) == "^old [user x][assistant]"
    talk.end_turn("y")
    assert shown(talk.ask("z")) == "^old [user x][assistant y][user z][assistant]"
    assert talk.metadata == {}


def test_plain_text() -> None:
    """Plain text has bos only at the beginning, and no messages to save."""
    talk = Conversation(Tokenizer())
    assert shown(talk.ask_plainly("x", [])) == "^x"
    talk.end_turn("y")
    assert shown(talk.ask_plainly(" z", list(map(ord, "^xy")))) == "^xy z"
    assert talk.metadata == {}
    with pytest.raises(ArgumentError, match="^prompt: no token"):
        talk.ask_plainly("", [1])


def test_plain_text_after_a_conversation() -> None:
    metadata = {"messages": json.dumps([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])}
    talk = Conversation(Tokenizer(), metadata=metadata, before=[1])
    talk.ask_plainly("z", [1, 2])
    talk.end_turn("w")
    assert talk.metadata == {}
