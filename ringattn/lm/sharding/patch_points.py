"""The functions and methods of mlx-lm's recurrent layers that run otherwise where tokens are spread over a ring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import mlx_lm_compat as compat
from .elementwise_recurrences import mamba_sequence, real_gated, real_gated_unit, selective_scan
from .recurrences import constant_decay, gated_delta, selective_state, wkv7
from .recurrent_cache import RecurrentCache
from .running_layer import Run, in_layer, recurrence
from .short_convolution import convolution_of_heads, ngram_embedding, padding_conv1d, token_shift

Wrap = Callable[[Run], Run]

FUNCTIONS: dict[str, Wrap] = {  # by the name under which the models' modules import or define them
    "gated_delta_update": recurrence(gated_delta),
    "ssm_update": recurrence(selective_state),
    "recurrent_gla": recurrence(constant_decay),
    "rnn_scan": recurrence(real_gated),
}


def uncompiled_step(plain: Run) -> Run:
    """Wrap the call of Kimi K3's delta attention, which runs a compiled function on one token on Metal.

    A rank may have one token of many. Then the layer exchanges data, which a compiled function cannot.
    """

    def call(layer: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if not (isinstance(cache, RecurrentCache) and cache.shared):
            return plain(layer, x, mask, cache)
        compiled = layer._step
        layer._step = layer._decode_core
        try:
            return plain(layer, x, mask, cache)
        finally:
            layer._step = compiled

    return call


METHODS: dict[tuple[str, str, str], Wrap] = {  # by module, class and method, as in mlx_lm_compat.METHODS
    ("mlx_lm.models.rwkv7", "Rwkv7TimeMixing", "_wkv7"): recurrence(wkv7),
    ("mlx_lm.models.rwkv7", "TokenShift", "__call__"): in_layer(token_shift),
    ("mlx_lm.models.jamba", "JambaMambaMixer", "ssm_step"): recurrence(selective_scan),
    ("mlx_lm.models.mamba", "MambaBlock", "ssm_step"): recurrence(selective_scan),
    ("mlx_lm.models.mamba", "MambaBlock", "_process_sequence"): in_layer(mamba_sequence),
    ("mlx_lm.models.recurrent_gemma", "Conv1d", "__call__"): in_layer(padding_conv1d),
    ("mlx_lm.models.recurrent_gemma", "RGLRU", "__call__"): in_layer(real_gated_unit),
    ("mlx_lm.models.kimi_k3", "KimiK3DeltaAttention", "__call__"): uncompiled_step,
    ("mlx_lm.models.longcat_flash_ngram", "NgramEmbedding", "__call__"): ngram_embedding,
    ("mlx_lm.models.baichuan_m1", "Attention", "_custom_convolution"): in_layer(convolution_of_heads),
}


def patch_recurrences(model: nn.Module) -> bool:
    """Patch the functions and methods that the layers of `model` call; return whether there are any."""
    found = False
    for module in compat.defining_modules(model):
        for name in FUNCTIONS.keys() & vars(module).keys():
            compat.patch(module, name, FUNCTIONS[name])
            found = True
    for kind in {type(part) for part in model.modules()}:
        for (where, name, method), wrap in METHODS.items():
            if (kind.__module__, kind.__name__) == (where, name):
                compat.patch(kind, method, wrap)
                found = True
    return found
