"""Plan of the Metal dispatches: which kernels run, on which part of the inputs, in which order."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import mlx.core as mx

from ..autograd.evaluation import InFlight
from ..core.online_softmax import State
from ..kernels.gpu.key_tiles import key_tile_ranges
from ..kernels.gpu.self_test import UnusableError, variant
from ..kernels.interface import KernelInputs, OutputSpec
from . import launch
from .device import Device, device
from .forward import combine_call, forward_call
from .tiling import Tiling, split_dispatches

FEW_ROWS = 64  # up to this many query rows that share their keys, the heads of a group are rows of one tile
LEAST_KEYS = 512  # in each run of keys, where keys are split to fill the GPU

Arrays = list[mx.array]


def attend(inputs: KernelInputs, state: State | None, output: OutputSpec | None) -> Arrays:
    """Attend and return the state ``[acc, m, l]`` or, given `output`, ``[out]`` or ``[out, lse]``.

    Inputs that fit one dispatch stay lazy, like MLX's own operations. Longer ones are evaluated dispatch by dispatch.
    """
    inputs = inputs.whole()
    if launch.tensor_ops():
        with suppress(UnusableError):  # fall through to the plain kernel
            return Plan.of(inputs, device(), tensor_ops=True).attend(state, output)
    return Plan.of(inputs, device()).attend(state, output)


@dataclass(frozen=True)
class Plan:
    """Layout of the inputs on a GPU: `group` query heads are rows of one tile."""

    inputs: KernelInputs
    gpu: Device
    group: int
    tiling: Tiling

    @classmethod
    def of(cls, inputs: KernelInputs, gpu: Device, tensor_ops: bool = False) -> Plan:
        """Make the plan for `whole` inputs, with or without the M5's matrix units."""
        q_len = inputs.rows[2]
        group = inputs.group if inputs.group * q_len <= FEW_ROWS else 1
        tiling = Tiling.of(inputs.q.dtype, inputs.q.shape[3], inputs.v.shape[3], q_len * group, tensor_ops)
        return cls(inputs, gpu, group, tiling)

    def attend(self, state: State | None, output: OutputSpec | None) -> Arrays:
        """Attend, dispatch by dispatch."""
        cuts = self.dispatches()
        flight = InFlight() if len(cuts) > 1 or len(cuts[0][1]) > 1 else None
        parts = [self.forward_chunks(queries, keys, state, output, flight) for queries, keys in cuts]
        return parts[0] if len(parts) == 1 else [mx.concatenate(list(part), 2) for part in zip(*parts)]

    @property
    def columns(self) -> int:
        """Number of threadgroups for each tile of query rows."""
        return self.inputs.rows[0] * self.inputs.rows[1] // self.group

    def dispatches(self) -> list[tuple[slice, list[slice]]]:
        """Runs of queries, each with its runs of keys: one dispatch for each run of keys."""
        inputs = self.inputs
        tiling = self.tiling
        tiles = key_tile_ranges(inputs.rules.band, inputs.q_pos, inputs.k_pos, tiling.BQ, self.group, tiling.BK)
        least = len(tiles) if self.group > 1 else -(-self.gpu.threadgroups // self.columns)
        flops = 2 * (tiling.BD + tiling.BV) * self.columns
        lengths = inputs.rows[2], inputs.k.shape[2]
        return split_dispatches(tiles, (tiling.BQ, tiling.BK), lengths, flops, self.gpu.budget, least)

    def forward_chunks(
        self, queries: slice, keys: list[slice], state: State | None, output: OutputSpec | None, flight
    ) -> Arrays:
        """Attend a run of queries to its runs of keys in order, carrying the state."""
        if state is not None:
            state = State(*(mx.contiguous(x[:, :, queries]) for x in state))
        for i, run_of_keys in enumerate(keys):
            last = i == len(keys) - 1
            part = self.inputs.part(queries, run_of_keys)
            outputs = self.run_part(part, state, output if last else None)
            if flight is not None:
                outputs = flight.add(outputs)
            if not last:
                state = State(*outputs)
        return outputs

    def splits(self, part: KernelInputs) -> int:
        """Number of runs of keys that are computed in parallel. More than one where too few rows fill the GPU."""
        groups = -(-part.rows[2] * self.group // self.tiling.BQ) * self.columns
        return max(1, min(self.gpu.threadgroups // groups, part.k.shape[2] // LEAST_KEYS))

    def run_part(self, part: KernelInputs, state: State | None, output: OutputSpec | None) -> Arrays:
        """Launch the kernels on a part of the inputs. On a Mac, test each kernel variant before its first use."""
        splits = self.splits(part)
        if launch.default():
            tensor = self.tiling.tensor
            details = [
                f"tiles of {self.tiling.BQ} x {self.tiling.BK}",
                "keys split" if splits > 1 else "keys in one run",
            ]
            details += ["tensor operations"] if tensor else []

            def few(inputs: KernelInputs, state: State | None, output: OutputSpec | None) -> Arrays:
                plan = Plan.of(inputs.whole(), self.gpu, tensor)
                return plan.launch_kernels(inputs, state, output, min(splits, 2))

            launch.self_test.ensure(variant(part, state, output, *details), few, part, state, output)
        return self.launch_kernels(part, state, output, splits)

    def launch_kernels(self, part: KernelInputs, state: State | None, output: OutputSpec | None, splits: int) -> Arrays:
        """Launch one kernel, or two where keys are split."""
        if splits == 1:
            return launch.run(forward_call(part, self.tiling, self.group, 1, state, output))
        states = launch.run(forward_call(part, self.tiling, self.group, splits, state, None))
        return launch.run(combine_call(State(*states), output))
