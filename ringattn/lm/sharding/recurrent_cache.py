"""The state of a recurrent layer: the same on every rank between two forward passes, however long the context is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from ...core.affine import AffineMap
from ...errors import ArgumentError
from ...layout import Layout
from ...ring.states import BeforeAndAfter, ChainCall, chain_states, is_first
from ...transport.base import Ring
from ...transport.solo import SoloRing
from .forward_pass import ShardedCache, current
from .history import TokenHistory

INPUTS = "inputs"  # the last inputs of a short convolution
STATE = "state"  # the state of a recurrence
TAIL = 32  # tokens at a prompt's end: a chat template may write them differently when another turn follows
LONG_TAIL = 1024  # tokens of a question after a long text: another question about the text may follow
KEPT = 4  # states around the last prompts: a conversation may go back by more than one turn, as after calls of tools


Arrays = list[mx.array | None]


class Slot(NamedTuple):
    """One of the arrays that a recurrent layer keeps.

    Attributes:
        kind: `INPUTS` or `STATE`.
        order: For `INPUTS`, which one of the layer's convolutions reads it.
        shape: The shape for a batch of one.
        dtype: The dtype.
    """

    kind: str
    order: int
    shape: tuple[int, ...]
    dtype: mx.Dtype


class RecurrentCache(ShardedCache):
    """Cache of a recurrent layer. mlx-lm calls it as it calls its own `ArraysCache`.

    A state cannot be trimmed. Instead the cache keeps some earlier states, and can go back to them: the latest `KEPT`
    of those before each prompt and `LONG_TAIL` and `TAIL` tokens before its end, and the one before the last forward
    pass. Each takes as many bytes as the state.

    Args:
        ring: The ring, of `ringattn.init`.
        slots: The arrays that the layer keeps.
        history: The ids of the tokens, one object for all layers of a model.
    """

    lengths = None  # of batches with padding, which a ring does not have
    left_padding = None
    loss = "no state of the recurrent layers is kept there"

    def __init__(self, ring: Ring, slots: Sequence[Slot], history: TokenHistory | None = None):
        super().__init__(ring, history)
        self.slots = tuple(slots)
        self.arrays: Arrays = [None] * len(slots)
        self.convolutions = 0  # that have run in this forward pass
        self._kept: dict[int, Arrays] = {}  # around the last prompts, by the number of tokens before them
        self._last: dict[int, Arrays] = {}  # before the last forward pass
        self._written: set[int] = set()  # slots, in this forward pass

    def expect_prompt(self, tokens: int) -> None:
        """Keep the state before a prompt of so many tokens, and in it those before its last tokens."""
        self._keep()
        self.marks = tuple(self.size() + tokens - tail for tail in (LONG_TAIL, TAIL) if tokens > tail)

    def begin(self, step: Any) -> None:
        """Set the positions for a forward pass of the tokens of `step`."""
        self._last = {self.size(): list(self.arrays)}
        self.convolutions = 0
        self._written = set()
        super().begin(step)

    def end(self) -> None:
        """Clear the state of the forward pass."""
        assert self.step is not None
        self.layout = Layout(((),) * self.ring.size, self.step.new.stop)
        if self.size() in self.marks:
            self._keep()
        super().end()

    def abandon(self) -> None:
        """Go back to the state before a forward pass that has failed."""
        self.arrays = list(self._last[self.size()])
        super().end()

    @property
    def shared(self) -> bool:
        """Whether each rank computes its own tokens in this forward pass."""
        return self.step is not None and self.step.shared

    @property
    def is_first(self) -> bool:
        """Whether this rank has the first tokens of the forward pass."""
        assert self.step is not None
        return is_first(self.step.new, self.ring.rank, 0)

    def chain(self, state: mx.array, own: AffineMap, transition: tuple[int, ...], matrix: bool) -> BeforeAndAfter:
        """Find the states before this rank's tokens and after all tokens. Collective.

        Args:
            state: The state before the forward pass, float32.
            own: The map of this rank's tokens.
            transition: The shape of a transition.
            matrix: Whether transitions are matrices; otherwise decays.
        """
        assert self.step is not None
        what = "a recurrent layer"
        with self.ring.call(what):
            return chain_states(self.ring, ChainCall(what, self.step.new, transition, matrix), state, [own])

    def __getitem__(self, i: int) -> mx.array | None:
        current.reading = self
        return self.arrays[i]

    def __setitem__(self, i: int, value: mx.array | None) -> None:
        if self.shared and self.slots[i].kind == INPUTS:
            return  # a layer knows only its own tokens' inputs: `store_inputs` has those of the last ones
        self._write(i, value)

    def __iter__(self) -> Iterator[mx.array | None]:
        return (self[i] for i in range(len(self.arrays)))

    def store_inputs(self, order: int, value: mx.array) -> None:
        """Keep the last inputs of all ranks' tokens for the layer's convolution `order`."""
        self._write(next(i for i, s in enumerate(self.slots) if (s.kind, s.order) == (INPUTS, order)), value)

    @property
    def unwritten(self) -> int:
        """The number of slots that the layer has yet to fill."""
        return len(self.slots) - len(self._written)

    def advance(self, n: int) -> None:
        """Do nothing; mlx-lm's cache counts padding here."""

    def make_mask(self, n: int) -> None:
        """Return no mask: there is no padding."""

    def empty(self) -> bool:
        """Whether no token was ever read."""
        return all(x is None for x in self.arrays)

    @property
    def state(self) -> Sequence[Any]:
        """The arrays, as mlx-lm's caches return them; nothing while the cache is empty."""
        return [] if self.empty() else list(self.arrays)

    @property
    def states(self) -> dict[int, Arrays]:
        """The state and the earlier ones that are kept, by the number of tokens before them, in ascending order."""
        found = {**self._kept, **self._last, self.size(): self.arrays}
        return {size: found[size] for size in sorted(found) if 0 < size <= self.size()}

    @property
    def nbytes(self) -> int:
        """Bytes of the state, and of the earlier states that are kept. Every rank has all of them."""
        kept = {id(x): x.nbytes for arrays in self.states.values() for x in arrays if x is not None}
        return sum(kept.values())

    @property
    def held_bytes(self) -> int:
        """As `nbytes`: there is no room for more."""
        return self.nbytes

    @property
    def form(self) -> str:
        """The shapes of the arrays for a batch of one, their dtypes, and their use."""
        shapes = [slot.shape if x is None else (1, *x.shape[1:]) for slot, x in zip(self.slots, self.arrays)]
        return ", ".join(
            f"{slot.kind} {slot.order} {shape} {str(slot.dtype).rpartition('.')[2]}"
            for slot, shape in zip(self.slots, shapes)
        )

    def is_trimmable(self) -> bool:
        """Return False: a state has no tokens that could be removed."""
        return False

    def restorable(self, size: int) -> int:
        """The largest number of first tokens, at most `size`, whose state is kept."""
        return max((n for n in self.states if n <= size), default=0)

    def trim(self, n: int) -> int:
        """Go back to the state before the last `n` tokens, which must be kept; return `n`. Every rank calls it."""
        n = min(n, self.size())
        left = self.size() - n
        if self.restorable(left) != left:
            raise ArgumentError(f"n: {n} tokens to remove, expected a number that leaves one of {[0, *self.states]}")
        if n:
            self._hold({size: arrays for size, arrays in self.states.items() if size <= left}, left)
        return n

    def restore(self, states: Mapping[int, Arrays], history: TokenHistory) -> None:
        """Hold the last one of `states`, and keep the others; see `RecurrentCache.states`."""
        self._hold(states, max(states))
        self.history = history

    def _write(self, slot: int, value: mx.array | None) -> None:
        self.arrays[slot] = value
        self._written.add(slot)

    def _keep(self) -> None:
        """Keep the state, and drop the oldest one that is too many."""
        if self.size():
            kept = {**self._kept, self.size(): list(self.arrays)}
            self._kept = dict(list(kept.items())[-KEPT:])

    def _hold(self, states: Mapping[int, Arrays], size: int) -> None:
        """Hold the state after `size` tokens, and keep those of fewer tokens."""
        self.layout = Layout(((),) * self.ring.size, size)
        self.offset = size
        self.arrays = list(states.get(size, [None] * len(self.slots)))
        self._kept = {at: list(arrays) for at, arrays in states.items() if at < size}
        self._last = {}
        self.marks = ()


