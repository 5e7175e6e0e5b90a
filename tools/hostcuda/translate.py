"""PTX in a kernel's text, turned into calls of functions of ``include``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

STATEMENT = re.compile(r"\basm\s*(?:volatile)?\s*\(")
STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
OPERAND = re.compile(r'\s*"[=+&]*([a-z])"\s*\(')
PRODUCT = re.compile(  # {sums}, {A} or A, B, adds, flags
    r"wgmma\.mma_async\S*\s*\{([^}]*)\}\s*,\s*(\{[^}]*\}|%\d+)\s*,\s*(%\d+)\s*,\s*([^\s,;]+)([^;]*);"
)
# What changes nothing here, where every access is in order, and there are no caches
IGNORED = ("fence.", "wgmma.fence", "setmaxnreg", "membar", "griddepcontrol", "prefetch.")


@dataclass(frozen=True)
class Statement:
    """One asm statement.

    Attributes:
        text: The PTX.
        operands: The expressions of %0, %1, ...
        outputs: How many of these are written.
    """

    text: str
    operands: tuple[str, ...]
    outputs: int

    @property
    def written(self) -> tuple[str, ...]:
        """The expressions that are written."""
        return self.operands[: self.outputs]

    @property
    def read(self) -> tuple[str, ...]:
        """The expressions that are read alone."""
        return self.operands[self.outputs :]

    @property
    def listed(self) -> list[str]:
        """The values that follow the instruction's name."""
        _, _, rest = self.text.strip().partition(" ")
        return self.values(rest)

    def values(self, names: str) -> list[str]:
        """The expressions of the ``%N`` in a piece of the text, and its plain numbers."""
        found = re.findall(r"%(\d+)|(?<![\w.%])(-?\d+)", names)
        return [self.operands[int(operand)] if operand else number for operand, number in found]


def translate(text: str) -> str:
    """`text`, which is preprocessed, with a call in the place of each asm statement."""
    parts, end = [], 0
    for start, stop, statement in statements(text):
        parts += [text[end:start], call(statement)]
        end = stop
    return "".join([*parts, text[end:]])


def statements(text: str) -> Iterator[tuple[int, int, Statement]]:
    """The asm statements of `text`, with their beginnings and ends."""
    for match in STATEMENT.finditer(text):
        stop = closing(text, match.end() - 1)
        yield match.start(), stop + 1, parsed(text[match.end() : stop])


def closing(text: str, opening: int) -> int:
    """The place of the parenthesis that closes the one at `opening`."""
    depth, i = 0, opening
    while True:
        if text[i] == '"':
            found = STRING.match(text, i)
            assert found is not None
            i = found.end()
            continue
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
        i += 1


def sections(inside: str) -> list[str]:
    """The parts of an asm statement between its colons."""
    found, i, begin = [], 0, 0
    while i < len(inside):
        if inside[i] == '"':
            match = STRING.match(inside, i)
            assert match is not None
            i = match.end()
        elif inside[i] == "(":
            i = closing(inside, i)
        else:
            if inside[i] == ":":
                found.append(inside[begin:i])
                begin = i + 1
            i += 1
    return [*found, inside[begin:]]


def parsed(inside: str) -> Statement:
    """The statement with this inside."""
    text, *lists = sections(inside)
    groups = [operands(part) for part in lists[:2]]
    flat = tuple(x for group in groups for x in group)
    ptx = "".join(STRING.findall(text)).replace("\\n", "\n").replace("\\t", " ")
    return Statement(ptx, flat, len(groups[0]) if groups else 0)


def operands(part: str) -> list[str]:
    """The expressions of a list of operands."""
    found, i = [], 0
    while match := OPERAND.match(part, i):
        stop = closing(part, match.end() - 1)
        found.append(part[match.end() : stop])
        i = part.find(",", stop) + 1 or len(part)
    return found


def call(statement: Statement) -> str:
    """The call that stands for a statement.

    Raises:
        ValueError: If its instruction is not known.
    """
    text = statement.text
    for part, function in INSTRUCTIONS.items():
        if part in text:
            return f"{function(statement)};"
    if not text or any(part in text for part in IGNORED):
        return ";"
    raise ValueError(f"asm: {text[:80]!r}, expected an instruction that the host runtime knows")


