"""A runtime that executes the text of the CUDA kernels on the CPU, one thread block after the other.

It knows what the kernels use: threads, barriers, shuffles, shared memory, `cp.async`, `ldmatrix`, `mma.sync`, `wgmma`
and `mbarrier`. Results are those of a GPU up to rounding. It says nothing about speed. It needs g++.
"""

from .executor import KernelError, Runtime, lacking

__all__ = ["KernelError", "Runtime", "lacking"]
