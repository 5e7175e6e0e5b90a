"""The calls of the forward kernel and of the kernel that combines its states."""

from __future__ import annotations

import mlx.core as mx

from ..core.online_softmax import State
from ..kernels.gpu.buffers import (
    output_arguments,
    output_switches,
    padded,
    rule_buffers,
    rule_switches,
    state_buffers,
)
from ..kernels.gpu.key_tiles import key_tile_ranges
from ..kernels.interface import KernelInputs, OutputSpec
from . import shader_source
from .launch import KernelCall
from .tiling import Tiling

COMBINE_THREADS = 64


def forward_call(
    inputs: KernelInputs, tiling: Tiling, group: int, splits: int, state: State | None, output: OutputSpec | None
):
    """Build the call of `forward.metal`.

    Args:
        inputs: `whole` inputs or a part of them, with at least one query and one key.
        tiling: The tiling.
        group: Query heads that are rows of one tile: 1, or all that share a key/value head.
        splits: Number of runs that the keys of each tile are split into. More than one needs ``output=None``.
        state: The state over earlier keys, or ``None``.
        output: The results to return. ``None`` returns a state, with a first axis `splits` where that is above 1.
    """
    q, v, rules = inputs.q, inputs.v, inputs.rules
    batch, heads, _ = inputs.rows
    tiles = key_tile_ranges(rules.band, inputs.q_pos, inputs.k_pos, tiling.BQ, group, tiling.BK)
    buffers = {
        "queries": q,
        "keys": inputs.k,
        "values": v,
        "numbers": mx.array([rules.scale, rules.softcap or 0.0]),
        "key_tiles": padded(mx.array(tiles)),
        **rule_buffers(inputs, (tiling.BQ, tiling.BK), group, len(tiles)),
        **state_buffers(state, output),
    }
    switches = {
        "TENSOR": int(tiling.tensor),
        **rule_switches(rules, buffers),
        "STATE_IN": int(state is not None),
        **output_switches(output),
    }
    rows = inputs.rows if splits == 1 else (splits, *inputs.rows)
    return KernelCall(
        name="_".join(["ringattn_forward", *(f"{name.lower()}{value}" for name, value in switches.items() if value)]),
        input_names=list(buffers),
        source=shader_source.body("forward"),
        header=shader_source.header(tuple(switches.items())),
        inputs=list(buffers.values()),
        template=[
            ("T", q.dtype),
            ("Out", mx.float32 if output is None else output.dtype),
            ("D", q.shape[3]),
            ("DV", v.shape[3]),
            ("BK", tiling.BK),
            ("BD", tiling.BD),
            ("BV", tiling.BV),
            ("WM", tiling.WM),
            ("WN", tiling.WN),
            ("G", group),
            ("SOFTCAP", rules.softcap is not None),
        ],
        grid=(len(tiles) * splits * tiling.threads, heads // group, batch),
        threadgroup=(tiling.threads, 1, 1),
        compile_options={"math_mode": "safe"},
        **output_arguments(output, rows, v.shape[3]),
    )


def combine_call(states: State, output: OutputSpec | None) -> KernelCall:
    """Build the call of `combine.metal` for the states of several runs. Their arrays have a first axis `runs`."""
    _, batch, heads, q_len, value_dim = states.acc.shape
    buffers = state_buffers(states, output)
    outputs = output_arguments(output, (batch, heads, q_len), value_dim)
    switches = output_switches(output)
    return KernelCall(
        name="_".join(["ringattn_combine", *(f"{name.lower()}{value}" for name, value in switches.items() if value)]),
        input_names=list(buffers),
        source=shader_source.body("combine"),
        header=shader_source.header(tuple(switches.items())),
        inputs=list(buffers.values()),
        template=[("Out", outputs["output_dtypes"][0]), ("DV", value_dim)],
        grid=(value_dim, batch * heads * q_len, 1),
        threadgroup=(min(COMBINE_THREADS, value_dim), 1, 1),
        compile_options={"math_mode": "safe"},
        **outputs,
    )
