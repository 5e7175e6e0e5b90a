"""A model of the CUDA kernels in NumPy, which checks what a call is given: `set_executor(run)`."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np

from ringattn.cuda import KernelCall
from ringattn.cuda.gradient_tiling import QUERY_TILES
from ringattn.cuda.tiling import MULTIPROCESSOR_BYTES

INT32 = np.iinfo(np.int32)


def run(call: KernelCall) -> list[mx.array]:
    """Compute the outputs of `call` in float64."""
    assert len(set(call.output_names)) == len(call.output_shapes) == len(call.output_dtypes)
    assert max(call.grid[1:]) < 1 << 16 and call.threadgroup[0] <= 1024 and call.shared_memory <= MULTIPROCESSOR_BYTES
    buffers = dict(zip(call.input_names, map(_array, call.inputs), strict=True))
    kind = call.name.removeprefix("ringattn_cuda_").rpartition("_")[0]
    if kind in GRADIENT:
        outputs = GRADIENT[kind](call, buffers)
        assert [x.shape for x in outputs] == [tuple(shape) for shape in call.output_shapes]
        return [mx.array(x.astype(np.float32)) for x in outputs]
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
    loaders = 128 if "LOADER_REGISTERS" in d else 0
    assert call.threadgroup == (32 * d["WARPS"] + loaders, 1, 1) and call.template == []
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
    assert scale >= 0 or "dout" in buffers
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


def _expanded(buffers: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Keys and values, repeated for each query head."""
    heads = buffers["queries"].shape[1]
    return [np.repeat(buffers[name], heads // buffers[name].shape[1], 1) for name in ("keys", "values")]


def _derivatives(d: dict[str, int], buffers: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Which pairs are visible, p, ds and the derivative by the product of query and key, ``[B, Hq, Lq, Lk]``."""
    k, v = _expanded(buffers)
    seen, scores = _scores(d, buffers, buffers["queries"], k)
    cap = buffers["numbers"][1]
    slope = 1 - (scores / cap) ** 2 if d["SOFTCAP"] else np.ones(scores.shape)
    weights = np.where(seen, np.exp(np.where(seen, scores, 0) - buffers["lse"][..., None]), 0)
    ds = weights * (buffers["dout"] @ v.swapaxes(-1, -2) - buffers["delta"][..., None])
    return seen, weights, ds, ds * slope


def _check_reach(d: dict[str, int], seen: np.ndarray, reach: np.ndarray) -> None:
    """Check the tiles of some keys: `seen` ``[B, Hq, Lq, keys]``, and the first and last query of `reach`."""
    first, full_first, full_last, last = reach
    assert not seen[:, :, :first].any() and not seen[:, :, last:].any()
    if not any(d[name] for name in ("MASK", "SEGMENTS")):
        assert seen[:, :, full_first:full_last].all()


def _backward_hopper(call: KernelCall, buffers: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Compute what the blocks that hold keys leave, or those that hold queries."""
    d, q, k = defines(call), buffers["queries"], buffers["keys"]
    (batch, heads), (kv_heads, k_len) = q.shape[:2], k.shape[1:3]
    seen, weights, ds, by_product = _derivatives(d, buffers)
    HELD, sides = 16 * d["WARPS"], seen if d["OF_KEYS"] else seen.swapaxes(-1, -2)
    tiles = -(-sides.shape[3] // HELD)
    assert sorted(buffers["order"][:tiles]) == list(range(tiles)) == list(range(len(buffers["reach"])))
    for tile, reach in enumerate(buffers["reach"]):
        _check_reach(d, sides[..., tile * HELD : (tile + 1) * HELD], reach * d["PASSING"])
    left = call.grid[1]
    assert call.grid == (tiles * call.threadgroup[0], left, batch) and left in (
        (heads, kv_heads) if d["OF_KEYS"] else (heads,)
    )
    if d["OF_KEYS"]:
        factor = buffers["numbers"][0] if d["SCALES"] else 1
        found = {"dk": factor * (by_product.swapaxes(-1, -2) @ q), "dv": weights.swapaxes(-1, -2) @ buffers["dout"]}
        assert [d["SUM_K"], d["SUM_V"]] == [int(name in call.output_names) for name in found]
        sums = {name: found[name].reshape(batch, left, heads // left, k_len, -1).sum(2) for name in call.output_names}
        return [x + (buffers[f"{name}_before"] if d["ADDS"] else 0) for name, x in sums.items()]
    dq = buffers["numbers"][0] * (by_product @ _expanded(buffers)[0])
    dq += buffers["dq_before"] if d["ADDS"] else 0
    return [dq, ds] if d["MASK"] == 2 else [dq]


def _backward(call: KernelCall, buffers: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Compute what each block leaves, key tile by key tile, as the kernel's blocks do."""
    d, q = defines(call), buffers["queries"]
    (batch, heads, q_len, _), k_len = q.shape, buffers["keys"].shape[2]
    KEYS, QUERIES, splits = 16 * d["WARPS"] // d["HALVES"], d["QUERIES"], len(buffers["blocks"])
    assert call.grid == (splits * call.threadgroup[0], heads, batch) and -(-q_len // QUERIES) <= QUERY_TILES
    assert sorted(i for i in buffers["blocks"].flat if i >= 0) == list(range(-(-k_len // KEYS)))
    assert all(np.all(np.diff(row < 0) >= 0) for row in buffers["blocks"]), "-1 only at the end"
    k, _ = _expanded(buffers)
    seen, weights, ds, by_product = _derivatives(d, buffers)
    dq = np.zeros((splits, *q.shape))
    for split, tiles in enumerate(buffers["blocks"]):
        for tile in tiles[tiles >= 0]:
            keys = slice(tile * KEYS, (tile + 1) * KEYS)
            dq[split] += by_product[..., keys] @ k[:, :, keys]
            _check_reach(d, seen[..., keys], buffers["reach"][tile] * QUERIES)
    found = [
        _by_lanes(d, dq).reshape(splits, -1),
        by_product.swapaxes(-1, -2) @ q,
        weights.swapaxes(-1, -2) @ buffers["dout"],
    ]
    return [*found, ds] if d["MASK"] == 2 else found


def _places(d: dict[str, int]) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows and dims of a tile of dq, ``[warps, fragments, columns / 8, lanes, 4]``, and the padded number of dims."""
    q_warps = d["QUERIES"] // (16 * d["FRAGMENTS"])
    d_warps = d["WARPS"] // q_warps
    chunks = -(-d["BD"] // (16 * d_warps)) if "BD" in d else d["CHUNKS"]
    shape = d["WARPS"], d["FRAGMENTS"], 2 * chunks, 32, 4
    warp, fragment, column, lane, i = np.indices(shape)
    rows = (warp % q_warps * d["FRAGMENTS"] + fragment) * 16 + lane // 4 + i // 2 * 8
    dims = (column // 2 * d_warps + warp // q_warps) * 16 + column % 2 * 8 + lane % 4 * 2 + i % 2
    return rows, dims, 16 * chunks * d_warps


def _by_lanes(d: dict[str, int], dq: np.ndarray) -> np.ndarray:
    """Order dq ``[splits, B, Hq, Lq, D]`` as the kernel's lanes have it."""
    rows, dims, width = _places(d)
    tiles = -(-dq.shape[3] // d["QUERIES"])
    more = tiles * d["QUERIES"] - dq.shape[3], width - dq.shape[4]
    wide = np.pad(dq, [(0, 0)] * 3 + [(0, n) for n in more]).reshape(*dq.shape[:3], tiles, d["QUERIES"], width)
    return wide[..., rows, dims]


def _collect_queries(call: KernelCall, buffers: dict[str, np.ndarray]) -> list[np.ndarray]:
    d, parts, (*heads, q_len, dim) = defines(call), buffers["parts"], call.output_shapes[0]
    rows, dims, width = _places(d)
    assert 4 * call.grid[0] >= parts.shape[1] and buffers["length"] == [q_len]
    wide = np.zeros((*heads, -(-q_len // d["QUERIES"]), d["QUERIES"], width))
    wide[..., rows, dims] = parts.sum(0).reshape(*wide.shape[:3], *rows.shape)
    found = wide.reshape(*heads, -1, width)[:, :, :q_len, :dim]
    return [buffers["factor"][0] * found + (buffers["sums"] if d["ADDS"] else 0)]


def _collect(call: KernelCall, buffers: dict[str, np.ndarray]) -> list[np.ndarray]:
    d, parts, shape = defines(call), buffers["parts"], call.output_shapes[0]
    assert call.grid[0] * d["WIDTH"] >= np.prod(shape) and parts.shape[2] % d["WIDTH"] == 0
    return [buffers["factor"][0] * parts.sum(1).reshape(shape) + (buffers["sums"] if d["ADDS"] else 0)]


def _rows(call: KernelCall, buffers: dict[str, np.ndarray]) -> list[np.ndarray]:
    out, dout, lse, dlse = (buffers[name] for name in ("out", "dout", "lse", "dlse"))
    assert call.grid[0] >= 32 * lse.size
    empty = lse == -np.inf
    return [np.where(empty, np.inf, lse), np.where(empty, 0, (out * dout).sum(-1) - dlse)]


GRADIENT = {
    "backward": _backward,
    "backward_hopper": _backward_hopper,
    "collect": _collect,
    "collect_queries": _collect_queries,
    "rows": _rows,
}
