"""Attention by the Metal kernels: which of them run, on what part, and in which order."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import mlx.core as mx

from ..autograd.custom_function import InFlight
from ..core.online_softmax import State
from ..kernels.interface import KernelInputs, OutputSpec
from . import launch, self_test
from .device import Device, device
from .forward import combine_call, forward_call
from .tiling import Tiling, pieces, reach

FEW_ROWS = 64  # query rows that share their keys: up to there the heads of a group are rows of one tile
LEAST_KEYS = 512  # of a run, where keys are split to fill the GPU

Arrays = list[mx.array]


def attend(problem: KernelInputs, state: State | None, ending: OutputSpec | None) -> Arrays:
    """Attend, from `state` or from nothing, to ``[acc, m, l]`` or, given an `ending`, to ``[out]`` or ``[out, lse]``.

    A problem that is one dispatch stays lazy, as MLX's own operations; a longer one is evaluated piece by piece.
    """
    problem = problem.whole()
    if launch.tensor_ops():
        with suppress(self_test.UnusableError):  # then the plain kernel
            return Plan.of(problem, device(), tensor_ops=True).attend(state, ending)
    return Plan.of(problem, device()).attend(state, ending)


@dataclass(frozen=True)
class Plan:
    """How a problem is laid out on a GPU: `group` query heads are rows of one tile."""

    problem: KernelInputs
    gpu: Device
    group: int
    tiling: Tiling

    @classmethod
    def of(cls, problem: KernelInputs, gpu: Device, tensor_ops: bool = False) -> Plan:
        """The plan for a `whole` problem, with or without the M5's matrix units."""
        q_len = problem.rows[2]
        group = problem.group if problem.group * q_len <= FEW_ROWS else 1
        tiling = Tiling.of(problem.q.dtype, problem.q.shape[3], problem.v.shape[3], q_len * group, tensor_ops)
        return cls(problem, gpu, group, tiling)

    def attend(self, state: State | None, ending: OutputSpec | None) -> Arrays:
        """Attend piece by piece."""
        cuts = self.pieces()
        flight = InFlight() if len(cuts) > 1 or len(cuts[0][1]) > 1 else None
        parts = [self.chain(queries, keys, state, ending, flight) for queries, keys in cuts]
        return parts[0] if len(parts) == 1 else [mx.concatenate(list(part), 2) for part in zip(*parts)]

    @property
    def columns(self) -> int:
        """Threadgroups for each tile of query rows."""
        return self.problem.rows[0] * self.problem.rows[1] // self.group

    def pieces(self) -> list[tuple[slice, list[slice]]]:
        """Runs of queries, each with its runs of keys, one for each dispatch."""
        problem, tiling = self.problem, self.tiling
        tiles = reach(problem.rules.band, problem.q_pos, problem.k_pos, tiling.BQ, self.group, tiling.BK)
        least = len(tiles) if self.group > 1 else -(-self.gpu.threadgroups // self.columns)
        flops = 2 * (tiling.BD + tiling.BV) * self.columns
        lengths = problem.rows[2], problem.k.shape[2]
        return pieces(tiles, (tiling.BQ, tiling.BK), lengths, flops, self.gpu.budget, least)

    def chain(
        self, queries: slice, keys: list[slice], state: State | None, ending: OutputSpec | None, flight
    ) -> Arrays:
        """Take a run of queries through its runs of keys."""
        if state is not None:
            state = State(*(mx.contiguous(x[:, :, queries]) for x in state))
        for i, run_of_keys in enumerate(keys):
            last = i == len(keys) - 1
            part = self.problem.part(queries, run_of_keys)
            outputs = self.dispatch(part, state, ending if last else None)
            if flight is not None:
                outputs = flight.add(outputs)
            if not last:
                state = State(*outputs)
        return outputs

    def splits(self, part: KernelInputs) -> int:
        """How many runs of its keys are attended to side by side: more than one where there are too few rows."""
        groups = -(-part.rows[2] * self.group // self.tiling.BQ) * self.columns
        return max(1, min(self.gpu.threadgroups // groups, part.k.shape[2] // LEAST_KEYS))

    def dispatch(self, part: KernelInputs, state: State | None, ending: OutputSpec | None) -> Arrays:
        """Launch the kernels on a part of the problem; on a Mac only those that have shown to work there."""
        splits = self.splits(part)
        if launch.default():
            tensor = self.tiling.tensor
            words = [f"tiles of {self.tiling.BQ} x {self.tiling.BK}", "keys split" if splits > 1 else "keys in one run"]
            words += ["tensor operations"] if tensor else []

            def few(problem: KernelInputs, state: State | None, ending: OutputSpec | None) -> Arrays:
                plan = Plan.of(problem.whole(), self.gpu, tensor)
                return plan.launch(problem, state, ending, min(splits, 2))

            self_test.ensure(few, part, state, ending, *words)
        return self.launch(part, state, ending, splits)

    def launch(self, part: KernelInputs, state: State | None, ending: OutputSpec | None, splits: int) -> Arrays:
        """One kernel, or two where keys are split."""
        if splits == 1:
            return launch.run(forward_call(part, self.tiling, self.group, 1, state, ending))
        states = launch.run(forward_call(part, self.tiling, self.group, splits, state, None))
        return launch.run(combine_call(State(*states), ending))
