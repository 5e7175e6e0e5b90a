"""Buffers that the kernels of every GPU read and write, and the switches that say which of them a kernel has.

Small ones are padded: `mx.fast.metal_kernel` passes an array of fewer than 8 elements in another address space.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ...core.intervals import ends
from ...core.kept import kept
from ...core.masks import Band, Tile
from ...core.online_softmax import State
from ...core.rules import ScoreRules
from ..interface import KernelInputs, OutputSpec

MIN_ELEMENTS = 8  # of an array that a kernel reads through a device pointer


def rule_buffers(inputs: KernelInputs, tile: tuple[int, int], group: int, q_tiles: int) -> dict[str, mx.array]:
    """Buffers of the forward kernel for the rules of `inputs`: band, segments and mask.

    Args:
        inputs: The inputs.
        tile: The numbers of query rows and of keys in a tile.
        group: Query heads that are rows of one tile.
        q_tiles: The number of query tiles.
    """
    return position_buffers(inputs) | rule_arrays(inputs.rules, tile, group, q_tiles)


def position_buffers(inputs: KernelInputs) -> dict[str, mx.array]:
    """The buffers of `rule_buffers` that are the same for all arrays at these positions."""
    band = _needed_band(inputs)
    buffers = {} if band is None else band_buffers(band, inputs.q_pos, inputs.k_pos)
    if inputs.rules.mask is not None and inputs.rules.columns is not None:
        buffers["mask_columns"] = _on_gpu(inputs.rules.columns)
    return buffers


def rule_arrays(rules: ScoreRules, tile: tuple[int, int], group: int, q_tiles: int) -> dict[str, mx.array]:
    """The other buffers of `rule_buffers`: they have the contents of the rules' arrays."""
    buffers = {} if rules.segments is None else _segment_buffers(*rules.segments, tile, group, q_tiles)
    return buffers if rules.mask is None else buffers | {"mask": rules.mask}


def rule_switches(rules: ScoreRules, buffers: dict[str, mx.array]) -> dict[str, int]:
    """Switches of a kernel that has the buffers of `rule_buffers`."""
    return {
        "BAND": int("limits" in buffers),
        "SEGMENTS": int("query_ids" in buffers),
        "MASK": mask_switch(rules.mask),
        "COLUMNS": int("mask_columns" in buffers),
    }


def mask_switch(mask: mx.array | None) -> int:
    """Return 0 for no mask, 1 for a boolean one, 2 for an additive one."""
    return 0 if mask is None else 1 if mask.dtype == mx.bool_ else 2


def state_buffers(state: State | None, output: OutputSpec | None) -> dict[str, mx.array]:
    """Buffers of a kernel for the state it starts from, and for the sinks of its output."""
    buffers = {} if state is None else {"acc_in": state.acc, "m_in": state.m, "l_in": state.l}
    return buffers if output is None or output.sinks is None else buffers | {"sinks": output.sinks}


def band_buffers(band: Band, q_pos: np.ndarray, k_pos: np.ndarray) -> dict[str, mx.array]:
    """Buffers of a kernel with ``RA_BAND``: the band's bounds, and the positions of queries and keys."""
    return {"limits": mx.array(_limits(band)), "query_at": _on_gpu(q_pos), "key_at": _on_gpu(k_pos)}


@kept(most=32)
def _on_gpu(positions: np.ndarray) -> mx.array:
    """Make an array of at least `MIN_ELEMENTS`, which is there: it may be used first inside a transformation."""
    return mx.array(np.pad(positions.astype(np.int32), (0, max(0, MIN_ELEMENTS - len(positions)))))


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
    band = inputs.rules.band
    return None if band.tile(*ends(inputs.q_pos), *ends(inputs.k_pos)) is Tile.FULL else band


def _limits(band: Band) -> np.ndarray:
    """Return the band's bounds as int32. The smallest and the largest int32 stand for no bound."""
    limits = np.iinfo(np.int32)
    low = limits.min if band.low is None else max(band.low, limits.min + 1)
    high = limits.max if band.high is None else min(band.high, limits.max - 1)
    return np.array([low, high], np.int32)


def padded(x: mx.array) -> mx.array:
    """Flatten `x` into a contiguous array and pad it with zeros to `MIN_ELEMENTS`."""
    x = mx.contiguous(x).reshape(-1)
    return x if x.size >= MIN_ELEMENTS else mx.pad(x, (0, MIN_ELEMENTS - x.size))


def _segment_buffers(
    q_ids: mx.array, k_ids: mx.array, tile: tuple[int, int], group: int, q_tiles: int
) -> dict[str, mx.array]:
    """Segment ids, and the smallest and the largest id of each tile ``[B, tiles, 2]``."""
    if group == 1:
        q_bounds = _bounds(q_ids, tile[0])
    else:  # few queries, whose heads share tiles
        whole = _bounds(q_ids, q_ids.shape[1])[:, :1]
        q_bounds = mx.contiguous(mx.broadcast_to(whole, (whole.shape[0], max(q_tiles, MIN_ELEMENTS), 2)))
    return {
        "query_ids": padded(q_ids),
        "key_ids": padded(k_ids),
        "query_bounds": q_bounds,
        "key_bounds": _bounds(k_ids, tile[1]),
    }


def _bounds(ids: mx.array, tile: int) -> mx.array:
    tiles = max(-(-ids.shape[1] // tile), MIN_ELEMENTS // 2)
    ids = mx.pad(ids, [(0, 0), (0, tiles * tile - ids.shape[1])], constant_values=-1)
    ids = ids.reshape(ids.shape[0], tiles, tile)
    return mx.stack([ids.min(axis=-1), ids.max(axis=-1)], -1)
