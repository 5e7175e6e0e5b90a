"""The forward kernels: a problem turned into calls."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np

from ..core.online_softmax import State
from ..kernels.gpu.buffers import output_arguments, output_switches, rule_buffers, rule_switches, state_buffers
from ..kernels.gpu.key_tiles import key_tile_ranges
from ..kernels.interface import KernelInputs, OutputSpec
from . import source
from .calls import kernel_call, on_gpu
from .hopper_tiling import HopperTiling
from .launch import KernelCall
from .tail import Tail
from .tiling import Tiling

COMBINE_THREADS = 128


def forward_call(
    inputs: KernelInputs,
    tiling: Tiling | HopperTiling,
    group: int,
    splits: int,
    state: State | None,
    output: OutputSpec | None,
    tail: Tail | None = None,
) -> KernelCall:
    """The call of the kernel of `tiling`.

    Args:
        inputs: `whole` inputs with at least one query and one key.
        tiling: Its tiling.
        group: Query heads that are rows of one tile: 1, or all that share a key/value head.
        splits: In how many runs each tile's keys are cut; more than one needs ``output=None``.
        state: What earlier keys left, or ``None``.
        output: What to end in; ``None`` ends in a state, or in states with a first axis `splits` where that is above 1.
        tail: How the last tiles are cut, by `HopperTiling` alone and with ``splits=1``; ``None`` cuts none.
    """
    q, k, v, rules = inputs.q, inputs.k, inputs.v, inputs.rules
    batch, heads, _ = inputs.rows
    tiles = key_tile_ranges(rules.band, inputs.q_pos, inputs.k_pos, tiling.BQ, group, tiling.BK)
    buffers = {
        "queries": q,
        "keys": k,
        "values": v,
        "numbers": on_gpu(np.array([rules.scale, rules.softcap or 0.0], np.float32)),
        "reach": on_gpu(tiles),
        **rule_buffers(inputs, (tiling.BQ, tiling.BK), group, len(tiles)),
        **state_buffers(state, output),
        **({} if tail is None else tail.buffers),
    }
    parts = ("tiles", "softmax", "segments", "odd", *tiling.parts)
    outputs = output_arguments(output, inputs.rows if splits == 1 else (splits, *inputs.rows), v.shape[3])
    blocks = len(tiles) * splits, heads // group, batch
    if tail is not None:
        blocks = tail.blocks, 1, 1
        outputs = {name: [*outputs[name], more] for name, more in zip(outputs, ("parts", tail.sums, mx.float32))}
    call = kernel_call(
        tiling.kernel,
        parts,
        _defines(inputs, tiling, group, output, buffers),
        buffers,
        blocks=blocks,
        threads=tiling.threads,
        shared_memory=tiling.shared_memory,
        **outputs,
    )
    return bounded(call) if isinstance(tiling, HopperTiling) else call


def _defines(
    inputs: KernelInputs,
    tiling: Tiling | HopperTiling,
    group: int,
    output: OutputSpec | None,
    buffers: dict[str, mx.array],
) -> dict[str, int | str]:
    """The macros of a forward kernel: types, sizes, and which of its `buffers` and outputs it has."""
    q, v, rules = inputs.q, inputs.v, inputs.rules
    return {
        "T": source.TYPES[q.dtype],
        "MASK_T": source.TYPES[mx.bool_ if rules.mask is None else rules.mask.dtype],
        "OUT": source.TYPES[mx.float32 if output is None else output.dtype],
        "MATRIX": int(q.dtype.size == 2),
        "BFLOAT": int(q.dtype == mx.bfloat16),
        "D": q.shape[3],
        "DV": v.shape[3],
        **tiling.defines,
        "G": group,
        "SOFTCAP": int(rules.softcap is not None),
        **rule_switches(rules, buffers),
        "STATE_IN": int("acc_in" in buffers),
        "TAIL": int("tail" in buffers),
        **output_switches(output),
    }


def bounded(call: KernelCall) -> KernelCall:
    """Tell the compiler how many threads a block has, on which the number of their registers depends.

    MLX writes the kernel's declaration, with a prefix before the name. A macro of that name adds the bound to it.
    """
    name = f"custom_kernel_{call.name}"
    bound = f"#define {name} __launch_bounds__({call.threadgroup[0]}, 1) {name}\n"
    return replace(call, header=call.header + bound, source=f"#undef {name}\n{call.source}")


def combine_call(states: State, output: OutputSpec | None) -> KernelCall:
    """The call of `combine.cu` for the states of several runs, whose arrays have a first axis `runs`."""
    _, batch, heads, q_len, value_dim = states.acc.shape
    buffers = state_buffers(states, output)
    outputs = output_arguments(output, (batch, heads, q_len), value_dim)
    defines: dict[str, int | str] = {
        "OUT": source.TYPES[outputs["output_dtypes"][0]],
        "DV": value_dim,
        **output_switches(output),
    }
    blocks = -(-batch * heads * q_len * value_dim // COMBINE_THREADS), 1, 1
    return kernel_call("combine", ("softmax",), defines, buffers, blocks=blocks, threads=COMBINE_THREADS, **outputs)
