"""Tests of the CUDA kernels' text that need no compiler."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ringattn.cuda.source import KERNELS
from tools.nvidia.kernels import GRADIENTS, RESULTS, calls_of


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("variant", [*RESULTS, *GRADIENTS])
def test_every_switch_is_defined_and_braces_match(variant: str, architecture: str) -> None:
    for call in calls_of(variant, architecture):
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", call.header + call.source)
        defined = set(re.findall(r"#define (RA_\w+)", text))
        assert set(re.findall(r"\bRA_\w+\b(?!##)", text)) <= defined
        for pair in ("{}", "()", "[]"):
            assert text.count(pair[0]) == text.count(pair[1])
        assert all(re.search(rf"\b{name}\b", call.source) for name in call.output_names)


def test_every_file_is_used_and_in_the_package() -> None:
    assert {path.suffix for path in KERNELS.iterdir()} == {".cu", ".cuh"}
    assert "cuda/kernels/*" in (Path(__file__).parents[2] / "pyproject.toml").read_text()


def test_atomics_only_count() -> None:
    """Which block counts last does not change the bits; the order of atomic sums would."""
    found = {
        path.name: re.findall(r"\batomic\w+\([^)]*\)|(?<!cta\.)\bred\.", path.read_text()) for path in KERNELS.iterdir()
    }
    assert {name: atomics for name, atomics in found.items() if atomics} == {"runs.cuh": ["atomicAdd(arrived, 1)"]}
