"""Attention by the CUDA kernels: which of them run, and on what."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx

from ..core.online_softmax import State
from ..kernels.interface import KernelInputs, OutputSpec
from . import launch
from .device import shared_bytes
from .forward import combine_call, forward_call
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
    plan = Plan.of(inputs)
    splits = plan.splits(inputs)
    if launch.default():
        details = [f"tiles of {plan.tiling.BQ} x {plan.tiling.BK}", "keys split" if splits > 1 else "keys in one run"]

        def few(inputs: KernelInputs, state: State | None, output: OutputSpec | None) -> Arrays:
            return plan.launch(inputs.whole(), state, output, min(splits, 2))

        launch.self_test.ensure(few, inputs, state, output, *details)
    if state is not None:
        state = State(*map(mx.contiguous, state))
    return plan.launch(inputs, state, output, splits)


def _with_scale_of_at_least_0(inputs: KernelInputs) -> KernelInputs:
    """Return equal inputs whose largest scores are those of the largest products of queries and keys."""
    rules = inputs.rules
    return inputs if rules.scale >= 0 else replace(inputs, q=-inputs.q, rules=replace(rules, scale=-rules.scale))


@dataclass(frozen=True)
class Plan:
    """Layout of a inputs on a GPU: `group` query heads are rows of one tile."""

    group: int
    tiling: Tiling

    @classmethod
    def of(cls, inputs: KernelInputs) -> Plan:
        """Make the plan for some inputs."""
        q_len = inputs.rows[2]
        group = inputs.group if inputs.group * q_len <= FEW_ROWS else 1
        return cls(
            group, Tiling.of(inputs.q.dtype, inputs.q.shape[3], inputs.v.shape[3], q_len * group, shared_bytes())
        )

    def splits(self, inputs: KernelInputs) -> int:
        """How many runs of its keys are attended to side by side: more than one where there are too few rows."""
        batch, heads, q_len = inputs.rows
        blocks = -(-q_len * self.group // self.tiling.BQ) * batch * heads // self.group
        return max(1, min(self.tiling.blocks // blocks, inputs.k.shape[2] // LEAST_KEYS))

    def launch(self, inputs: KernelInputs, state: State | None, output: OutputSpec | None, splits: int) -> Arrays:
        """One kernel, or two where keys are split."""
        if splits == 1:
            return launch.run(forward_call(inputs, self.tiling, self.group, 1, state, output))
        states = launch.run(forward_call(inputs, self.tiling, self.group, splits, state, None))
        return launch.run(combine_call(State(*states), output))
