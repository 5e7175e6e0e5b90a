"""Checks of the CUDA kernels, and of the Metal kernels translated to CUDA by rule: `python -m tools.nvidia.check`.

What the translation can tell: whether they are right at sizes that no emulator of a GPU reaches, whether they race, and
whether they leave their memory. What it cannot: whether Apple's compiler takes them, how an Apple GPU rounds, and how
fast they are.
"""

from tools.nvidia.executor import cuda_executor, translate

__all__ = ["cuda_executor", "translate"]