class TracingRecurrentCache(RecurrentCache):
    """A cache for a trial pass that finds out what the layer keeps in each of its slots."""

    def __init__(self, count: int):
        super().__init__(SoloRing(60.0), [Slot(STATE, 0, (), mx.float32)] * count)
        self._states: list[mx.array] = []  # that recurrences have returned
        self._inputs: list[tuple[int, ...]] = []  # shapes of the last inputs of convolutions

    def note_state(self, state: mx.array) -> None:
        """Note a state that a known recurrence returns."""
        self._states.append(state)

    def note_inputs(self, shape: tuple[int, ...]) -> None:
        """Note the shape of the last inputs that a convolution needs."""
        self._inputs.append(shape)

    def found_slots(self) -> tuple[Slot, ...]:
        """The slots that the layer has filled.

        Raises:
            ArgumentError: Something is kept that is neither the state of a known recurrence nor the inputs of a short
                convolution.
        """
        slots = []
        left = list(enumerate(self._inputs))
        for i, x in enumerate(self.arrays):
            if x is None:
                raise ArgumentError(f"it keeps nothing in place {i} of its cache")
            state = any(x is one for one in self._states)
            match = next((one for one in left if one[1] == x.shape), None)
            if not state and match is None:
                raise ArgumentError(f"it keeps an array of shape {x.shape}, which is no state of a known recurrence")
            if match is not None and not state:
                left.remove(match)
            slots.append(Slot(STATE if state else INPUTS, 0 if state or match is None else match[0], x.shape, x.dtype))
        if left:
            raise ArgumentError(f"it has {len(self._inputs)} convolutions, but keeps the inputs of fewer")
        return tuple(slots)
