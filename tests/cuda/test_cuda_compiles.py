"""The text of the CUDA kernels, compiled by NVRTC, which needs no GPU."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import pytest
from click.testing import CliRunner

from ringattn.cuda import KernelCall
from ringattn.cuda.source import INCLUDE, KERNELS
from tools.nvidia.compiler import CompileError, Resources, kernel_of, main, resources
from tools.nvidia.kernels import ARCHITECTURES, MEMORY, VARIANTS, calls_of

# Variants whose text is the same on every GPU: it is compiled for the oldest
SHARED = [x for x in VARIANTS if x in MEMORY or any(part in x for part in ("float32", "keys split", "20 queries"))]
# Variants whose tiles are larger where there is the shared memory of Hopper and no wgmma
LARGER = [
    "bfloat16, 128, causal",
    "float16, 64, many rows",
    "gradient, bfloat16, 128, causal",
    "gradient, bfloat16, 64",
]
# Variants whose tiles are the smallest: their GPU has less shared memory than the oldest
SMALLER = [
    "bfloat16, 128, causal",
    "float16, 64, everything",
    "gradient, bfloat16, 128, causal",
    "gradient, bfloat16, 256, additive mask",
    "gradient, float32, 64, everything",
]
COMPILED = {
    "sm_80": VARIANTS,
    "sm_90a": [variant for variant in VARIANTS if variant not in SHARED],
    "sm_100a": LARGER,
    "sm_121a": SMALLER,
}
CASES = [(architecture, variant) for architecture, variants in COMPILED.items() for variant in variants]
# Variants without a softcap, of 64 or 128 dims, or 256 in a gradient, of which a kernel by wgmma spills, and the bytes
# that it may: up to twice what NVRTC 13.5 makes of them
SPILLING = {
    "bfloat16, 128, causal": 48,
    "bfloat16, 128, a state": 48,
    "bfloat16, 128, causal, a state": 48,
    "bfloat16, 128, keys of the last tiles split": 48,
    "float16, 64, many rows, keys of the last tiles split": 512,
    "float16, 64, keys of the last tiles split, a state": 160,
    "bfloat16, 64": 160,
    "float16, 64, many rows": 512,
    "gradient, bfloat16, 128, causal": 32,
    "gradient, bfloat16, 64, columns": 16,
}

LOG = """ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas         .     24 bytes stack frame, 20 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 168 registers, used 8 barriers, 24 bytes cumulative stack size, 1024 bytes smem
"""
SWITCH = re.compile(r"^#\s*(?:el)?if\b.*", re.MULTILINE)
# One value: kernels by wgmma have no float32, and only they cut the last tiles
ALWAYS = {("forward_hopper", "MATRIX"), ("backward_hopper", "MATRIX"), ("forward", "TAIL")}
SIZES = {
    "forward": {"T": 3, "MASK_T": 4, "OUT": 3, "MASK": 3, "G": 2, "WARPS": 3, "FRAGMENTS": 2, "STAGES": 2, "BK": 3},
    "forward_hopper": {"T": 2, "MASK_T": 3, "OUT": 3, "MASK": 3, "WARPS": 2, "STAGES": 2, "BK": 2, "TURNS": 2},
    "backward": {"T": 3, "MASK": 3, "WARPS": 3, "HALVES": 2, "FRAGMENTS": 2, "STAGES": 2, "QUERIES": 4},
    "backward_hopper": {"T": 2, "OUT": 3, "MASK": 3, "OF_KEYS": 2, "ADDS": 2, "SCALES": 2, "PASSING": 5, "STAGES": 2},
    "combine": {"OUT": 3},
    "collect": {"WIDTH": 2, "OUT": 3, "ADDS": 2},
    "collect_queries": {"OUT": 3, "ADDS": 2},
    "rows": {"INPUT_out": 3},
}


def macros(call: KernelCall) -> dict[str, str]:
    """The macros that a call defines."""
    return dict(re.findall(r"^#define RA_(\w+) (\S+)$", call.header, re.MULTILINE))


@pytest.fixture(scope="module")
def values() -> dict[str, dict[str, set[str]]]:
    """The values of each macro of each kernel in all cases."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for architecture, variant in CASES:
        for call in calls_of(variant, architecture):
            for name, value in macros(call).items():
                found[kernel_of(call)][name].add(value)
    return found


