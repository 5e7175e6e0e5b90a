"""The end of a text at a stop word."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_lm.generate import TextStateMachine


class StopWords:
    """Search for `words` in a text that comes in pieces, also for a word that is spread over several of them.

    Text in which a word may begin is held back until that is decided. Of several words the one that ends first counts,
    and of those that end together the longest.
    """

    def __init__(self, words: Sequence[str]):
        self._state = TextStateMachine({"text": [(word, None) for word in words]}).make_state("text")

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that is decided now, and whether a word ended it. Nothing may be pushed after a word."""
        self._state, parts = TextStateMachine.split(self._state, piece)
        return "".join(text for _, text in parts), self._state[0] is None

    def flush(self) -> str:
        """The text that was held back, at the end of all pieces."""
        self._state, text, _ = TextStateMachine.flush(self._state)
        return text
