"""Ending a text at a stop word."""

from __future__ import annotations

from collections.abc import Sequence

from ..mlx_lm_compat import TextStateMachine


class StopWords:
    """Search for `words` in a text that comes in pieces. A word may be spread over several pieces.

    Text that may be the beginning of a word is held back until that is decided. Of several words the one that ends
    first counts, and of words that end together the longest.
    """

    def __init__(self, words: Sequence[str]):
        self._state = TextStateMachine({"text": [(word, None) for word in words]}).make_state("text")

    def push(self, piece: str) -> tuple[str, bool]:
        """Add a piece; return the text that is decided now, and whether a word ended it. No piece may follow a word."""
        self._state, parts = TextStateMachine.split(self._state, piece)
        return "".join(text for _, text in parts), self._state[0] is None

    def flush(self) -> str:
        """Return the text that was held back, after the last piece."""
        self._state, text, _ = TextStateMachine.flush(self._state)
        return text
