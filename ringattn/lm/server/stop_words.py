"""Where a text ends because of what it says."""

from __future__ import annotations

from collections.abc import Sequence


class StopWords:
    """Looks for `words` in a text that comes in pieces, also where one is spread over several of them."""

    def __init__(self, words: Sequence[str]):
        self._words = tuple(words)
        self._before = ""  # the end of what has come, in which a word may begin
        self._longest = max((len(word) for word in words), default=0)

    def cut(self, piece: str) -> str | None:
        """`piece` up to the end of the first word that ends in it; ``None`` where none does."""
        text, start = self._before + piece, len(self._before)
        ends = [at + len(word) for word in self._words if (at := text.find(word)) >= 0]
        if ends:
            return text[start : min(ends)]
        self._before = text[len(text) - self._longest + 1 :] if len(text) >= self._longest > 0 else text
        return None
