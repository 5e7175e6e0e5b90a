"""Errors in one line, for reports."""

from __future__ import annotations

LONGEST = 300  # characters of a line


def in_one_line(error: Exception) -> str:
    """Kind of an error and the first line of its message, with the first later line that contains "error", if any.

    Compilers name the cause in such a later line.
    """
    first, *others = str(error).strip().splitlines() or [""]
    cause = next((line.strip() for line in others if "error" in line.lower()), "")
    return f"{type(error).__name__}: {first} {cause}".strip()[:LONGEST]
