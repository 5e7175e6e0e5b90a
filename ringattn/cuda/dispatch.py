"""Attention by the CUDA kernels: which of them run, and on what."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx

from ..core.online_softmax import State
from ..kernels.interface import KernelInputs, OutputSpec
from . import launch, self_test
from .forward import combine_call, forward_call
from .tiling import Tiling

FEW_ROWS = 64  # query rows that share their keys: up to there the heads of a group are rows of one tile
LEAST_KEYS = 512  # of a run, where keys are split to fill the GPU

Arrays = list[mx.array]


def attend(problem: KernelInputs, state: State | None, ending: OutputSpec | None) -> Arrays:
    """Attend, from `state` or from nothing, to ``[acc, m, l]`` or, given an `ending`, to ``[out]`` or ``[out, lse]``.

    Results stay lazy. Each kernel variant is tried on a few tokens before the NVIDIA GPU first runs it.

    Raises:
        UnusableError: If the variant does not work here.
    """
    problem = _with_scale_of_at_least_0(problem.whole())
    plan = Plan.of(problem)
    splits = plan.splits(problem)
    if launch.default():
        words = [f"tiles of {plan.tiling.BQ} x {plan.tiling.BK}", "keys split" if splits > 1 else "keys in one run"]

        def few(problem: KernelInputs, state: State | None, ending: OutputSpec | None) -> Arrays:
            return plan.launch(problem.whole(), state, ending, min(splits, 2))

        self_test.ensure(few, problem, state, ending, *words)
    if state is not None:
        state = State(*map(mx.contiguous, state))
    return plan.launch(problem, state, ending, splits)


def _with_scale_of_at_least_0(problem: KernelInputs) -> KernelInputs:
    """Return an equal problem whose largest scores are those of the largest products of queries and keys."""
    rules = problem.rules
    return problem if rules.scale >= 0 else replace(problem, q=-problem.q, rules=replace(rules, scale=-rules.scale))


@dataclass(frozen=True)
class Plan:
    """How a problem is laid out on a GPU: `group` query heads are rows of one tile."""

    group: int
    tiling: Tiling

    @classmethod
    def of(cls, problem: KernelInputs) -> Plan:
        """The plan for a problem."""
        q_len = problem.rows[2]
        group = problem.group if problem.group * q_len <= FEW_ROWS else 1
        return cls(group, Tiling.of(problem.q.dtype, problem.q.shape[3], problem.v.shape[3], q_len * group))

    def splits(self, problem: KernelInputs) -> int:
        """How many runs of its keys are attended to side by side: more than one where there are too few rows."""
        batch, heads, q_len = problem.rows
        blocks = -(-q_len * self.group // self.tiling.BQ) * batch * heads // self.group
        return max(1, min(self.tiling.blocks // blocks, problem.k.shape[2] // LEAST_KEYS))

    def launch(self, problem: KernelInputs, state: State | None, ending: OutputSpec | None, splits: int) -> Arrays:
        """One kernel, or two where keys are split."""
        if splits == 1:
            return launch.run(forward_call(problem, self.tiling, self.group, 1, state, ending))
        states = launch.run(forward_call(problem, self.tiling, self.group, splits, state, None))
        return launch.run(combine_call(State(*states), ending))
