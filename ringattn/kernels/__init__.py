"""The interface of all kernels, the reference kernel, and the blockwise gradient."""
