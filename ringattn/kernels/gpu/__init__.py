"""Parts of the GPU backends that do not depend on the GPU: calls, buffers, tiles and self-tests of kernels."""