def plain(function: str) -> Callable[[Statement], str]:
    """A function of all operands."""
    return lambda statement: f"host::{function}({', '.join(f'({x})' for x in statement.operands)})"


def counted(function: str) -> Callable[[Statement], str]:
    """A function of what follows the instruction's name: numbers or operands."""
    return lambda statement: f"host::{function}({', '.join(statement.listed)})"


def half(statement: Statement) -> str:
    """The dtype of a product's inputs."""
    return "__nv_bfloat16" if ".bf16" in statement.text else "__half"


def matrices(statement: Statement) -> str:
    """`ldmatrix` or `stmatrix`: the address, then the words."""
    loads = "ldmatrix" in statement.text
    words = statement.written if loads else statement.read[1:]
    function = f"{'ld' if loads else 'st'}matrix<{str('.trans' in statement.text).lower()}>"
    return f"host::{function}({', '.join([statement.read[0], *words])})"


def copy(statement: Statement) -> str:
    """`cp.async`: how many bytes, and how many of these are there."""
    to, source, *present = statement.read
    size = re.search(r"\],\s*(\d+)", statement.text)
    count = size.group(1) if size else present[0]
    return f"host::copy_async({to}, {source}, {count}, {present[-1] if present else count})"


def barrier_wait(statement: Statement) -> str:
    """Waiting for a phase of an mbarrier: a test with an output, or a loop in the text."""
    test = f"host::barrier_ready({', '.join(statement.read[:2])})"
    return f"{statement.written[0]} = {test}" if statement.written else f"while (!{test}) {{}}"


def product(statement: Statement) -> str:
    """A product of a warpgroup: its sums, A in registers or by its descriptor, B, whether it adds, transpositions."""
    found = PRODUCT.search(statement.text)
    if found is None:
        raise ValueError(f"asm: {statement.text[:80]!r}, expected sums, A, B, a predicate or number, and flags")
    sums, a, b, adds, rest = found.groups()
    signs, transposed = (flags := statement.values(rest))[:2], flags[2:]
    if signs not in ([], ["1", "1"]):
        raise ValueError(f"wgmma: signs {signs}, expected 1, 1")
    predicate = re.search(r"setp\.ne\.b32\s+\w+,\s*(%\d+)", statement.text)
    pointers = ", ".join(f"&({x})" for x in statement.values(sums))
    registers = a.startswith("{")
    first = f"{{{', '.join(statement.values(a))}}}" if registers else statement.values(a)[0]
    added = statement.values(predicate.group(1) if predicate else adds)[0]
    turned = ", ".join(transposed or ["0"] * (1 if registers else 2))
    return f"host::wgmma<{half(statement)}>({{{pointers}}}, {first}, {statement.values(b)[0]}, {added}, {turned})"


INSTRUCTIONS: dict[str, Callable[[Statement], str]] = {
    "wgmma.mma_async": product,
    "wgmma.commit_group": plain("wgmma_commit"),
    "wgmma.wait_group": counted("wgmma_wait"),
    "mbarrier.try_wait": barrier_wait,
    "mbarrier.test_wait": barrier_wait,
    "mbarrier.init": counted("barrier_init"),
    "cp.async.mbarrier.arrive": lambda statement: f"host::barrier_arrive_after_copies({', '.join(statement.read)})",
    "mbarrier.arrive": lambda statement: f"host::barrier_arrive({', '.join(statement.read)})",
    "ldmatrix": matrices,
    "stmatrix": matrices,
    "mma.sync": lambda statement: plain(f"mma<{half(statement)}>")(statement),
    "redux.sync.or": lambda statement: f"{statement.written[0]} = host::reduce_or({statement.written[0]})",
    "ex2": lambda statement: f"{statement.written[0]} = std::exp2({statement.read[0]})",
    "cp.async.commit_group": plain("commit_copies"),
    "cp.async.wait_all": plain("wait_for_copies"),
    "cp.async.wait_group": counted("wait_for_groups"),
    "cp.async.c": copy,
    "barrier.cta.sync": counted("named_barrier"),
    "barrier.cta.arrive": counted("named_arrival"),
    "barrier.cta.red.or": lambda statement: f"{statement.written[0]} = host::named_or({', '.join(statement.read)})",
}
