"""Time PyTorch's ``context_parallel`` on the problems of `tools.nvidia.scaling`.

Run ``torchrun --nproc-per-node 4 -m tools.nvidia.scaling_torch results.json``. Neither MLX nor ringattn is needed.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel

DIM = 128
SAMPLES, CALLS = 5, 3
BACKENDS = {"FLASH": SDPBackend.FLASH_ATTENTION, "CUDNN": SDPBackend.CUDNN_ATTENTION}
ROTATIONS = ("alltoall", "allgather")


def set_rotation(name: str) -> None:
    """Choose how blocks travel; the function moved between versions of PyTorch."""
    for module in ("_context_parallel._attention", "_context_parallel", "_attention"):
        try:
            found = importlib.import_module(f"torch.distributed.tensor.experimental.{module}")
            found.set_rotate_method(name)
        except (ImportError, AttributeError):
            continue
        return
    raise SystemExit("this PyTorch has no set_rotate_method")


def arrays(heads: int, tokens: int, gradient: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(1, heads, tokens, DIM, dtype=torch.bfloat16, device="cuda") for _ in "qkv"]
    return [x.requires_grad_(gradient) for x in made]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gradient: bool) -> None:
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    if gradient:
        torch.autograd.grad(out, (q, k, v), out)


def sample(call: Callable[[], None], together: bool) -> float:
    """The median seconds of a call, on the slowest rank if all make it `together`."""
    call()
    times = []
    for _ in range(SAMPLES):
        torch.cuda.synchronize()
        if together:
            dist.barrier()
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / CALLS)
    found = torch.tensor(times, device="cuda")
    if together:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return median(found.tolist())


@cache
def alone(backend: str, heads: int, tokens: int, gradient: bool) -> float:
    """The seconds of one GPU."""
    q, k, v = arrays(heads, tokens, gradient)
    with sdpa_kernel(BACKENDS[backend]):
        return sample(lambda: attend(q, k, v, gradient), together=False)


def measure(mesh: DeviceMesh, backend: str, rotation: str, heads: int, tokens: int, gradient: bool) -> dict:
    one = alone(backend, heads, tokens, gradient)
    q, k, v = arrays(heads, tokens, gradient=False)
    set_rotation(rotation)
    with sdpa_kernel(BACKENDS[backend]), context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2]):
        own = [x.detach().requires_grad_(gradient) for x in (q, k, v)]
        seconds = sample(lambda: attend(*own, gradient), together=True)
    size = dist.get_world_size()
    return {
        "what": f"context_parallel {backend} {rotation}",
        "heads": [heads, heads],
        "tokens": tokens,
        "ranks": size,
        "gradient": gradient,
        "seconds": seconds,
        "alone": one,
        "of ideal": one / (size * seconds),
        "gpu": torch.cuda.get_device_name(),
    }


def main() -> None:
    file = Path(sys.argv[1])
    lengths = [int(n) for n in (sys.argv[2] if len(sys.argv) > 2 else "32768,65536,131072").split(",")]
    passes = [False, True] if "--gradient" in sys.argv else [False]
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    records = []
    for gradient in passes:
        for backend in BACKENDS:
            for rotation in ROTATIONS:
                for tokens in lengths:
                    try:
                        record = measure(mesh, backend, rotation, 16, tokens, gradient)
                    except (RuntimeError, TypeError, ValueError) as error:  # all ranks alike
                        record = {"what": f"{backend} {rotation}", "tokens": tokens, "error": str(error)[:300]}
                    records.append(record)
                    if dist.get_rank() == 0:
                        print(json.dumps(record), flush=True)
                        file.write_text(json.dumps(records, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
