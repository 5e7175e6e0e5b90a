"""The small kernels of the gradient: what is not a matrix product."""

from __future__ import annotations

import mlx.core as mx

from ..backends.blocked import Block, Weights
from . import executor, source
from .call import KernelCall
from .forward import band_inputs

THREADS = 64
RUN = 4  # neighbours of a row that a thread takes, as in weights.metal


def delta_call(out: mx.array, lse: mx.array, dout: mx.array, dlse: mx.array) -> KernelCall:
    """The call of `delta.metal`."""
    rows = lse.size
    return KernelCall(
        name="ringattn_delta",
        input_names=["out", "dout", "lse", "dlse"],
        output_names=["delta"],
        source=source.body("delta"),
        header=source.header(()),
        inputs=[*map(mx.contiguous, (out, dout, lse, dlse))],
        template=[("DV", out.shape[3])],
        grid=(32, rows, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[lse.shape],
        output_dtypes=[mx.float32],
        compile_options={"math_mode": "safe"},
    )


def weights_call(block: Block) -> KernelCall:
    """The call of `weights.metal`."""
    rules, shape = block.rules, block.scores.shape
    band = rules.band if block.partial else None
    inputs = {
        "scores": mx.contiguous(block.scores),
        "by_weights": mx.contiguous(block.by_weights),
        "lse": mx.contiguous(block.rows.lse),
        "delta": mx.contiguous(block.rows.delta),
        "numbers": mx.array([rules.scale, rules.softcap or 0.0]),
    }
    if band is not None:
        inputs |= band_inputs(band, block.q_pos, block.k_pos)
    if rules.segments is not None:
        inputs |= {"query_ids": mx.contiguous(rules.segments[0]), "key_ids": mx.contiguous(rules.segments[1])}
    kind = 0 if rules.mask is None else 1 if rules.mask.dtype == mx.bool_ else 2
    if rules.mask is not None:
        inputs["mask"] = mx.broadcast_to(rules.mask, shape)
    switches = {"BAND": int(band is not None), "SEGMENTS": int(rules.segments is not None), "MASK": kind}
    outputs = ["weights", "by_products", *(["by_mask"] if kind == 2 else [])]
    threads = -(-shape[3] // RUN)
    return KernelCall(
        name="_".join(["ringattn_weights", *(f"{name.lower()}{value}" for name, value in switches.items() if value)]),
        input_names=list(inputs),
        output_names=outputs,
        source=source.body("weights"),
        header=source.header(tuple(switches.items())),
        inputs=list(inputs.values()),
        template=[("SOFTCAP", rules.softcap is not None)],
        grid=(threads, shape[0] * shape[1] * shape[2], 1),
        threadgroup=(min(THREADS, threads), 1, 1),
        output_shapes=[shape] * len(outputs),
        output_dtypes=[mx.float32] * len(outputs),
        compile_options={"math_mode": "safe"},
    )


def weights(block: Block) -> Weights:
    """The elementwise work of a block, by the kernel."""
    found = executor.run(weights_call(block))
    return Weights(found[0], found[1], found[2] if len(found) > 2 else None)
