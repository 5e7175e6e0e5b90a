"""The fused Metal kernels, and the executor that runs them."""

from .launch import KernelCall, set_executor

__all__ = ["KernelCall", "set_executor"]
