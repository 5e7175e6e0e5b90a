"""Runtime of Metal kernels on Linux: the same source, compiled for the CPU, with every memory access checked."""

from .counters import Counters
from .faults import CompileError, LintError, Report, RuntimeFault
from .lint import lint
from .runtime import Runtime

__all__ = ["CompileError", "Counters", "LintError", "Report", "Runtime", "RuntimeFault", "lint"]
