"""The fused CUDA kernels, and who runs them."""

from .launch import KernelCall, set_executor

__all__ = ["KernelCall", "set_executor"]
