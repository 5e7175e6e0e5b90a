"""The fused Metal kernels, and who runs them."""

from .call import KernelCall
from .executor import set_executor

__all__ = ["KernelCall", "set_executor"]
