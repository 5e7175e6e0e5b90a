"""Document that every Python installation contains, and a question about it."""

from __future__ import annotations

from typing import Any

TOPIC = "debugger"  # of CPython's help: about 20,000 characters of English
QUESTION = "What is the name of the module that this text describes?"


def read_document() -> str:
    """CPython's help text on its debugger."""
    from pydoc_data.topics import topics

    return topics[TOPIC]


def prompt(tokenizer: Any, document: str) -> list[int]:
    """Tokens of a user's turn with the document and then the question."""
    messages = [{"role": "user", "content": f"{document}\n\n{QUESTION}"}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
