"""Which part of the package may import which: an arrow never runs up, and there is no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ringattn"

# From the bottom up. What stands in one row knows nothing of its neighbours.
FLOORS = [
    {"errors", "_version", "native", "rendezvous", "reporting"},
    {"core", "extras", "tracing"},
    {"autograd"},
    {"kernels", "linear", "transport"},
    {"cpu", "cuda", "metal"},
    {"backends", "layout", "launcher"},
    {"attention", "linear_attention", "ring", "rope"},
    {"ring_attention", "ring_linear_attention", "ring_short_conv", "decode_attention", "training"},
    {"__init__"},
    {"lm", "verify"},
    {"bench", "demo"},
    {"doctor"},
    {"planning"},
    {"cli"},
    {"__main__"},
]
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}

# Layout.gather is the old name of a function that lives above it, and imports that when it is called.
LATE = {("ringattn.layout", "ringattn.ring.gather")}


def modules() -> dict[str, Path]:
    """All modules of the package by their dotted names."""
    files = [path for path in PACKAGE.rglob("*.py") if "samples" not in path.parts]  # an sdist has examples there
    paths = {path: path.relative_to(PACKAGE.parent).with_suffix("") for path in files}
    return {".".join(name.parts).removesuffix(".__init__"): path for path, name in paths.items()}


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """The modules of the package that `name` imports, at its top or later."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            target = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                found = f"{target}.{alias.name}"
                yield found if found in MODULES else target
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


EDGES = {name: {found for found in imports(name) if found in MODULES and found != name} for name in MODULES}


def part(name: str) -> str:
    """The first name below ``ringattn``."""
    return name.split(".")[1] if "." in name else "__init__"


def test_every_part_has_a_floor() -> None:
    assert {part(name) for name in MODULES} == set(FLOOR)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_import_runs_up(name: str) -> None:
    own = part(name)
    upward = {
        found
        for found in EDGES[name]
        if part(found) != own and FLOOR[part(found)] >= FLOOR[own] and (name, found) not in LATE
    }
    assert not upward, f"{name} (floor {FLOOR[own]}) imports {sorted(upward)}"


def test_no_circle() -> None:
    graph = {name: {found for found in edges if (name, found) not in LATE} for name, edges in EDGES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


def test_an_upward_import_and_a_circle_would_be_found() -> None:
    assert FLOOR["ring"] > FLOOR["transport"] > FLOOR["core"]
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
