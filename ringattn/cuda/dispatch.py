"""Attention by the CUDA kernels: which of them run, and on what."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

import mlx.core as mx

from ..core.online_softmax import State
from ..kernels.gpu.self_test import MOST_KEYS, UnusableError
from ..kernels.interface import KernelInputs, OutputSpec
from . import launch
from .device import HOPPER, capability, shared_bytes
from .forward import combine_call, forward_call
from .hopper_tiling import HopperTiling
from .tiling import Tiling

FEW_ROWS = 64  # query rows that share their keys: up to there the heads of a group are rows of one tile
LEAST_KEYS = 512  # of a run, where keys are split to fill the GPU

Arrays = list[mx.array]


def attend(inputs: KernelInputs, state: State | None, output: OutputSpec | None) -> Arrays:
    """Attend, from `state` or from nothing, to ``[acc, m, l]`` or, given an `output`, to ``[out]`` or ``[out, lse]``.

    Results stay lazy. Each kernel variant is tried on a few tokens before the NVIDIA GPU first runs it.

    Raises:
        UnusableError: If the variant does not work here.
    """
    inputs = _with_scale_of_at_least_0(inputs.whole())
    plan = _usable(Plan.all(inputs), inputs, state, output)
    if state is not None:
        state = State(*map(mx.contiguous, state))
    return plan.launch(inputs, state, output, plan.splits(inputs))


def _usable(plans: list[Plan], inputs: KernelInputs, state: State | None, output: OutputSpec | None) -> Plan:
    """The first of `plans` that works here."""
    if not launch.default():
        return plans[0]
    for plan in plans[:-1]:
        with suppress(UnusableError):
            plan.test(inputs, state, output)
            return plan
    plans[-1].test(inputs, state, output)
    return plans[-1]


def _with_scale_of_at_least_0(inputs: KernelInputs) -> KernelInputs:
    """Return equal inputs whose largest scores are those of the largest products of queries and keys."""
    rules = inputs.rules
    return inputs if rules.scale >= 0 else replace(inputs, q=-inputs.q, rules=replace(rules, scale=-rules.scale))


@dataclass(frozen=True)
class Plan:
    """Layout of a inputs on a GPU: `group` query heads are rows of one tile."""

    group: int
    tiling: Tiling | HopperTiling

    @classmethod
    def all(cls, inputs: KernelInputs) -> list[Plan]:
        """Make the plans for some inputs, the fastest first."""
        q_len, dtype, dims = inputs.rows[2], inputs.q.dtype, (inputs.q.shape[3], inputs.v.shape[3])
        group = inputs.group if inputs.group * q_len <= FEW_ROWS else 1
        plans = [cls(group, Tiling.of(dtype, *dims, q_len * group, shared_bytes()))]
        if capability() == HOPPER and dtype.size == 2 and q_len > FEW_ROWS:
            plans.insert(0, cls(1, HopperTiling.of(*dims, q_len)))
        return plans

    def splits(self, inputs: KernelInputs) -> int:
        """How many runs of its keys are attended to side by side: more than one where there are too few rows."""
        batch, heads, q_len = inputs.rows
        blocks = -(-q_len * self.group // self.tiling.BQ) * batch * heads // self.group
        return max(1, min(self.tiling.blocks // blocks, inputs.k.shape[2] // LEAST_KEYS))

    def test(self, inputs: KernelInputs, state: State | None, output: OutputSpec | None) -> None:
        """Try the kernels on a few tokens, once; see `SelfTest.ensure`."""
        splits, sizes = self.splits(inputs), f"tiles of {self.tiling.BQ} x {self.tiling.BK}{self.tiling.name}"

        def few(inputs: KernelInputs, state: State | None, output: OutputSpec | None) -> Arrays:
            return self.launch(inputs.whole(), state, output, min(splits, 2))

        details = sizes, "keys split" if splits > 1 else "keys in one run"
        keys = self.tiling.stages * self.tiling.BK + MOST_KEYS  # all stages are used, and one again
        launch.self_test.ensure(few, inputs, state, output, *details, keys=keys)

    def launch(self, inputs: KernelInputs, state: State | None, output: OutputSpec | None, splits: int) -> Arrays:
        """One kernel, or two where keys are split."""
        if splits == 1:
            return launch.run(forward_call(inputs, self.tiling, self.group, 1, state, output))
        states = launch.run(forward_call(inputs, self.tiling, self.group, splits, state, None))
        return launch.run(combine_call(State(*states), output))
