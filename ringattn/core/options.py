"""The options that `attention`, `ring_attention` and `decode_attention` share, checked and with their defaults."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import mlx.core as mx
import numpy as np

from . import validation
from .gradients import Gradients, Rows
from .masks import Band
from .rules import Rules


class SharedOptions(TypedDict, total=False):
    """The keyword arguments of all three calls, for the type checker's overloads of `return_lse`."""

    scale: float | None
    mask: str | mx.array | None
    window: int | tuple[int, int] | None
    softcap: float | None
    sinks: mx.array | None
    out_dtype: mx.Dtype | None
    backend: str | None


@dataclass(frozen=True)
class Options:
    """Checked options of one call. Arrays that are not there are ``None``."""

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
        """Check everything; `columns` is how many keys an array mask spans.

        Raises:
            ArgumentError: With the first argument that is wrong.
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
        """The positions that each query sees, by a causal mask and a window."""
        return Band.of(self.causal, self.window)

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays that are there, in the order that `bind` takes."""
        return [x for x in (self.mask, self.sinks, *(self.segments or ())) if x is not None]

    def bind(self, arrays: Sequence[mx.array]) -> Options:
        """These options with `arrays` in place of their own: what a transformed function is given."""
        if not arrays:
            return self
        given: Iterator[mx.array] = iter(arrays)
        mask = None if self.mask is None else next(given)
        sinks = None if self.sinks is None else next(given)
        segments = None if self.segments is None else (next(given), next(given))
        return replace(self, mask=mask, sinks=sinks, segments=segments)

    def gradients(self, sums: Gradients, rows: Rows, dtype: mx.Dtype) -> list[mx.array]:
        """The gradients by q, k, v, in their `dtype`, and by `arrays`, in theirs; zeros where there is none."""
        mask = sums.mask
        if mask is not None and self.mask is not None and mask.shape != self.mask.shape:  # one row for all queries
            mask = mask.sum(axis=2, keepdims=True)
        found = {"mask": mask, "sinks": None if self.sinks is None else rows.by_sinks(self.sinks)}
        given = {"mask": self.mask, "sinks": self.sinks}
        by_options = [mx.zeros_like(x) if found[name] is None else found[name].astype(x.dtype)
                      for name, x in given.items() if x is not None]  # fmt: skip
        return [*(x.astype(dtype) for x in sums[:3]), *by_options, *map(mx.zeros_like, self.segments or ())]

    def rules(self, columns: np.ndarray | None = None) -> Rules:
        """What a kernel needs of them."""
        return Rules(self.scale, self.band, self.softcap, self.mask, columns, self.segments)

    @property
    def _mask_text(self) -> str:
        """The mask as the user gave it. A rank's rows of an array are its own; the other axes are the same for all."""
        if self.mask is None:
            return repr("causal" if self.causal else None)
        batch, heads, _, columns = self.mask.shape
        return f"{self.mask.dtype} array of batch {batch}, heads {heads}, columns {columns}"

    @property
    def fields(self) -> tuple[tuple[str, str], ...]:
        """What all ranks must agree on, as (argument, value) pairs.

        An array mask and segments are each rank's own; sinks are the same for all.
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
