"""Checks of the CUDA kernels, and of the Metal kernels translated to CUDA by rules: `python -m tools.nvidia.check`.

The translation shows whether the kernels are right at sizes that no emulator reaches, whether they race, and whether
they leave their buffers. It does not show whether Apple's compiler accepts them, how an Apple GPU rounds, or how fast
they are.

`python -m tools.nvidia.compiler` compiles the CUDA kernels without a GPU.
"""

from tools.nvidia.executor import cuda_executor, translate

__all__ = ["cuda_executor", "translate"]
