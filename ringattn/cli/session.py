"""Conversation with a language model on a ring: prompts, answers, and the prompt cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ..errors import ArgumentError
from ..transport.grid import Grid
from .progress_bar import make_callback

if TYPE_CHECKING:
    from ..lm.conversation import Conversation


class Session:
    """Model on a ring, with the cache of the conversation.

    Attributes:
        grid: All ranks, and their rows.
        ring: The ring of all ranks.
        options: Options of the command.
        text: Prompt that the command has read; ``None`` on ranks other than 0.
    """

    def __init__(self, grid: Grid, model: Any, tokenizer: Any, options: dict[str, Any], text: Any = None):
        import mlx.core as mx

        from .. import lm
        from ..lm.sharding.forward_pass import tokens_of
        from ..ring.call import check_ring

        self.grid = grid
        self.ring = check_ring(grid.ring)
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        self.text = text
        file = options.get("prompt_cache_file")
        with names_of_options():
            lm.shard(model, grid, weights=options["weights"])
        if options["seed"] is not None:
            mx.random.seed(options["seed"])
        if file is None:
            self.reset()
            return
        self.cache, metadata = lm.load_cache(file, model)
        self.conversation = self._new_conversation(metadata, tokens_of(self.cache))

    @property
    def is_first(self) -> bool:
        """Whether this rank reads the input and prints the output."""
        return self.ring.rank == 0

    def reset(self) -> None:
        """Begin a new conversation."""
        self.cache = self.model.make_cache()
        self.conversation = self._new_conversation()

    def _new_conversation(self, *held: Any) -> Conversation:
        from ..lm.conversation import Conversation

        # `ringattn serve` has no such options.
        system, config = (self.options.get(name) for name in ("system_prompt", "chat_template_config"))
        return Conversation(self.tokenizer, system, config, *held)

    def tokens(self, text: str, plain: bool = False) -> list[int]:
        """Tokens to read for a user's turn, in the model's chat template unless `plain`. Collective.

        The cache is trimmed to the tokens that it shares with the new prompt, or to fewer where it cannot go back to
        these; the other tokens are read again, which rank 0 says. A template may change an earlier turn when another
        one follows. The result is empty on ranks other than 0.
        """
        from ..lm.reuse import find_reuse
        from ..lm.sharding.forward_pass import tokens_of, trim_to
        from ..transport.collectives import broadcast_bytes
        from ..transport.consensus import raise_on_all_ranks

        ids: list[int] = []
        own: bytes | None = None
        with raise_on_all_ranks(self.ring, "broadcast"):
            if self.is_first:
                use_template = self.tokenizer.has_chat_template and not plain
                ids = self.conversation.ask(text) if use_template else self._plain_tokens(text)
                reuse = find_reuse(tokens_of(self.cache), self.cache, ids)
                own = str(reuse.kept).encode()
                if reuse.line is not None:
                    click.echo(reuse.line, err=True)
        kept = int(broadcast_bytes(self.ring, own))
        if kept == 0:
            self.cache = self.model.make_cache()
        trim_to(self.cache, kept)
        return ids[kept:]

    def _plain_tokens(self, text: str) -> list[int]:
        """Tokens of the cache, then those of the text without a template."""
        from ..lm.sharding.forward_pass import tokens_of

        for name in ("system_prompt", "chat_template_config"):
            if self.options[name] is not None:
                flag = "--" + name.replace("_", "-")
                raise ArgumentError(f"{flag}: {self.options[name]!r}, expected none: no chat template is used")
        return self.conversation.ask_plainly(text, tokens_of(self.cache))

    def answer(self, ids: Sequence[int], stopped: Callable[[], bool] | None = None) -> Any:
        """Generate an answer, and print it on rank 0 as it comes.

        A prompt that is stopped before its end leaves no tokens in the cache, except where windows have dropped tokens
        for it.

        Args:
            ids: Tokens of the prompt.
            stopped: As for `ringattn.lm.stream_generate`.

        Returns:
            Last response of mlx-lm; ``None`` without a response.
        """
        from mlx_lm.sample_utils import make_sampler

        from .. import lm
        from ..lm.sharding.forward_pass import restorable, size_of, trim_to

        options = self.options
        before = size_of(self.cache)
        response = None
        answer = ""
        for response in lm.stream_generate(
            self.model,
            self.tokenizer,
            ids,
            max_tokens=options["max_tokens"],
            sampler=make_sampler(options["temp"], options["top_p"], options["min_p"], top_k=options["top_k"]),
            prefill_step_size=options["prefill_step_size"],
            prompt_cache=self.cache,
            prompt_progress_callback=make_callback() if self.is_first else None,
            stopped=stopped,
        ):
            answer += response.text
            if self.is_first:
                click.echo(response.text, nl=False)
        if self.is_first:
            click.echo()
            self.conversation.end_turn(None if response is None else answer)
        if response is None and restorable(self.cache, before) == before:
            trim_to(self.cache, before)
        return response

    def save(self) -> None:
        """Save the cache if the user asked for it."""
        from .. import lm

        path = self.options["save_prompt_cache"]
        if path is None:
            return
        metadata = {"model": self.options["model"], **self.conversation.metadata}
        try:
            lm.save_cache(path, self.cache, metadata, model=self.model)
        except OSError as error:  # on other ranks it is an ArgumentError
            raise ArgumentError(f"--save-prompt-cache: {error}") from None


@contextmanager
def names_of_options() -> Iterator[None]:
    """Replace the names of arguments at the beginning of an error by those of the options."""
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError(re.sub("^(rank [0-9]+: )?(tensor|weights):", r"\1--\2:", str(error))) from None
