"""The gradient kernels: a problem turned into calls."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..core.gradients import Rows
from ..kernels.gpu.buffers import rule_arrays, rule_buffers
from ..kernels.gpu.key_tiles import key_tile_ranges
from ..kernels.interface import KernelInputs
from . import source
from .calls import kernel_call, on_gpu, prepared
from .gradient_call import arrays_of, gradient_call, longest_first, mask_output
from .gradient_tiling import GradientTiling
from .launch import KernelCall

THREADS = 128  # of a block of the small kernels
WIDTH = 4  # neighbours that a thread adds up at a time


def query_tile_ranges(inputs: KernelInputs, tiling: GradientTiling) -> np.ndarray:
    """The query tiles of each key tile, int32 ``[key tiles, 4]``: first, full first, full last, last."""
    band = inputs.rules.band.transposed
    return key_tile_ranges(band, inputs.k_pos, inputs.q_pos, tiling.KEYS, 1, tiling.QUERIES)


def deal(reach: np.ndarray, splits: int) -> np.ndarray:
    """Deal key tiles to `splits` thread blocks, the longest first, to and fro: int32 ``[splits, most]``, -1 is none."""
    rounds = -(-len(reach) // splits)
    dealt = np.full(rounds * splits, -1, np.int32)
    dealt[: len(reach)] = longest_first(reach)
    table = dealt.reshape(rounds, splits)
    table[1::2] = table[1::2, ::-1]
    return np.stack([np.append(x[x >= 0], x[x < 0]) for x in table.T])


def backward_call(inputs: KernelInputs, rows: Rows, tiling: GradientTiling, splits: int) -> KernelCall:
    """The call of `backward.cu`.

    Its outputs are float32, without the factor `scale`: dq ``[splits, B * Hq * dq_numbers]`` for `collect_queries.cu`;
    dk ``[B, Hq, Lk, D]`` and dv ``[B, Hq, Lk, Dv]``, to be added up over the heads of a group; and with an
    additive mask its gradient ``[B, Hq, Lq, Lk]``.

    Args:
        inputs: `whole` inputs with at least one query and one key, at most `QUERY_TILES` tiles of queries; q, k and v
            contiguous.
        rows: Their rows; dout in the dtype of q, all contiguous.
        tiling: Their tiling.
        splits: The number of thread blocks for each head.
    """
    batch, heads, q_len = inputs.rows
    where = (tiling.QUERIES, tiling.KEYS), 1, -(-q_len // tiling.QUERIES)

    def make() -> KernelCall:
        reach = query_tile_ranges(inputs, tiling)
        outputs: dict[str, tuple[int, ...]] = {
            "dq": (splits, batch * heads * tiling.dq_numbers(q_len)),
            "dk": (batch, heads, inputs.k.shape[2], inputs.q.shape[3]),
            "dv": (batch, heads, inputs.k.shape[2], inputs.v.shape[3]),
        }
        return gradient_call(
            "backward",
            ("matrix" if inputs.q.dtype.size == 2 else "scalar",),
            inputs,
            rows,
            tiling,
            {"reach": on_gpu(reach), "blocks": on_gpu(deal(reach, splits)), **rule_buffers(inputs, *where)},
            {
                "QUERIES": tiling.QUERIES,
                "HALVES": tiling.halves,
                "FRAGMENTS": tiling.fragments,
                "STAGES": tiling.stages,
            },
            outputs | mask_output(inputs),
            (splits, heads, batch),
        )

    call = prepared((tiling, splits), inputs, make)
    return call.with_inputs({**arrays_of(inputs, rows), **rule_arrays(inputs.rules, *where)})


def collect_call(parts: mx.array, sums: mx.array | None, like: mx.array, factor: float) -> KernelCall:
    """The call of `collect.cu`: ``sums + factor * parts.sum(axis=1)`` for parts ``[outer, count, inner]``, float32.

    The output has the shape of `like`, and without `sums` its dtype.
    """
    width = WIDTH if parts.shape[2] % WIDTH == 0 else 1
    blocks = -(-like.size // (THREADS * width))
    return _collect("collect", {"WIDTH": width}, blocks, {"parts": parts}, sums, like, factor)


def collect_queries_call(
    parts: mx.array, sums: mx.array | None, like: mx.array, factor: float, tiling: GradientTiling
) -> KernelCall:
    """The call of `collect_queries.cu`: `sums` ``[B, Hq, Lq, D]`` and, times `factor`, the dq of `backward_call`.

    The output has the shape of the queries `like`, and without `sums` their dtype.
    """
    defines = {
        "D": like.shape[3],
        "QUERIES": tiling.QUERIES,
        "WARPS": tiling.warps,
        "FRAGMENTS": tiling.fragments,
        "CHUNKS": tiling.chunks,
        "Q_WARPS": tiling.q_warps,
        "D_WARPS": tiling.d_warps,
    }
    buffers = {"parts": parts, "length": on_gpu(np.array([like.shape[2]], np.int32))}
    blocks = -(-parts.shape[1] // (4 * THREADS))
    return _collect("collect_queries", defines, blocks, buffers, sums, like, factor)


def _collect(
    kernel: str,
    defines: dict[str, int],
    blocks: int,
    buffers: dict[str, mx.array],
    sums: mx.array | None,
    like: mx.array,
    factor: float,
) -> KernelCall:
    """The call of a kernel that adds up parts."""
    dtype = like.dtype if sums is None else mx.float32
    return kernel_call(
        kernel,
        (),
        {**defines, "ADDS": int(sums is not None), "OUT": source.TYPES[dtype]},
        {
            **buffers,
            **({} if sums is None else {"sums": mx.contiguous(sums)}),
            "factor": on_gpu(np.array([factor], np.float32)),
        },
        blocks=(blocks, 1, 1),
        threads=THREADS,
        output_names=["out"],
        output_shapes=[like.shape],
        output_dtypes=[dtype],
    )


def rows_call(out: mx.array, lse: mx.array, dout: mx.array, dlse: mx.array) -> KernelCall:
    """The call of `rows.cu`, whose outputs are the lse for the gradient, and delta. All inputs are contiguous."""
    return kernel_call(
        "rows",
        (),
        {"DV": out.shape[3]},
        {"out": out, "dout": dout, "lse": lse, "dlse": dlse},
        blocks=(-(-lse.size // (THREADS // 32)), 1, 1),
        threads=THREADS,
        output_names=["finite_lse", "delta"],
        output_shapes=[lse.shape] * 2,
        output_dtypes=[mx.float32] * 2,
    )
