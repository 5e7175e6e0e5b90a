"""A model of the CUDA kernels in NumPy, which checks what a call is given: `set_executor(run)`."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np

from ringattn.cuda import KernelCall
from ringattn.cuda.tiling import SHARED_BYTES

INT32 = np.iinfo(np.int32)


def run(call: KernelCall) -> list[mx.array]:
    """Compute the outputs of `call` in float64."""
    assert len(set(call.output_names)) == len(call.output_shapes) == len(call.output_dtypes)
    assert max(call.grid[1:]) < 1 << 16 and call.threadgroup[0] <= 1024 and call.shared_memory <= SHARED_BYTES
    buffers = dict(zip(call.input_names, map(_array, call.inputs), strict=True))
    states = _forward(call, buffers) if "queries" in buffers else [buffers[name] for name in ("acc_in", "m_in", "l_in")]
    if "acc_out" in call.output_names and "queries" in buffers:
        outputs = states if len(call.output_shapes[1]) == 4 else [x[0] for x in states]
    else:
        outputs = _output(call, buffers, _merged(*states))
    assert [x.shape for x in outputs] == [tuple(shape) for shape in call.output_shapes]
    return [mx.array(x.astype(np.float32)).astype(dtype) for x, dtype in zip(outputs, call.output_dtypes)]


def defines(call: KernelCall) -> dict[str, int]:
    """The integers that the header defines."""
    return {name: int(value) for name, value in re.findall(r"^#define RA_(\w+) (-?\d+)$", call.header, re.MULTILINE)}


def _array(x: mx.array) -> np.ndarray:
    return np.array(x) if x.dtype in (mx.bool_, mx.int32) else np.array(x.astype(mx.float32)).astype(np.float64)


def _forward(call: KernelCall, buffers: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Compute the states of all runs of keys, tile by tile, as the kernel's blocks do."""
    d, q, k, v = defines(call), *(buffers[name] for name in ("queries", "keys", "values"))
    (batch, heads, q_len, _), k_len = q.shape, k.shape[2]
    rows, BQ = q_len * d["G"], 16 * d["WARPS"] * d["FRAGMENTS"]
    tiles = -(-rows // BQ)
    splits, rest = divmod(call.grid[0], tiles * call.threadgroup[0])
    assert rest == 0 and call.grid[1:] == (heads // d["G"], batch)
    assert call.threadgroup == (32 * d["WARPS"], 1, 1) and call.template == []
    seen, scores = _scores(d, buffers, q, np.repeat(k, heads // k.shape[1], 1))
    v = np.repeat(v, heads // v.shape[1], 1)
    acc = np.zeros((splits, *q.shape[:3], v.shape[3]))
    m, l = np.full(acc.shape[:-1], -np.inf), np.zeros(acc.shape[:-1])
    for tile in range(tiles):
        first, full_first, full_last, last = buffers["reach"][tile]
        tokens = np.unique(np.arange(tile * BQ, min(rows, (tile + 1) * BQ)) // d["G"])
        columns = np.arange(k_len)
        outside = (columns < first * d["BK"]) | (columns >= last * d["BK"])
        assert not seen[:, :, tokens][..., outside].any(), "tiles that are left out hide nothing visible"
        if not any(d[name] for name in ("MASK", "SEGMENTS")):
            assert seen[:, :, tokens, full_first * d["BK"] : full_last * d["BK"]].all()
        share = -(-(last - first) // splits)
        for split in range(splits):
            keys = slice((first + split * share) * d["BK"], min(last, first + (split + 1) * share) * d["BK"])
            part = np.where(seen, scores, -np.inf)[:, :, tokens, keys]
            top = part.max(-1, initial=-np.inf)
            weights = np.exp(part - np.where(top == -np.inf, 0, top)[..., None])
            m[split][:, :, tokens], l[split][:, :, tokens] = top, weights.sum(-1)
            acc[split][:, :, tokens] = weights @ v[:, :, keys]
    if d["STATE_IN"]:
        before = [buffers[name] for name in ("acc_in", "m_in", "l_in")]
        first = _merged(*(np.stack([x[0], y]) for x, y in zip((acc, m, l), before)))
        acc[0], m[0], l[0] = first
    return [acc, m, l]


def _scores(d: dict[str, int], buffers: dict[str, np.ndarray], q: np.ndarray, k: np.ndarray):
    scale, softcap = buffers["numbers"]
    assert scale >= 0
    scores = q @ k.swapaxes(-1, -2) * scale
    if d["SOFTCAP"]:
        scores = softcap * np.tanh(scores / softcap)
    seen = np.ones(scores.shape, bool)
    if d["BAND"]:
        low, high = (int(x) for x in buffers["limits"])
        distance = buffers["key_at"][: k.shape[2]].astype(int) - buffers["query_at"][: q.shape[2], None].astype(int)
        seen &= (distance >= low) | (low == INT32.min)
        seen &= (distance <= high) | (high == INT32.max)
    if d["SEGMENTS"]:
        shapes = (len(q), 1, -1, 1), (len(k), 1, 1, -1)
        lengths = q.shape[2], k.shape[2]
        ids = (buffers[name][: len(q) * length] for name, length in zip(("query_ids", "key_ids"), lengths))
        q_ids, k_ids = (x.reshape(shape) for x, shape in zip(ids, shapes))
        seen &= (q_ids == k_ids) & (q_ids >= 0)
    if d["MASK"]:
        mask = buffers["mask"]
        mask = mask[..., buffers["mask_columns"][: k.shape[2]]] if d["COLUMNS"] else mask
        seen &= mask if d["MASK"] == 1 else mask != -np.inf
        scores = scores if d["MASK"] == 1 else scores + np.where(mask == -np.inf, 0, mask)
    return seen, scores


def _merged(acc: np.ndarray, m: np.ndarray, l: np.ndarray) -> list[np.ndarray]:
    top = m.max(0)
    weights = np.exp(m - np.where(top == -np.inf, 0, top))
    return [(acc * weights[..., None]).sum(0), top, (l * weights).sum(0)]


def _output(call: KernelCall, buffers: dict[str, np.ndarray], state: list[np.ndarray]) -> list[np.ndarray]:
    if "acc_out" in call.output_names:
        return state
    acc, m, l = state
    if "sinks" in buffers:
        sinks = np.broadcast_to(buffers["sinks"][:, None], m.shape)
        acc, m, l = _merged(*(np.stack(x) for x in ((acc, acc * 0), (m, sinks), (l, np.ones(l.shape)))))
    out = acc / np.where(l == 0, 1, l)[..., None]
    with np.errstate(divide="ignore"):
        lse = np.where(l == 0, -np.inf, m + np.log(l))
    return [out, lse] if "lse" in call.output_names else [out]
