"""The calls of the forward kernel and of the kernel that combines its states."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..core.masks import Band, Tile
from ..core.online_softmax import State
from ..kernels.interface import KernelInputs, OutputSpec
from . import shader_source
from .launch import KernelCall
from .tiling import Tiling, key_tile_ranges

COMBINE_THREADS = 64
MIN_ELEMENTS = 8  # of an array that a kernel reads through a device pointer; MLX puts smaller ones in constant memory


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
    buffers = _forward_buffers(inputs, tiles, tiling, group, state, output)
    switches = {
        "TENSOR": int(tiling.tensor),
        "BAND": int("limits" in buffers),
        "SEGMENTS": int("query_ids" in buffers),
        "MASK": 0 if rules.mask is None else 1 if rules.mask.dtype == mx.bool_ else 2,
        "COLUMNS": int("mask_columns" in buffers),
        "STATE_IN": int(state is not None),
    } | output_switches(output)
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


def _forward_buffers(
    inputs: KernelInputs,
    tiles: np.ndarray,
    tiling: Tiling,
    group: int,
    state: State | None,
    output: OutputSpec | None,
) -> dict[str, mx.array]:
    """Buffers that the forward kernel reads, by name. `tiles` are from `key_tile_ranges`."""
    rules = inputs.rules
    band = _needed_band(inputs)
    buffers = {
        "queries": inputs.q,
        "keys": inputs.k,
        "values": inputs.v,
        "numbers": mx.array([rules.scale, rules.softcap or 0.0]),
        "key_tiles": _padded(mx.array(tiles)),
    }
    if band is not None:
        buffers |= band_buffers(band, inputs.q_pos, inputs.k_pos)
    if rules.segments is not None:
        buffers |= _segment_buffers(*rules.segments, tiling, group, len(tiles))
    if rules.mask is not None:
        buffers["mask"] = rules.mask
        if rules.columns is not None:
            buffers["mask_columns"] = _padded(mx.array(rules.columns.astype(np.int32)))
    if state is not None:
        buffers |= {"acc_in": state.acc, "m_in": state.m, "l_in": state.l}
    if output is not None and output.sinks is not None:
        buffers["sinks"] = output.sinks
    return buffers


def band_buffers(band: Band, q_pos: np.ndarray, k_pos: np.ndarray) -> dict[str, mx.array]:
    """Buffers of a kernel with ``RA_BAND``: the band's bounds, and the positions of queries and keys."""
    return {
        "limits": mx.array(_limits(band)),
        "query_at": _padded(mx.array(q_pos)),
        "key_at": _padded(mx.array(k_pos)),
    }


def output_switches(output: OutputSpec | None) -> dict[str, int]:
    """Switches of a kernel that returns `output`, or a state."""
    if output is None:
        return {"STATE_OUT": 1, "LSE": 0, "SINKS": 0}
    return {"STATE_OUT": 0, "LSE": int(output.lse), "SINKS": int(output.sinks is not None)}


def output_arguments(output: OutputSpec | None, rows: tuple[int, ...], value_dim: int) -> dict:
    """Output arguments of a kernel that returns `output`, or a state, for rows of this shape."""
    if output is None:
        names, shapes, dtypes = ["acc_out", "m_out", "l_out"], [(*rows, value_dim), rows, rows], [mx.float32] * 3
    else:
        names, shapes, dtypes = ["out"], [(*rows, value_dim)], [output.dtype]
        if output.lse:
            names, shapes, dtypes = [*names, "lse"], [*shapes, rows], [*dtypes, mx.float32]
    return {"output_names": names, "output_shapes": shapes, "output_dtypes": dtypes}


def _needed_band(inputs: KernelInputs) -> Band | None:
    """Return the band, or ``None`` where every query sees every key by it."""
    ends = [int(x[i]) for x in (inputs.q_pos, inputs.k_pos) for i in (0, -1)]
    return None if inputs.rules.band.tile(*ends) is Tile.FULL else inputs.rules.band


def _limits(band: Band) -> np.ndarray:
    """Return the band's bounds as int32. The smallest and the largest int32 stand for no bound."""
    limits = np.iinfo(np.int32)
    low = limits.min if band.low is None else max(band.low, limits.min + 1)
    high = limits.max if band.high is None else min(band.high, limits.max - 1)
    return np.array([low, high], np.int32)


def _padded(x: mx.array) -> mx.array:
    """Flatten `x` and pad it with zeros to `MIN_ELEMENTS`, so that the kernel gets a device pointer."""
    x = x.reshape(-1)
    return x if x.size >= MIN_ELEMENTS else mx.pad(x, (0, MIN_ELEMENTS - x.size))


def _segment_buffers(q_ids: mx.array, k_ids: mx.array, tiling: Tiling, group: int, q_tiles: int) -> dict[str, mx.array]:
    """Segment ids, and the smallest and the largest id of each tile ``[B, tiles, 2]``."""
    if group == 1:
        q_bounds = _bounds(q_ids, tiling.BQ)
    else:  # few queries, whose heads share tiles
        whole = _bounds(q_ids, q_ids.shape[1])[:, :1]
        q_bounds = mx.contiguous(mx.broadcast_to(whole, (whole.shape[0], max(q_tiles, MIN_ELEMENTS), 2)))
    return {
        "query_ids": _padded(q_ids),
        "key_ids": _padded(k_ids),
        "query_bounds": q_bounds,
        "key_bounds": _bounds(k_ids, tiling.BK),
    }


def _bounds(ids: mx.array, tile: int) -> mx.array:
    tiles = max(-(-ids.shape[1] // tile), MIN_ELEMENTS // 2)
    ids = mx.pad(ids, [(0, 0), (0, tiles * tile - ids.shape[1])], constant_values=-1)
    ids = ids.reshape(ids.shape[0], tiles, tile)
    return mx.stack([ids.min(axis=-1), ids.max(axis=-1)], -1)


def combine_call(states: State, output: OutputSpec | None) -> KernelCall:
    """Build the call of `combine.metal` for the states of several runs. Their arrays have a first axis `runs`."""
    _, batch, heads, q_len, value_dim = states.acc.shape
    buffers = {"acc_in": states.acc, "m_in": states.m, "l_in": states.l}
    if output is not None and output.sinks is not None:
        buffers["sinks"] = output.sinks
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
