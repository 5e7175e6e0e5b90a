"""Messages from GPU to GPU, by NCCL, beside a transport that carries everything else."""
