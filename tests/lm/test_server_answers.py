"""The text of an answer: stop words and the model's markers end or leave it, and no other text is lost."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

CALL = '{"name": "f", "arguments": {"city": "B"}}'


def tokenizer() -> Any:
    """A tokenizer with a model's markers, in the form of mlx-lm's."""
    from mlx_lm.tool_parsers.json_tools import parse_tool_call

    return Namespace(
        has_thinking=True,
        think_start="<think>",
        think_end="</think>",
        has_tool_calling=True,
        tool_call_start="<tool_call>",
        tool_call_end="</tool_call>",
        tool_parser=parse_tool_call,
        structural_markers=None,
        response_transitions={},
    )


def parse(pieces: Sequence[str], reason: str = "stop", state: str = "normal") -> tuple[str, str, list[str], str | None]:
    """Content, reasoning, names of tools called and the reason to finish."""
    from ringattn.lm.server.api.answers import AnswerParser

    parser = AnswerParser(tokenizer(), state)
    deltas = [parser.push(piece)[0] for piece in pieces]
    last, finish = parser.push("", reason)
    deltas.append(last)
    calls = [call["function"]["name"] for delta in deltas for call in delta.tool_calls]
    return "".join(d.content for d in deltas), "".join(d.reasoning for d in deltas), calls, finish


def cut(text: str, data: Any) -> list[str]:
    """Cut `text` into pieces at random places."""
    at = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    return [text[start:stop] for start, stop in zip([0, *at], [*at, len(text)])]


@pytest.mark.parametrize(
    "text, content, reasoning, calls, finish",
    [
        ("1 < 2, 3 <", "1 < 2, 3 <", "", [], "stop"),
        ("so <tool_cal", "so <tool_cal", "", [], "stop"),
        ("<think>why</think>so", "so", "why", [], "stop"),
        ("<think>why </thi", "", "why </thi", [], "stop"),
        (f"a<tool_call>{CALL}</tool_call>b", "ab", "", ["f"], "tool_calls"),
        (f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>", "", "", ["f", "f"], "tool_calls"),
        (f"<tool_call>{CALL}", "", "", ["f"], "tool_calls"),
        ('<tool_call>{"name": "f", "argu', '{"name": "f", "argu', "", [], "stop"),  # a stop word ended it
        ("<tool_call>no call</tool_call>.", "no call.", "", [], "stop"),
        ("<tool_call>[1]</tool_call>", "[1]", "", [], "stop"),  # mlx-lm's parser raises TypeError
        (f"<tool_call>{CALL}</tool_call></tool", "</tool", "", ["f"], "tool_calls"),
    ],
)
def test_parts_of_an_answer(text: str, content: str, reasoning: str, calls: list[str], finish: str) -> None:
    assert parse([text]) == parse(list(text)) == (content, reasoning, calls, finish)


def test_an_answer_cut_off_by_its_length() -> None:
    assert parse(["so <thi"], "length") == ("so <thi", "", [], "length")
    assert parse(["<tool_call>{"], "length") == ("{", "", [], "length")
    assert parse(["why</think>so"], "length", "reasoning") == ("so", "why", [], "length")


@given(st.text("<>/thinkolca_", max_size=40), st.data())
def test_text_without_a_marker_is_kept_however_it_comes(text: str, data: Any) -> None:
    content, reasoning, calls, _ = parse(cut(text, data))
    if "<think>" not in text and "<tool_call>" not in text:
        assert (content, reasoning, calls) == (text, "", [])


@given(st.lists(st.sampled_from(["<think>", "</think>", "<tool_call>", "</tool_call>", CALL, "<", "a"])), st.data())
def test_pieces_do_not_matter(parts: list[str], data: Any) -> None:
    text = "".join(parts)
    assert parse(cut(text, data)) == parse([text])


def stop(pieces: Sequence[str], words: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop word, and whether there was one."""
    from ringattn.lm.server.stop_words import StopWords

    stops = StopWords(words)
    found = ""
    for piece in pieces:
        text, ended = stops.push(piece)
        found += text
        if ended:
            return found, True
    return found + stops.flush(), False


@pytest.mark.parametrize(
    "words, found",
    [
        (["Paris is"], ("It is Paris", False)),
        (["Paris,"], ("It is Paris", False)),
        (["Paris"], ("It is ", True)),
        (["is"], ("It ", True)),
        (["s P", "is"], ("It ", True)),
        (["ari", "Pari"], ("It is ", True)),  # of two that end together the longest
        ([], ("It is Paris", False)),
    ],
)
def test_stop_words(words: list[str], found: tuple[str, bool]) -> None:
    assert stop(["It is Paris"], words) == stop("It is Paris", words) == found


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3), st.data())
def test_stop_words_end_where_the_text_says(text: str, words: list[str], data: Any) -> None:
    ends = [(at + len(word), at) for word in words if (at := text.find(word)) >= 0]
    expected = (text[: min(ends)[1]], True) if ends else (text, False)
    assert stop(cut(text, data), words) == expected
