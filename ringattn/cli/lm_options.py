"""Options of the commands that run a language model. Options that mlx-lm has too have its names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from .counts import Count
from .host_options import HOSTS, PROCESSES, ranks_option, tensor_option
from .trace_option import trace_option


class Number(click.FloatRange):
    """Finite number in a range; NaN is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value}, expected a finite number.", param, ctx)
        return number


class JsonObject(click.ParamType):
    """JSON object, converted to a dict."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            parsed = value if isinstance(value, dict) else json.loads(value)
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            self.fail(f"{value!r}, expected a JSON object such as '{{\"enable_thinking\": false}}'.", param, ctx)
        return parsed


class Numbers(click.ParamType):
    """Numbers with commas between them, converted to a list."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return [float(number) for number in value.split(",")]
        except ValueError:
            self.fail(f"{value!r}, expected numbers with commas between them.", param, ctx)


OPTIONS = (
    ranks_option(
        "Ranks (processes) to spread it over; not under ringattn launch or mpiexec.  "
        "[default: 1, or one for each slot of the hosts]"
    ),
    *HOSTS,
    *PROCESSES,
    trace_option(),
    tensor_option,
    click.option(
        "--model",
        required=True,
        metavar="PATH",
        help="A folder or Hugging Face repository that mlx-lm loads, a Llama GGUF file, or 'smollm2'.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "float16", "bfloat16"]),
        help="Convert all weights to this dtype, quantised ones too; float32 is by far the fastest on a CPU.",
    ),
    click.option(
        "-m",
        "--max-tokens",
        default=256,
        show_default=True,
        type=Count(min=1),
        help="Largest number of tokens of an answer.",
    ),
    click.option("--temp", default=0.0, show_default=True, type=Number(min=0), help="Sampling temperature; 0: none."),
    click.option("--top-p", default=1.0, show_default=True, type=Number(0, 1), help="Sampling top-p."),
    click.option("--top-k", default=0, show_default=True, type=click.IntRange(min=0), help="Sampling top-k; 0: all."),
    click.option("--min-p", default=0.0, show_default=True, type=Number(0, 1), help="Sampling min-p."),
    click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Seed of the sampling."),
    click.option(
        "--prefill-step-size",
        type=Count(min=1),
        metavar="TOKENS",
        help="Tokens that a rank, not all together, computes in one round of prefill.  "
        "[default: as many as the memory allows, in rounds of about 20 s or less]",
    ),
    click.option(
        "--weights",
        type=Numbers(),
        metavar="W,W,...",
        help="Speeds of the ranks, or of the groups of --tensor ranks: their shares of prefill and cache.",
    ),
)

CONVERSATION = (
    click.option("--system-prompt", metavar="TEXT", help="Instructions for the model before the first turn."),
    click.option(
        "--chat-template-config",
        type=JsonObject(),
        metavar="JSON",
        help="Further arguments of the model's chat template, such as '{\"enable_thinking\": false}'.",
    ),
    click.option(
        "--extra-eos-token", multiple=True, metavar="TOKEN", help="Another token that ends an answer; repeatable."
    ),
    click.option(
        "--prompt-cache-file", type=click.Path(dir_okay=False, path_type=Path), help="Continue from this prompt cache."
    ),
    click.option(
        "--save-prompt-cache",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Save the cache of the whole conversation here, with a file for each rank beside it.",
    ),
)
