"""Time prefill and decode of a random language model on one rank beside plain mlx-lm: ``python -m tools.nvidia.lm``.

The model has mlx-lm's Llama architecture, 4096 dims and 32/8 heads. Both read the same prompt and generate the same
number of tokens, greedily, in one process, one after the other.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import click
import mlx.core as mx
import mlx_lm
from mlx.utils import tree_map
from mlx_lm.models import llama
from mlx_lm.tokenizer_utils import TokenizerWrapper

import ringattn as ra
from ringattn import lm

VOCABULARY = 32_000


def model(layers: int) -> Any:
    """Build a model with random weights in bfloat16, the same in every call."""
    mx.random.seed(0)
    made = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=4096,
            num_hidden_layers=layers,
            intermediate_size=14_336,
            num_attention_heads=32,
            num_key_value_heads=8,
            rms_norm_eps=1e-5,
            vocab_size=VOCABULARY,
            rope_theta=500_000.0,
            max_position_embeddings=131_072,
            tie_word_embeddings=False,
        )
    )
    made.update(tree_map(lambda x: x.astype(mx.bfloat16), made.parameters()))
    mx.eval(made.parameters())
    return made


def tokenizer() -> TokenizerWrapper:
    """Build a tokenizer with one word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=words))


def rates(generate: Any, made: Any, words: TokenizerWrapper, prompt: list[int], tokens: int, repeats: int):
    """Median tokens a second of prefill and of decode, and the tokens generated."""
    found = []
    for _ in range(repeats + 1):
        responses = list(generate(made, words, prompt, max_tokens=tokens))
        found.append((responses[-1].prompt_tps, responses[-1].generation_tps))
    return *(median(x) for x in zip(*found[1:])), [x.token for x in responses]


@click.command(help=__doc__)
@click.option("--layers", default=8, show_default=True)
@click.option("--prompt", "prompts", multiple=True, type=int, default=(2048, 16_384), show_default=True)
@click.option("--tokens", default=64, show_default=True)
@click.option("--repeats", default=3, show_default=True)
def main(layers: int, prompts: tuple[int, ...], tokens: int, repeats: int) -> None:
    words = tokenizer()
    for length in prompts:
        prompt = [(7919 * i) % VOCABULARY for i in range(length)]
        plain = rates(mlx_lm.stream_generate, model(layers), words, prompt, tokens, repeats)
        with ra.init("solo") as ring:
            ours = rates(lm.stream_generate, lm.shard(model(layers), ring), words, prompt, tokens, repeats)
        same = sum(a == b for a, b in zip(ours[2], plain[2]))
        click.echo(
            f"{layers} layers of 4096, prompt {length}: prefill {ours[0]:.0f} tokens/s, {ours[0] / plain[0]:.2f} of "
            f"mlx-lm's {plain[0]:.0f}; decode {ours[1]:.1f} tokens/s, {ours[1] / plain[1]:.2f} of mlx-lm's "
            f"{plain[1]:.1f}; {same} of {tokens} tokens equal"
        )


if __name__ == "__main__":
    main()