def switches(call: KernelCall) -> Iterator[str]:
    """The macros that decide which lines of a call's text are compiled."""
    for line in SWITCH.findall(call.header + call.source):
        yield from (name for name in re.findall(r"\bRA_(\w+)", line) if name in macros(call))


def test_every_kernel_and_switch_has_a_case(values) -> None:
    included = {name for path in KERNELS.iterdir() for name in INCLUDE.findall(path.read_text())}
    assert {path.stem for path in KERNELS.glob("*.cu") if path.name not in included} <= set(values)
    for architecture, variant in CASES:
        for call in calls_of(variant, architecture):
            kernel = kernel_of(call)
            missing = {x for x in switches(call) if (kernel, x) not in ALWAYS and len(values[kernel][x]) < 2}
            assert not missing, f"{kernel}: no case with another value of {missing}"


@pytest.mark.parametrize("kernel", SIZES)
def test_every_size_has_a_case(values, kernel: str) -> None:
    assert {name: len(values[kernel][name]) for name in SIZES[kernel]} == SIZES[kernel]


@pytest.mark.parametrize("variant", SHARED)
def test_a_text_compiled_for_one_gpu_is_the_same_on_all(variant: str) -> None:
    assert len({tuple(call.name for call in calls_of(variant, name)) for name in ARCHITECTURES}) == 1


def test_the_log_is_read() -> None:
    assert Resources.of(LOG) == Resources(168, 20 + 32, 1024)
    remark = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert Resources.of(f"{LOG}{remark}\n").remarks == (remark,)
    with pytest.raises(ValueError, match="expected registers and spills"):
        Resources.of("ptxas info    : Used 12 registers\n")


def lean(call: KernelCall) -> bool:
    """Whether a call's kernel is by wgmma, and one of those whose numbers should fit into the registers."""
    found = macros(call)
    dims = {found.get("D"), found.get("DV")}
    wide = {"256"} if kernel_of(call) == "backward_hopper" else set()
    return "hopper" in kernel_of(call) and dims <= {"64", "128", *wide} and found["SOFTCAP"] == "0"


@pytest.mark.cuda
@pytest.mark.parametrize(("architecture", "variant"), CASES)
def test_every_kernel_compiles(architecture: str, variant: str) -> None:
    for call in calls_of(variant, architecture):
        found = resources(call, architecture)
        assert not found.remarks
        if lean(call):
            assert found.spilled <= SPILLING.get(variant, 0)


@pytest.mark.cuda
def test_a_wrong_text_is_refused() -> None:
    (call,) = calls_of("pack", "sm_80")
    wrong = replace(call, source=f"{call.source}\nint twice = nothing;")
    with pytest.raises(CompileError, match=f'{call.name}: .* for sm_80:\n.*error: identifier "nothing" is undefined'):
        resources(wrong, "sm_80")


@pytest.mark.cuda
def test_an_instruction_that_a_gpu_lacks_is_refused() -> None:
    call = next(call for call in calls_of("bfloat16, 64", "sm_90a") if "hopper" in call.name)
    with pytest.raises(CompileError, match="(?s)for sm_80:.*wgmma"):
        resources(call, "sm_80")


@pytest.mark.cuda
def test_the_table_has_a_line_for_each_kernel() -> None:
    done = CliRunner().invoke(main, ["-a", "sm_80", "-k", "keys split"])
    assert done.exit_code == 0, done.output
    assert re.findall(r"^(\w+)  +\S.*?  +\d+  +0  +\d+  ", done.output, re.MULTILINE) == ["forward", "combine"] * 3
