"""The two elementwise kernels of the gradient. MLX computes its matrix products."""

from __future__ import annotations

import mlx.core as mx

from ..core.gradients import Rows
from ..kernels import reference
from ..kernels.blockwise_backward import ScoreBlock, Weights
from ..kernels.gpu.buffers import band_buffers, mask_switch
from ..kernels.gpu.self_test import trial_error
from . import launch, shader_source
from .launch import KernelCall

THREADS = 64
TRIAL = 40  # rows and keys of a self-test
RUN = 4  # adjacent numbers of a row that one thread computes, as in weights.metal


def delta_call(out: mx.array, lse: mx.array, dout: mx.array, dlse: mx.array) -> KernelCall:
    """Build the call of `delta.metal`."""
    rows = lse.size
    return KernelCall(
        name="ringattn_delta",
        input_names=["out", "dout", "lse", "dlse"],
        output_names=["delta"],
        source=shader_source.body("delta"),
        header=shader_source.header(()),
        inputs=[*map(mx.contiguous, (out, dout, lse, dlse))],
        template=[("DV", out.shape[3])],
        grid=(32 * rows, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[lse.shape],
        output_dtypes=[mx.float32],
        compile_options={"math_mode": "safe"},
    )


def weights_call(block: ScoreBlock) -> KernelCall:
    """Build the call of `weights.metal`."""
    rules = block.rules
    shape = block.scores.shape
    band = rules.band if block.partial else None
    buffers = {
        "scores": mx.contiguous(block.scores),
        "dweights": mx.contiguous(block.dweights),
        "lse": mx.contiguous(block.rows.lse),
        "delta": mx.contiguous(block.rows.delta),
        "numbers": mx.array([rules.scale, rules.softcap or 0.0]),
    }
    if band is not None:
        buffers |= band_buffers(band, block.q_pos, block.k_pos)
    if rules.segments is not None:
        buffers |= {"query_ids": mx.contiguous(rules.segments[0]), "key_ids": mx.contiguous(rules.segments[1])}
    kind = mask_switch(rules.mask)
    if rules.mask is not None:
        buffers["mask"] = mx.broadcast_to(rules.mask, shape)
    switches = {"BAND": int(band is not None), "SEGMENTS": int(rules.segments is not None), "MASK": kind}
    outputs = ["weights", "dproducts", *(["dmask"] if kind == 2 else [])]
    threads = -(-shape[3] // RUN)  # of a row
    return KernelCall(
        name="_".join(["ringattn_weights", *(f"{name.lower()}{value}" for name, value in switches.items() if value)]),
        input_names=list(buffers),
        output_names=outputs,
        source=shader_source.body("weights"),
        header=shader_source.header(tuple(switches.items())),
        inputs=list(buffers.values()),
        template=[("SOFTCAP", rules.softcap is not None)],
        grid=(threads * shape[0] * shape[1] * shape[2], 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[shape] * len(outputs),
        output_dtypes=[mx.float32] * len(outputs),
        compile_options={"math_mode": "safe"},
    )


def weights(block: ScoreBlock) -> Weights:
    """Compute the weights of a block with the kernel, or with plain mx operations if its self-test fails."""
    if launch.default() and not _works(block):
        return reference.elementwise(block)
    found = launch.run(weights_call(block))
    return Weights(found[0], found[1], found[2] if len(found) > 2 else None)


def _works(block: ScoreBlock) -> bool:
    """Test the kernel on the first rows and keys of `block`."""
    call = weights_call(block)
    few = block.part(TRIAL)
    return launch.self_test.works(
        f"{call.name.removeprefix('ringattn_')} for the gradient{', softcap' if block.rules.softcap else ''}",
        lambda: trial_error(
            lambda: launch.run(weights_call(few)), [x for x in reference.elementwise(few) if x is not None]
        ),
    )


def delta(out: mx.array, lse: mx.array, dout: mx.array, dlse: mx.array) -> mx.array:
    """Compute delta of each row (see `ringattn.core.gradients`), with the kernel if its self-test passes."""
    arrays = (out, lse, dout, dlse)
    if launch.default():
        few = [x[:1, :1, :TRIAL] for x in arrays]
        name = f"delta for the gradient, {out.dtype} and {dout.dtype}, head_dim {out.shape[3]}"
        if not launch.self_test.works(
            name, lambda: trial_error(lambda: launch.run(delta_call(*few)), [Rows.of(*few).delta])
        ):
            return Rows.of(*arrays).delta
    return launch.run(delta_call(*arrays))[0]
