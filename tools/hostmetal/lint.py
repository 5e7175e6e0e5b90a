"""ScoreRules of Metal that clang does not know, checked on the text.

The compilation of a kernel checks two more: casts that change the address space, and conversion of a wider type to
bfloat without a cast.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .rewrite import THREADGROUP, declared, without_comments

SCALARS = ["bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "half", "bfloat", "float"]
_SPACES = {"device", "threadgroup", "constant", "thread", "object_data", "ray_data"}
_NAMED = re.compile(
    r"\b(?:typename|class|struct)\s+(?:alignas\([^)]*\)\s*)?(\w+)|\busing\s+(\w+)\s*=|\btypedef\b[^;{}]*?(\w+)\s*;"
)
_KERNEL = re.compile(r"\[\[\s*kernel\b|^\s*kernel\s+void\b", re.M)
_DOUBLE = re.compile(
    r"\bdouble\b|\bM_(?:E|LOG2E|LOG10E|LN2|LN10|PI|PI_2|PI_4|SQRT2|SQRT1_2)\b|\b\d[\d.]*[lL][fF]\b|\bDBL_\w+"
)


def lint(text: str) -> list[str]:
    """List the errors in the text of a kernel, one line each."""
    text = without_comments(text)
    found = [*_doubles(text), *_bare_pointers(text), *_stray_arrays(text)]
    return [f"line {text.count(chr(10), 0, at) + 1}: {what}" for at, what in sorted(found)]


def _doubles(text: str) -> Iterator[tuple[int, str]]:
    for match in _DOUBLE.finditer(text):
        yield match.start(), f"Metal has no double: {match[0]}"


def _bare_pointers(text: str) -> Iterator[tuple[int, str]]:
    """Find pointers and references to a known type without an address space."""
    names = {name for match in _NAMED.finditer(text) for name in match.groups() if name}
    builtin = {s + n for s in SCALARS for n in ("", "2", "3", "4")}
    sized = {f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)}
    known = names | builtin | sized | {"bfloat16_t", "float16_t", "size_t", "void"} - _SPACES
    types = "|".join(sorted(known, key=len, reverse=True))
    pattern = re.compile(
        rf"(?P<words>(?:\b\w+\s+)*)(?P<type>(?<![\w:.>])(?:metal::)?(?:{types}|(?:vec|simdgroup_matrix)\s*<[^<>;()]*>))"
        r"(?P<after>(?:\s+\w+)*)\s*(?P<star>\*|&)(?!&)\s*(?:const\s+)?(?P<name>\w*)\s*(?P<next>.)",
        re.S,
    )
    for match in pattern.finditer(text):
        if _SPACES & {*match["words"].split(), *match["after"].split()} or not _declares(text, match):
            continue
        shown = " ".join(f"{match['words']}{match['type']}{match['star']} {match['name']}".split())
        yield match.start("type"), f"a pointer or reference needs an address space: {shown}"


def _declares(text: str, match: re.Match[str]) -> bool:
    """Return whether ``type * name`` is a declaration and not a product."""
    if match["after"].strip() not in ("", "const"):
        return False
    before = text[: match.start()].rstrip()[-1:]
    if match["name"]:
        return before in ("", ";", "{", "}", "(", ",", "<", ">", ":", "]") and match["next"] in "=;,)[({:"
    return before in ("(", "<", ",") and match["next"] in "),>*"


def _stray_arrays(text: str) -> Iterator[tuple[int, str]]:
    """Find variables in threadgroup memory that are declared outside a kernel's body."""
    bodies = list(_kernel_bodies(text))
    for match in THREADGROUP.finditer(text):
        at = match.start(2)
        if declared(match) and not any(start < at < end for start, end in bodies):
            yield at, f"threadgroup memory is declared in a kernel's body only: {match[2].strip()}"


def _kernel_bodies(text: str) -> Iterator[tuple[int, int]]:
    for match in _KERNEL.finditer(text):
        start = _matching(text, text.find("(", _after_attribute(text, match)), "()")
        opening = text.find("{", start)
        if opening >= 0 and ";" not in text[start:opening]:
            yield opening, _matching(text, opening, "{}")


def _after_attribute(text: str, match: re.Match[str]) -> int:
    return text.find("]]", match.start()) + 2 if match[0].startswith("[[") else match.end()


def _matching(text: str, at: int, pair: str) -> int:
    """Find the position after the bracket that matches the first one at or after `at`."""
    depth = 0
    while 0 <= at < len(text):
        depth += {pair[0]: 1, pair[1]: -1}.get(text[at], 0)
        at += 1
        if depth == 0:
            return at
    return len(text)
