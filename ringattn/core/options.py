"""Checked options, with their defaults, of `attention`, `ring_attention` and `decode_attention`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import mlx.core as mx
import numpy as np

from . import validation
from .gradients import Gradients, Rows
from .masks import Band
from .rules import ScoreRules


class SharedOptions(TypedDict, total=False):
    """Keyword arguments of all three calls, for the type checker's overloads of `return_lse`."""

    scale: float | None
    mask: str | mx.array | None
    window: int | tuple[int, int] | None
    softcap: float | None
    sinks: mx.array | None
    out_dtype: mx.Dtype | None
    backend: str | None


@dataclass(frozen=True)
class Options:
    """Checked options of one call. Arrays that are not given are ``None``."""

    scale: float
    causal: bool
    window: int | tuple[int, int] | None
    softcap: float | None
    mask: mx.array | None
    sinks: mx.array | None
    segments: tuple[mx.array, mx.array] | None
    out_dtype: mx.Dtype

    @classmethod
    def checked(
        cls,
        q: mx.array,
        k: mx.array,
        *,
        columns: int,
        scale: Any,
        mask: Any,
        window: Any,
        softcap: Any,
        sinks: Any,
        segments: Any,
        out_dtype: Any,
        one_segments: bool = False,
    ) -> Options:
        """Check all options. `columns` is the number of keys that an array mask spans.

        Raises:
            ArgumentError: If an argument is wrong; the message names the first one.
        """
        batch, heads, q_len, dim = q.shape
        causal, array = validation.check_mask(mask, (batch, heads, q_len, columns))
        return cls(
            scale=validation.check_scale(scale, dim),
            causal=causal,
            window=validation.check_window(window),
            softcap=validation.check_softcap(softcap),
            mask=array,
            sinks=validation.check_sinks(sinks, heads),
            segments=validation.check_segments(segments, batch, q_len, k.shape[2], single=one_segments),
            out_dtype=validation.check_out_dtype(out_dtype, q.dtype),
        )

    @property
    def band(self) -> Band:
        """The band of the causal mask and the window."""
        return Band.of(self.causal, self.window)

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays that are not None, in the order of `bind`."""
        return [x for x in (self.mask, self.sinks, *(self.segments or ())) if x is not None]

    def bind(self, arrays: Sequence[mx.array]) -> Options:
        """Replace the arrays by `arrays`, which a transformed function receives."""
        if not arrays:
            return self
        given: Iterator[mx.array] = iter(arrays)
        mask = None if self.mask is None else next(given)
        sinks = None if self.sinks is None else next(given)
        segments = None if self.segments is None else (next(given), next(given))
        return replace(self, mask=mask, sinks=sinks, segments=segments)

    def gradients(self, sums: Gradients, rows: Rows, dtype: mx.Dtype) -> list[mx.array]:
        """Convert sums to gradients with respect to q, k, v in `dtype` and to `arrays` in their dtypes.

        An array without a gradient gets zeros.
        """
        mask = sums.mask
        if mask is not None and self.mask is not None and mask.shape != self.mask.shape:  # one mask row for all queries
            mask = mask.sum(axis=2, keepdims=True)
        found = {"mask": mask, "sinks": None if self.sinks is None else rows.sinks_gradient(self.sinks)}
        given = {"mask": self.mask, "sinks": self.sinks}
        option_gradients = [mx.zeros_like(x) if found[name] is None else found[name].astype(x.dtype)
                      for name, x in given.items() if x is not None]  # fmt: skip
        return [*(x.astype(dtype) for x in sums[:3]), *option_gradients, *map(mx.zeros_like, self.segments or ())]

    def rules(self, columns: np.ndarray | None = None) -> ScoreRules:
        """Make the rules of a kernel call."""
        return ScoreRules(self.scale, self.band, self.softcap, self.mask, columns, self.segments)

    @property
    def _mask_text(self) -> str:
        """Description of the mask that is equal on all ranks. Each rank has its own rows of an array mask."""
        if self.mask is None:
            return repr("causal" if self.causal else None)
        batch, heads, _, columns = self.mask.shape
        return f"{self.mask.dtype} array of batch {batch}, heads {heads}, columns {columns}"

    @property
    def fields(self) -> tuple[tuple[str, str], ...]:
        """Values that all ranks must agree on, as (argument, value) pairs.

        Each rank has its own array mask and segments. Sinks are equal on all ranks.
        """
        sinks = "None" if self.sinks is None else str(self.sinks.tolist())
        return (
            ("scale", repr(self.scale)),
            ("mask", self._mask_text),
            ("window", repr(self.window)),
            ("softcap", repr(self.softcap)),
            ("sinks", sinks),
            ("segments", "None" if self.segments is None else "given"),
            ("out_dtype", str(self.out_dtype)),
        )
