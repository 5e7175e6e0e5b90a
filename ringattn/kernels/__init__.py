"""The interface that all kernels share, and the ones written in plain MLX operations."""
