"""MLX's own attention kernel, from the headers in its wheel, for comparison of its counters with ours."""

from __future__ import annotations

import math
import re
from pathlib import Path

import mlx.core as mx
import numpy as np

from .compiler import kernel_function
from .launch import Launch, Region
from .memory import map_input, map_output, raw_dtype, raw_view, to_mlx
from .rewrite import to_host
from .runtime import Runtime
from .source import TYPES, entry_text

INCLUDE = Path(mx.__file__).parent / "include"
KERNELS = "mlx/backend/metal/kernels/steel/attn/kernels"
FUNCTION_CONSTANT = re.compile(r"constant bool (\w+) \[\[function_constant\(\d+\)\]\];")
OWN_INCLUDE = re.compile(r'^#include "(mlx/[^"]*)"|^#pragma once', re.MULTILINE)
PLACE = [
    "p->lane",
    "p->simdgroup",
    "HOSTMETAL_UINT3(p->threadgroup_position)",
    "HOSTMETAL_UINT3(p->in_threadgroup)",
]


def blocks(head_dim: int, dtype: mx.Dtype) -> tuple[int, int, int]:
    """Return (BQ, BK, WN) as MLX 0.32.4 chooses them; WM is 4."""
    if head_dim == 256:
        return 32, 16 if dtype == mx.float32 else 32, 2
    return 32, 32 if head_dim < 128 else 16, 1


def steel_attention(
    runtime: Runtime,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    causal: bool,
    scale: float,
    save_lse: bool = False,
    tensor_ops: bool = False,
) -> tuple[mx.array, mx.array | None]:
    """Run MLX's kernel. The last query is aligned with the last key.

    Args:
        runtime: The runtime, which counts.
        q: Queries (batch, heads, q_len, head_dim).
        k: Keys (batch, kv_heads, k_len, head_dim).
        v: Values, like `k`.
        causal: Whether a query sees only the keys up to its own.
        scale: The factor of the scores.
        save_lse: Whether the kernel writes the log-sum-exp, as in MLX's training.
        tensor_ops: Whether to run the kernel for the M5's matrix units.

    Returns:
        The output, like `q`, and the log-sum-exp (batch, heads, q_len) or ``None``.
    """
    batch, heads, q_len, head_dim = q.shape
    bq, bk, wn = (64, 32, 1) if tensor_ops else blocks(head_dim, q.dtype)
    kernel = "attention_nax" if tensor_ops else "attention"
    facts = {
        "align_Q": q_len % bq == 0,
        "align_K": k.shape[2] % bk == 0,
        "has_mask": False,
        "do_causal": causal,
        "has_sinks": False,
        "save_lse": save_lse,
    }
    kind = TYPES[q.dtype]
    instance = f"{kernel}<{kind}, {bq}, {bk}, {head_dim}, {head_dim}, 4, {wn}, {kind}, float>"
    q_raw, k_raw, v_raw = map(raw_view, (q, k, v))
    out, out_map = map_output(raw_dtype(q.dtype), q.shape, None)
    lse, lse_map = map_output(np.dtype(np.float32), (batch, heads, q_len), None)
    params = attention_params(q_raw, k_raw, v_raw, out, scale, bq, bk)

    maps = {"q": map_input(q_raw), "k": map_input(k_raw), "v": map_input(v_raw), "out": out_map}
    maps |= {"params": map_input(params), "lse": lse_map}
    kinds = {"q": "input", "k": "input", "v": "input", "out": "output", "params": "constant", "lse": "output"}
    elements = {"params": 4, "lse": 4}
    if not save_lse:
        del maps["lse"]
    regions = [Region(n, kinds[n], m.base, m.size, elements.get(n, q.dtype.size)) for n, m in maps.items()]
    starts = [maps[n].start if n else 0 for n in ("q", "k", "v", "out", "params", "", "", "", "lse" * save_lse)]

    text = kernel_source(kernel, facts) + entry_text(instance, arguments(kind))
    library, entry, _ = kernel_function(text)  # keep `library` alive while the kernel runs
    grid = (math.ceil(q_len / bq) * 32, heads * 4, batch * wn)
    runtime.run_launch(kernel, Launch(entry, starts, regions, grid, (32, 4, wn), None))
    return to_mlx(out, q.dtype), mx.array(lse) if save_lse else None


def kernel_source(kernel: str, facts: dict[str, bool]) -> str:
    """Read the kernel's file, with its function constants turned into plain constants."""
    name = {"attention": "steel_attention.h", "attention_nax": "steel_attention_nax.h"}[kernel]
    text = with_includes(f"{KERNELS}/{name}", set())
    text = FUNCTION_CONSTANT.sub(lambda m: f"constant constexpr bool {m[1]} = {str(facts[m[1]]).lower()};", text)
    return f'#include "mlx_utils.h"\n#include "hostmetal_entry.h"\n{to_host(text)}\n'


def with_includes(name: str, seen: set[str]) -> str:
    """Read a file of MLX and insert the files that it includes, each once."""
    if name in seen:
        return ""
    seen.add(name)
    text = OWN_INCLUDE.sub(lambda m: with_includes(m[1], seen) if m[1] else "", (INCLUDE / name).read_text())
    return f'#line 1 "{name}"\n{text}\n'


def arguments(kind: str) -> list[str]:
    types = [f"const device {kind}"] * 3 + [f"device {kind}", "const constant AttnParams"]
    types += ["const constant AttnMaskParams", f"const device {kind}", f"const device {kind}", "device float"]
    return [f"HOSTMETAL_POINTER({t}, a[{i}])" for i, t in enumerate(types)] + PLACE


def attention_params(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray, scale: float, bq: int, bk: int
) -> np.ndarray:
    """Pack MLX's `AttnParams`, byte by byte."""
    names = ["B", "H", "D", "qL", "kL", "group", "scale", "NQ", "NK", "NQ_aligned", "NK_aligned"]
    names += ["qL_rem", "kL_rem", "qL_off"]
    fields = [(name, np.float32 if name == "scale" else np.int32) for name in names]
    fields += [(f"{name}_strides", np.int64, 3) for name in "QKVO"]
    batch, heads, q_len, head_dim = q.shape
    k_len = k.shape[2]
    values = (batch, heads, head_dim, q_len, k_len, heads // k.shape[1], scale, -(-q_len // bq), -(-k_len // bk))
    values += (q_len // bq, k_len // bk, q_len % bq, k_len % bk, k_len - q_len)
    strides = tuple([s // a.itemsize for s in a.strides[:3]] for a in (q, k, v, out))
    return np.array([(*values, *strides)], np.dtype(fields, align=True))
