"""Compile the CUDA kernels without a GPU, and print what they need: ``python -m tools.nvidia.compiler``.

This needs ``pip install 'ringattn[cuda-compiler]'``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import click

from ringattn.cuda.source import KERNELS
from ringattn.kernels.gpu.launch import KernelCall
from ringattn.reporting.tables import format_table

from . import nvrtc
from .kernels import ARCHITECTURES, VARIANTS, calls_of
from .nvrtc import CompileError, compiled
from .program import program

HEADER = ("kernel", "outputs", "registers", "spilled", "shared memory", "variant")
ALIGN = "<<>>><"
REMARK = re.compile(r"warning|performance", re.IGNORECASE)  # such as "Potential Performance Loss: wgmma ... serialized"


@dataclass(frozen=True)
class Resources:
    """Resources of a compiled kernel.

    Attributes:
        registers: Registers of a thread at the start of the kernel.
        spilled: Bytes that the text moves between registers and memory for lack of registers, stores and loads.
        shared_memory: Bytes of static shared memory of a block.
        remarks: Lines of the compiler's log that warn.
    """

    registers: int
    spilled: int
    shared_memory: int
    remarks: tuple[str, ...] = ()

    @classmethod
    def of(cls, log: str) -> Resources:
        """Read the log of the compiler with ``--ptxas-options=-v``.

        Raises:
            ValueError: If the log does not tell registers and spills.
        """
        registers, spills, shared = (
            [int(number) for number in re.findall(pattern, log)]
            for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill", r"(\d+) bytes smem")
        )
        if not registers or not spills:
            raise ValueError(f"log: {log[:200]!r}, expected registers and spills, as of ptxas -v")
        remarks = filter(REMARK.search, log.splitlines())
        return cls(max(registers), sum(spills), max(shared, default=0), tuple(remarks))


def resources(call: KernelCall, architecture: str) -> Resources:
    """Compile the kernel of `call` for a GPU, such as ``"sm_90a"``.

    Raises:
        CompileError: If the compiler refuses it.
    """
    try:
        return Resources.of(compiled(program(call), architecture))
    except CompileError as error:
        raise CompileError(f"{call.name}: {error}") from None


def kernel_of(call: KernelCall) -> str:
    """The name of a kernel without digest."""
    return call.name.removeprefix("ringattn_").removeprefix("cuda_").rpartition("_")[0]


def table(architecture: str, part: str) -> str:
    """A line for each kernel of `architecture` whose name or variant contains `part`."""
    return format_table(HEADER, list(_rows(architecture, part)), align=ALIGN, rule=True)


def _rows(architecture: str, part: str) -> Iterator[tuple[str, ...]]:
    seen = set()
    for variant in VARIANTS:
        for call in calls_of(variant, architecture):
            kernel = kernel_of(call)
            if (part not in kernel and part not in variant) or call.name in seen:
                continue
            seen.add(call.name)
            found = resources(call, architecture)
            shared = found.shared_memory + call.shared_memory
            numbers = map(str, (found.registers, found.spilled, shared))
            yield kernel, ", ".join(call.output_names), *numbers, variant
            yield from (("", "", "", "", "", remark) for remark in found.remarks)


@click.command()
@click.option("--architecture", "-a", type=click.Choice(list(ARCHITECTURES)), multiple=True, help="Only this GPU's.")
@click.option("--part", "-k", default="", help="Only kernels whose name or variant contains this text.")
def main(architecture: tuple[str, ...], part: str) -> None:
    """Print registers, bytes spilled and shared memory of each kernel."""
    if problem := nvrtc.lacking():
        raise click.ClickException(problem)
    if not any(part in name for name in (*VARIANTS, *(path.stem for path in KERNELS.iterdir()))):
        raise click.ClickException(f"--part: {part!r}, expected a part of a kernel's or a variant's name")
    for name in architecture or ARCHITECTURES:
        try:
            click.echo(f"{name}\n{table(name, part)}\n")
        except CompileError as error:
            raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
