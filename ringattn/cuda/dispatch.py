"""Attention by the CUDA kernels: which of them run, and on what."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass, replace

import mlx.core as mx

from ..core.kept import Kept
from ..core.online_softmax import State
from ..kernels.gpu.buffers import rule_arrays, state_buffers
from ..kernels.gpu.key_tiles import key_tile_ranges
from ..kernels.gpu.self_test import MOST_KEYS, UnusableError, variant
from ..kernels.interface import KernelInputs, OutputSpec
from . import launch
from .calls import problem, without_arrays
from .device import HOPPER, capability, shared_bytes
from .forward import combine_call, forward_call
from .hopper_tiling import HopperTiling
from .launch import KernelCall
from .tail import Tail
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
    if state is not None:
        state = State(*map(mx.contiguous, state))
    return _usable(Launches.kept(inputs, state, output), inputs, state, output).run(inputs, state, output)


def _usable(choices: list[Launches], inputs: KernelInputs, state: State | None, output: OutputSpec | None) -> Launches:
    """The first of the `choices` that works here."""
    if not launch.default():
        return choices[0]
    for launches in choices[:-1]:
        with suppress(UnusableError):
            launches.test(inputs, state, output)
            return launches
    choices[-1].test(inputs, state, output)
    return choices[-1]


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

    def cuts(self, inputs: KernelInputs) -> list[tuple[int, Tail | None]]:
        """How keys are cut to fill the GPU, the fastest way first.

        Returns:
            In how many runs, attended to side by side, those of all tiles are cut: more than one where there are too
            few rows. If one: how those of the last tiles are.
        """
        batch, heads, q_len = inputs.rows
        blocks = -(-q_len * self.group // self.tiling.BQ) * batch * heads // self.group
        splits = max(1, min(self.tiling.blocks // blocks, inputs.k.shape[2] // LEAST_KEYS))
        if splits > 1 or inputs.rules.segments is not None or not isinstance(self.tiling, HopperTiling):
            return [(splits, None)]
        sizes = self.tiling.BQ, self.group, self.tiling.BK
        reach = key_tile_ranges(inputs.rules.band, inputs.q_pos, inputs.k_pos, *sizes)
        tail = Tail.of(self.tiling, reach, batch * heads)
        return [(1, None)] if tail is None else [(1, tail), (1, None)]

    def arrays(self, inputs: KernelInputs) -> dict[str, mx.array]:
        """The buffers of the forward kernel that have the contents of arrays of the `inputs`."""
        q_tiles = -(-inputs.rows[2] * self.group // self.tiling.BQ)
        rules = rule_arrays(inputs.rules, (self.tiling.BQ, self.tiling.BK), self.group, q_tiles)
        return {"queries": inputs.q, "keys": inputs.k, "values": inputs.v, **rules}


@dataclass(frozen=True)
class Launches:
    """The kernels of a call without its arrays: one, or two where keys are cut. It serves all calls with its key.

    Attributes:
        variant: The kernel variant, for the self-test.
        forward: The call of the forward kernel.
        combine: The call of `combine.cu`, where keys are split.
        tail: How the last tiles are cut, if they are.
    """

    plan: Plan
    splits: int
    variant: str
    forward: KernelCall
    combine: KernelCall | None
    tail: Tail | None

    @classmethod
    def of(
        cls,
        plan: Plan,
        splits: int,
        tail: Tail | None,
        inputs: KernelInputs,
        state: State | None,
        output: OutputSpec | None,
    ) -> Launches:
        """Prepare the kernels for some inputs."""
        sizes = f"tiles of {plan.tiling.BQ} x {plan.tiling.BK}{plan.tiling.name}"
        cut = "keys split" if splits > 1 else "keys in one run" if tail is None else "keys of the last tiles split"
        name = variant(inputs, state, output, sizes, cut)
        if splits == 1:
            forward = forward_call(inputs, plan.tiling, plan.group, 1, state, output, tail)
            return cls(plan, 1, name, without_arrays(forward), None, tail)
        forward = forward_call(inputs, plan.tiling, plan.group, splits, state, None)
        combine = combine_call(State(*map(mx.zeros, forward.output_shapes)), output)
        return cls(plan, splits, name, without_arrays(forward), without_arrays(combine), None)

    @classmethod
    def kept(cls, inputs: KernelInputs, state: State | None, output: OutputSpec | None) -> list[Launches]:
        """Prepare the kernels of each plan, or return those of a call with the same shapes, rules and positions."""

        def make() -> list[Launches]:
            choices = [(plan, *cut) for plan in Plan.all(inputs) for cut in plan.cuts(inputs)]
            return [cls.of(plan, splits, tail, inputs, state, output) for plan, splits, tail in choices]

        positions = inputs.q_pos, inputs.k_pos, inputs.rules.columns
        return _kept.get(_key(inputs, state, output), positions, make)

    def test(self, inputs: KernelInputs, state: State | None, output: OutputSpec | None) -> None:
        """Try the kernels on a few tokens, unless they have passed; see `SelfTest.ensure`."""

        def few(inputs: KernelInputs, state: State | None, output: OutputSpec | None) -> Arrays:
            inputs = inputs.whole()
            tail = None if self.tail is None else self.tail.of_trial(inputs.rows[1])
            return Launches.of(self.plan, min(self.splits, 2), tail, inputs, state, output).run(inputs, state, output)

        runs = 1 if self.splits == 1 and self.tail is None else 2
        tiles = (self.plan.tiling.stages + 1) * runs  # each run uses all stages, and one again
        keys = (tiles - 1) * self.plan.tiling.BK + MOST_KEYS
        launch.self_test.ensure(self.variant, few, inputs, state, output, keys)

    def run(self, inputs: KernelInputs, state: State | None, output: OutputSpec | None) -> Arrays:
        """Run the kernels on `inputs`."""
        arrays = self.plan.arrays(inputs) | state_buffers(state, output if self.combine is None else None)
        if self.tail is not None:
            arrays |= {"arrived": launch.run(self.tail.counts)[0]}
        found = launch.run(self.forward.with_inputs(arrays))
        if self.combine is None:
            return found if self.tail is None else found[:-1]
        return launch.run(self.combine.with_inputs(state_buffers(State(*found), output)))


_kept: Kept[list[Launches]] = Kept(64)


def _key(inputs: KernelInputs, state: State | None, output: OutputSpec | None) -> Hashable:
    """All that the kernels of a call depend on, but for positions."""
    ends = None if output is None else (output.dtype, output.lse, output.sinks is None)
    return problem(inputs), state is None, ends
