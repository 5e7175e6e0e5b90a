"""Rewriting of Metal source to C++: a few mechanical changes, line by line."""

from __future__ import annotations

import itertools
import re

COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
HOST_NAME = re.compile(r"template\s*\[\[\s*host_name\([^\]]*\)\s*\]\]\s*\[\[\s*kernel\s*\]\]")
ARGUMENT = re.compile(r"\[\[\s*threadgroup\(\d+\)\s*\]\]")  # in these, `threadgroup` is no address space
THREADGROUP = re.compile(r"(?:(?<=[;{}\n])|^)(\s*)threadgroup\s+([^;=]*);")
DECLARED = re.compile(r"((?:unsigned\s+)?[\w:]+(?:\s*<.*>)?)\s+(\w.*)", re.DOTALL)
CAST = re.compile(
    r"\(\s*((?:const\s+)?(?:device|threadgroup|constant)\s[^(){};,]*\*)\s*\)\s*(?=[\w(&*])(?!const\b|thread\b)"
)
VEC = re.compile(r"\bvec\s*<")


def without_comments(text: str) -> str:
    """Replace comments by spaces, so that line numbers stay."""

    def blank(match: re.Match[str]) -> str:
        found = match.group()
        return found if found.startswith('"') else re.sub(r"[^\n]", " ", found)

    return COMMENT.sub(blank, text)


def split_outside(text: str, separator: str = ",") -> list[str]:
    """Split `text` at the separators that no bracket encloses."""
    parts = []
    depth = 0
    start = 0
    for i, c in enumerate(text):
        depth += (c in "([{<") - (c in ")]}>")
        if c == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def threadgroup_arrays(text: str) -> str:
    """Turn ``threadgroup T x[N];`` into a reference to memory that the core keeps for the threadgroup."""
    numbers = itertools.count()

    def declare(match: re.Match[str]) -> str:
        found = declared(match)
        if not found:
            return match.group()
        element, declarators = found
        lines = match.group(2).count("\n")
        made = [one_array(element, d.strip(), next(numbers)) for d in split_outside(declarators)]
        return match.group(1) + " ".join(made).replace("\n", " ") + "\n" * lines

    return THREADGROUP.sub(declare, text)


def declared(match: re.Match[str]) -> tuple[str, str] | None:
    """Return the element's type and the declarators, if `THREADGROUP` matched arrays or variables and no pointers."""
    found = DECLARED.fullmatch(match.group(2).strip())
    outside = re.sub(r"\[.*?\]|<.*?>", "", match.group(2), flags=re.DOTALL)
    return found.groups() if found and not re.search(r"[*&(){}]", outside) else None


def one_array(element: str, declarator: str, number: int) -> str:
    name = re.match(r"\w+", declarator).group()
    kind = f"hostmetal_array_{number}"
    return (
        f"typedef {element} {kind}{declarator[len(name) :]}; threadgroup {kind}& {name} = "
        f"*reinterpret_cast<threadgroup {kind}*>(hostmetal_threadgroup({number}, sizeof({kind}), sizeof({element}), "
        f'"{name}"));'
    )


def vector_constructors(text: str) -> str:
    """Turn ``vec<T, N>(a, b)`` into ``make_vec<T, N>(a, b)``: clang's vectors have no such constructor."""
    out = []
    start = 0
    for match in VEC.finditer(text):
        depth = 1
        end = match.end()
        while depth and end < len(text):
            depth += (text[end] == "<") - (text[end] == ">")
            end += 1
        if text[end:].lstrip()[:1] == "(":
            out += [text[start : match.start()], "make_"]
            start = match.start()
    return "".join([*out, text[start:]])


def to_host(text: str) -> str:
    text = ARGUMENT.sub("", HOST_NAME.sub("template", without_comments(text)))
    return vector_constructors(threadgroup_arrays(CAST.sub(r"hostmetal_cast<\1>{} ->* ", text)))
