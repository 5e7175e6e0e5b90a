"""Single threadgroups at the end of arrays of over 2^31 elements and 2^32 bytes, in mapped but untouched memory."""

from __future__ import annotations

import mmap

import mlx.core as mx
import numpy as np
import pytest

from ringattn.core.masks import Band
from ringattn.core.online_softmax import State
from ringattn.core.rules import ScoreRules
from ringattn.kernels.interface import KernelInputs, OutputSpec
from ringattn.metal.forward import forward_call
from ringattn.metal.tiling import Tiling
from ringattn.verify.oracle import Case, check
from tools.hostmetal import Runtime

pytestmark = pytest.mark.host_runtime

TOKENS, HEADS, DIM, WINDOW = 1 << 20, 33, 128, 100  # 4.4e9 numbers, 8.9 GB in float16
SEEN = 132  # at least the keys that the last 32 queries see


NORESERVE = 0x4000  # Linux: memory is allocated when it is touched


def sparse(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Make zeros that take no memory until they are written."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE), dtype).reshape(shape)


@pytest.mark.parametrize("ends", ["out", "state"])
@pytest.mark.parametrize("tokens_first", [False, True], ids=["heads first", "tokens first"])
def test_the_last_tile_of_the_last_head(ends, tokens_first):
    r = np.random.default_rng(0)
    shape = (1, TOKENS, HEADS, DIM) if tokens_first else (1, HEADS, TOKENS, DIM)
    names = ("queries", "keys", "values")
    buffers = {name: sparse(shape, np.float16).swapaxes(1, 2 if tokens_first else 1) for name in names}
    for x in buffers.values():
        x[0, -1, -SEEN:] = r.standard_normal((SEEN, DIM))
    assert buffers["keys"].size > 1 << 31 and buffers["keys"].nbytes > 1 << 32
    like = mx.broadcast_to(mx.zeros((1,), mx.float16), (1, HEADS, TOKENS, DIM))
    positions = np.arange(TOKENS, dtype=np.int32)
    inputs = KernelInputs(like, like, like, positions, positions, ScoreRules(DIM**-0.5, Band.of(True, WINDOW)))
    state = None
    if ends == "state":
        rows = mx.broadcast_to(mx.zeros((1,)), (1, HEADS, TOKENS))
        state = State(mx.broadcast_to(mx.zeros((1,)), (1, HEADS, TOKENS, DIM)), rows, rows)
        buffers |= {"acc_in": sparse((1, HEADS, TOKENS, DIM), np.float32)}
        buffers |= {name: sparse(rows.shape, np.float32) for name in ("m_in", "l_in")}
        buffers["m_in"][0, -1, -32:] = -np.inf
    tiling = Tiling.of(mx.float16, DIM, DIM, TOKENS)
    call = forward_call(inputs, tiling, 1, 1, state, None if state else OutputSpec(mx.float16, True))
    done = Runtime().run(call, buffers, groups=[(0, HEADS - 1, 0)])
    last = [mx.array(np.ascontiguousarray(x[:, -1:, -SEEN:])) for x in buffers.values()][:3]
    near = np.arange(SEEN)
    case = Case(last[0][:, :, -32:], *last[1:], near[-32:], near, {"window": WINDOW})
    if state is None:
        out, lse = done["out"][:, -1:, -32:], done["lse"][:, -1:, -32:]
    else:
        acc, m, l = (done[name][:, -1:, -32:] for name in ("acc_out", "m_out", "l_out"))
        out, lse = acc / l[..., None], m + np.log(l)
    check(case, mx.array(np.ascontiguousarray(out)), mx.array(np.ascontiguousarray(lse)))
    assert not done["out" if state is None else "acc_out"][0, -1, -64:-32].any(), "the tile before was not asked for"
