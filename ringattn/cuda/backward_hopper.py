"""The gradient kernel for compute capability 9.0: a problem turned into its two calls, and their tiles."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..core.gradients import Rows
from ..kernels.gpu.buffers import rule_arrays, rule_buffers
from ..kernels.gpu.key_tiles import key_tile_ranges
from ..kernels.interface import KernelInputs
from . import hopper_tiling, source
from .calls import on_gpu, prepared
from .device import HOPPER, SHARED_BYTES
from .gradient_call import arrays_of, gradient_call, longest_first, mask_output
from .hopper_tiling import PANEL
from .launch import KernelCall
from .tiling import FRAGMENT, WARP, padded

LEAST_STAGES, MOST_STAGES = 3, 4
WIDE = 128  # dims, beyond which shared memory and registers limit the passing tokens
BOTH = 320  # dims of dk and dv together, up to which a block's registers hold both beside the scores
REGISTERS = 200  # of a thread, for sums and scores


@dataclass(frozen=True)
class HeldTiling:
    """The tiles of one thread block; names in capitals are those in the kernel.

    Attributes:
        sums: What the block adds up: dk, dv or both, where it holds keys and queries pass; else dq.
        PASSING: Tokens in a tile that passes.
        BD: head_dim, padded to whole fragments.
        BV: The values' head_dim, padded likewise.
        warps: Warps of a block.
    """

    sums: tuple[str, ...]
    PASSING: int
    BD: int
    BV: int
    warps: int = 8

    @classmethod
    def of_queries(cls, inputs: KernelInputs) -> HeldTiling:
        """The tiles of blocks that hold queries."""
        return cls._of(inputs, ("dq",))

    @classmethod
    def of_keys(cls, inputs: KernelInputs) -> tuple[HeldTiling, ...]:
        """The tiles of blocks that hold keys: of one call for dk and dv, or, beyond what registers hold, of two."""
        calls = (("dk", "dv"),) if sum(_padded_dims(inputs)) <= BOTH else (("dk",), ("dv",))
        return tuple(cls._of(inputs, sums) for sums in calls)

    @classmethod
    def _of(cls, inputs: KernelInputs, sums: tuple[str, ...]) -> HeldTiling:
        """The tiles for some inputs: as many passing tokens as registers and shared memory allow."""
        BD, BV = _padded_dims(inputs)
        widest, softcap = max(BD, BV), inputs.rules.softcap is not None
        if widest <= WIDE:
            passing = 128 if sums == ("dq",) and widest <= 64 else 64
            return cls(sums, passing // 2 if softcap else passing, BD, BV)
        tilings = (cls(sums, passing, BD, BV) for passing in (64, 48, 32, 16))
        return next(x for x in tilings if x.stages >= LEAST_STAGES and x.registers(softcap) <= REGISTERS)

    def registers(self, softcap: bool) -> int:
        """Registers of a thread for sums and for scores: s, and for dk and dq dp and the slope of a softcap."""
        sums = sum(self.BV if name == "dv" else self.BD for name in self.sums)
        scores = 1 if not self.needs_dp else 3 if softcap else 2
        return (sums + scores * self.PASSING) // 2

    @property
    def holds_keys(self) -> bool:
        """Whether a block holds keys."""
        return self.sums != ("dq",)

    @property
    def needs_dp(self) -> bool:
        """Whether a block adds up dk or dq, whose products need the held values or dout."""
        return self.sums != ("dv",)

    @property
    def HELD(self) -> int:  # noqa: N802
        """Tokens that a block holds."""
        return FRAGMENT * self.warps

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARP * self.warps

    @property
    def stages(self) -> int:
        """Tiles that pass, in shared memory at a time."""
        return min(MOST_STAGES, (SHARED_BYTES[HOPPER] - self._held) // self._stage)

    @property
    def shared_memory(self) -> int:
        """Bytes of a block."""
        return self._held + self.stages * self._stage

    @property
    def _widths(self) -> tuple[int, int]:
        """The dims of keys and of values in shared memory: whole panels."""
        return padded((self.BD, self.BV), PANEL)

    @property
    def _held(self) -> int:
        """Bytes of the held tile, whose values or dout only dk and dq need, and of a note for each token."""
        width = sum(self._widths) if self.needs_dp else self._widths[0]
        return self.HELD * (2 * width + 1)

    @property
    def _stage(self) -> int:
        """Bytes of a stage: a tile, lse and delta, a note for each token, and two barriers."""
        return self.PASSING * (2 * sum(self._widths) + 2 * 4 + 1) + 2 * 8

    def tile(self, of_keys: bool) -> int:
        """Keys, or queries, in a tile."""
        return self.HELD if of_keys == self.holds_keys else self.PASSING


def _padded_dims(inputs: KernelInputs) -> tuple[int, int]:
    """The dims of keys and of values, padded to whole fragments."""
    return padded((inputs.q.shape[3], inputs.v.shape[3]), FRAGMENT)


def passing_tile_ranges(inputs: KernelInputs, tiling: HeldTiling) -> np.ndarray:
    """The passing tiles of each held tile, int32 ``[held tiles, 4]``: first, full first, full last, last."""
    band, held, passing = inputs.rules.band, inputs.q_pos, inputs.k_pos
    if tiling.holds_keys:
        band, held, passing = band.transposed, passing, held
    return key_tile_ranges(band, held, passing, tiling.HELD, 1, tiling.PASSING)


def held_keys_call(
    inputs: KernelInputs, rows: Rows, tiling: HeldTiling, heads: int, sums: dict[str, mx.array] | None
) -> KernelCall:
    """A call of `backward_hopper.cu` whose blocks hold keys.

    Its outputs are those of ``tiling.sums``, dk ``[B, Hkv, Lk, D]`` and dv ``[B, Hkv, Lk, Dv]``, plus `sums`, float32;
    in the dtype of q without `sums`. With more heads than Hkv they have these in its place, float32, to be added up
    over what each key head has of them; then dk misses the factor `scale`.

    Args:
        inputs: `whole` inputs with at least one query and one key; q, k and v contiguous.
        rows: Their rows; dout in the dtype of q, all contiguous.
        tiling: Their tiling.
        heads: The number of heads of q, or of k.
        sums: The sums of dk and dv before, contiguous, for as many heads as k has, by their names.
    """
    dims = {"dk": inputs.q.shape[3], "dv": inputs.v.shape[3]}
    before = {} if sums is None else {f"{name}_before": sums[name] for name in tiling.sums}
    shape = inputs.k.shape[0], heads, inputs.k.shape[2]
    return _call(inputs, rows, tiling, heads, before, {name: (*shape, dims[name]) for name in tiling.sums})


def held_queries_call(inputs: KernelInputs, rows: Rows, tiling: HeldTiling, sums: mx.array | None) -> KernelCall:
    """The call of `backward_hopper.cu` whose blocks hold queries; arguments as above.

    Its outputs are dq ``[B, Hq, Lq, D]`` plus `sums`, float32; in the dtype of q without `sums`. With an additive mask
    also its gradient ``[B, Hq, Lq, Lk]``, float32.
    """
    outputs = {"dq": inputs.q.shape, **mask_output(inputs)}
    return _call(inputs, rows, tiling, inputs.rows[1], {} if sums is None else {"dq_before": sums}, outputs)


def _call(
    inputs: KernelInputs,
    rows: Rows,
    tiling: HeldTiling,
    heads: int,
    before: dict[str, mx.array],
    outputs: dict[str, tuple[int, ...]],
) -> KernelCall:
    parts = tiling.holds_keys and heads > inputs.k.shape[1]
    dtype = mx.float32 if before or parts else inputs.q.dtype
    tiles = tiling.tile(False), tiling.tile(True)
    where = tiles, 1, -(-inputs.rows[2] // tiles[0])

    def make() -> KernelCall:
        reach = passing_tile_ranges(inputs, tiling)
        return gradient_call(
            "backward_hopper",
            ("matrix", "hopper", "held"),
            inputs,
            rows,
            tiling,
            {
                "reach": on_gpu(reach),
                "order": on_gpu(longest_first(reach).astype(np.int32)),
                **rule_buffers(inputs, *where),
                **before,
            },
            {
                "OF_KEYS": int(tiling.holds_keys),
                "SUM_K": int(tiling.needs_dp),
                "SUM_V": int("dv" in tiling.sums),
                "ADDS": int(bool(before)),
                "SCALES": int(not parts),
                "OUT": source.TYPES[dtype],
                "PASSING": tiling.PASSING,
                "STAGES": tiling.stages,
                "ARRIVALS": hopper_tiling.ARRIVALS,
            },
            outputs,
            (len(reach), heads, inputs.q.shape[0]),
            dtype,
        )

    call = prepared((tiling, bool(before), tuple(outputs.items())), inputs, make)
    return call.with_inputs({**arrays_of(inputs, rows), **rule_arrays(inputs.rules, *where), **before})
