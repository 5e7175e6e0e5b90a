"""The forward kernel: a problem, or a part of one, turned into a call."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..core.masks import Band, Tile
from ..core.online_softmax import State
from ..kernels.interface import KernelInputs, OutputSpec
from . import source
from .launch import KernelCall
from .tiling import Tiling, reach

LEAST = 8  # elements of an array that the kernel reads through a pointer: smaller ones are in another address space


def forward_call(
    problem: KernelInputs, tiling: Tiling, group: int, splits: int, state: State | None, ending: OutputSpec | None
):
    """The call of `forward.metal`.

    Args:
        problem: A `whole` problem or a part of one, with at least one query and one key.
        tiling: Its tiling.
        group: Query heads that are rows of one tile: 1, or all that share a key/value head.
        splits: In how many runs each tile's keys are cut; more than one needs ``ending=None``.
        state: What earlier keys left, or ``None``.
        ending: What to end in; ``None`` ends in a state, or in states with a first axis `splits` where that is above 1.
    """
    q, k, v, rules = problem.q, problem.k, problem.v, problem.rules
    batch, heads, q_len = problem.rows
    tiles = reach(rules.band, problem.q_pos, problem.k_pos, tiling.BQ, group, tiling.BK)
    band = _needed(problem)
    inputs = {
        "queries": q,
        "keys": k,
        "values": v,
        "numbers": mx.array([rules.scale, rules.softcap or 0.0]),
        "reach": _long(mx.array(tiles)),
    }
    if band is not None:
        inputs |= band_inputs(band, problem.q_pos, problem.k_pos)
    if rules.segments is not None:
        inputs |= _segments(*rules.segments, tiling, group, len(tiles))
    if rules.mask is not None:
        inputs["mask"] = rules.mask
        if rules.columns is not None:
            inputs["mask_columns"] = _long(mx.array(rules.columns.astype(np.int32)))
    if state is not None:
        inputs |= {"acc_in": state.acc, "m_in": state.m, "l_in": state.l}
    if ending is not None and ending.sinks is not None:
        inputs["sinks"] = ending.sinks
    switches = {
        "TENSOR": int(tiling.tensor),
        "BAND": int(band is not None),
        "SEGMENTS": int(rules.segments is not None),
        "MASK": 0 if rules.mask is None else 1 if rules.mask.dtype == mx.bool_ else 2,
        "COLUMNS": int("mask_columns" in inputs),
        "STATE_IN": int(state is not None),
    } | ending_switches(ending)
    rows = problem.rows if splits == 1 else (splits, *problem.rows)
    return KernelCall(
        name="_".join(["ringattn_forward", *(f"{name.lower()}{value}" for name, value in switches.items() if value)]),
        input_names=list(inputs),
        source=source.body("forward"),
        header=source.header(tuple(switches.items())),
        inputs=list(inputs.values()),
        template=[
            ("T", q.dtype),
            ("Out", mx.float32 if ending is None else ending.dtype),
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
        **ending_outputs(ending, rows, v.shape[3]),
    )


def band_inputs(band: Band, q_pos: np.ndarray, k_pos: np.ndarray) -> dict[str, mx.array]:
    """What a kernel with ``RA_BAND`` needs: the band's bounds and the positions that they are about."""
    return {
        "limits": mx.array(_limits(band)),
        "query_at": _long(mx.array(q_pos)),
        "key_at": _long(mx.array(k_pos)),
    }


def ending_switches(ending: OutputSpec | None) -> dict[str, int]:
    """The switches of a kernel that ends in `ending`, or in a state."""
    if ending is None:
        return {"STATE_OUT": 1, "LSE": 0, "SINKS": 0}
    return {"STATE_OUT": 0, "LSE": int(ending.lse), "SINKS": int(ending.sinks is not None)}


def ending_outputs(ending: OutputSpec | None, rows: tuple[int, ...], value_dim: int) -> dict:
    """The outputs of such a kernel, for rows of this shape."""
    if ending is None:
        names, shapes, dtypes = ["acc_out", "m_out", "l_out"], [(*rows, value_dim), rows, rows], [mx.float32] * 3
    else:
        names, shapes, dtypes = ["out"], [(*rows, value_dim)], [ending.dtype]
        if ending.lse:
            names, shapes, dtypes = [*names, "lse"], [*shapes, rows], [*dtypes, mx.float32]
    return {"output_names": names, "output_shapes": shapes, "output_dtypes": dtypes}


def _needed(problem: KernelInputs) -> Band | None:
    """The band, or ``None`` where it lets every query see every key."""
    ends = [int(x[i]) for x in (problem.q_pos, problem.k_pos) for i in (0, -1)]
    return None if problem.rules.band.tile(*ends) is Tile.FULL else problem.rules.band


def _limits(band: Band) -> np.ndarray:
    """The band's bounds within int32, which as numbers that no bound has say that there is none."""
    limits = np.iinfo(np.int32)
    low = limits.min if band.low is None else max(band.low, limits.min + 1)
    high = limits.max if band.high is None else min(band.high, limits.max - 1)
    return np.array([low, high], np.int32)


def _long(x: mx.array) -> mx.array:
    """`x`, or with zeros after it where it is so small that the kernel would need another type of pointer."""
    x = x.reshape(-1)
    return x if x.size >= LEAST else mx.pad(x, (0, LEAST - x.size))


def _segments(q_ids: mx.array, k_ids: mx.array, tiling: Tiling, group: int, q_tiles: int) -> dict[str, mx.array]:
    """Ids, and the smallest and the largest of each tile ``[B, tiles, 2]``."""
    if group == 1:
        q_bounds = _bounds(q_ids, tiling.BQ)
    else:  # a few queries, whose heads share tiles
        whole = _bounds(q_ids, q_ids.shape[1])[:, :1]
        q_bounds = mx.contiguous(mx.broadcast_to(whole, (whole.shape[0], max(q_tiles, LEAST), 2)))
    return {
        "query_ids": _long(q_ids),
        "key_ids": _long(k_ids),
        "query_bounds": q_bounds,
        "key_bounds": _bounds(k_ids, tiling.BK),
    }


def _bounds(ids: mx.array, tile: int) -> mx.array:
    tiles = max(-(-ids.shape[1] // tile), LEAST // 2)
    ids = mx.pad(ids, [(0, 0), (0, tiles * tile - ids.shape[1])], constant_values=-1)
    ids = ids.reshape(ids.shape[0], tiles, tile)
    return mx.stack([ids.min(axis=-1), ids.max(axis=-1)], -1)


THREADS = 64


def combine_call(states: State, ending: OutputSpec | None) -> KernelCall:
    """The call of `combine.metal` for the states of several runs, whose arrays have a first axis `runs`."""
    _, batch, heads, q_len, value_dim = states.acc.shape
    inputs = {"acc_in": states.acc, "m_in": states.m, "l_in": states.l}
    if ending is not None and ending.sinks is not None:
        inputs["sinks"] = ending.sinks
    outputs = ending_outputs(ending, (batch, heads, q_len), value_dim)
    switches = ending_switches(ending)
    return KernelCall(
        name="_".join(["ringattn_combine", *(f"{name.lower()}{value}" for name, value in switches.items() if value)]),
        input_names=list(inputs),
        source=source.body("combine"),
        header=source.header(tuple(switches.items())),
        inputs=list(inputs.values()),
        template=[("Out", outputs["output_dtypes"][0]), ("DV", value_dim)],
        grid=(value_dim, batch * heads * q_len, 1),
        threadgroup=(min(THREADS, value_dim), 1, 1),
        compile_options={"math_mode": "safe"},
        **outputs,
    )
