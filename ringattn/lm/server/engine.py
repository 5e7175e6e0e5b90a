"""Generation on all ranks: requests wait in rank 0's queue, and all ranks work on one of them at a time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import Empty, Queue
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from ...errors import RingError
from ...transport.collectives import broadcast_bytes
from ..generate import checked_prefill_step_size, stream_generate
from ..limits import agree_on_longest, check_memory
from ..mlx_lm_compat import model_args
from ..rounds import SHORTEST
from ..shard import Sharded, everyone_of
from ..sharding.forward_pass import size_of
from .api.fields import RequestError
from .api.requests import Request
from .cache_pool import PromptCachePool
from .stop_words import StopWords

POLL_INTERVAL = 0.25  # s between two checks of the client and of the server's end
MOST_WAITING = 192  # requests in the queue


@dataclass
class AnswerPiece:
    """The part of an answer that one token adds.

    Attributes:
        text: The text without stop words.
        token: The token's id.
        logprob: The token's log-probability; ``None`` where it was not requested, or the token only ends the answer.
        top: The likeliest tokens at this place, with their log-probabilities.
        finish_reason: ``"stop"`` or ``"length"`` with the last token.
    """

    text: str
    token: int
    logprob: float | None
    top: list[tuple[int, float]]
    finish_reason: str | None


@dataclass
class Answer:
    """A request in the queue or in work, on rank 0 only.

    Attributes:
        request: The checked request.
        ids: The token ids of the prompt.
        cached: The number of the prompt's tokens that were in a cache of the pool.
        left: Whether the client has left.
        replies: Pieces, progress as ``(done, total)``, an exception, or ``None`` at the end.
    """

    request: Request
    ids: list[int]
    cached: int = 0
    left: bool = False
    replies: Queue = field(default_factory=Queue)


class Engine:
    """Generate the answers of a sharded model.

    Args:
        model: A sharded model.
        tokenizer: Its tokenizer.
        pool_size: The number of caches of earlier requests in the pool.
        prefill_step_size: As in `stream_generate`.
        log: Called on rank 0 with a line for each prompt of which tokens are read a second time.

    Attributes:
        stopping: Whether the server is ending; a signal's handler sets it.
        longest: Tokens of context for which the memory of every rank is enough.
    """

    def __init__(
        self,
        model: Sharded,
        tokenizer: Any,
        pool_size: int,
        prefill_step_size: int | None = None,
        log: Callable[[str], object] = lambda line: None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.ring = everyone_of(model)
        self.stopping = False
        self._pool = PromptCachePool(pool_size)
        self._prefill_step_size = prefill_step_size
        chunk = checked_prefill_step_size(prefill_step_size) or SHORTEST
        self.longest = agree_on_longest(model, self.ring, chunk)
        check_memory(model, self.ring, 1, self.longest, chunk)  # a server that refuses every prompt must not start
        self._log = log
        self._queue: Queue[Answer] = Queue()
        self._places = threading.BoundedSemaphore(MOST_WAITING)
        self._never_excluded = [*tokenizer.encode("\n"), *tokenizer.eos_token_ids]  # by XTC sampling, as in mlx-lm

    # Methods for the threads of HTTP requests, on rank 0

    @property
    def vocabulary(self) -> int:
        """The number of token ids that a request may name."""
        width = getattr(model_args(self.model), "vocab_size", None)  # type: ignore[arg-type]
        known = len(self.tokenizer.get_vocab())
        return min(known, width) if isinstance(width, int) else known

    def submit(self, request: Request, ids: list[int]) -> Answer:
        """Queue a request. The caller must call `leave` at the end.

        Raises:
            RequestError: The server is shutting down, too many requests wait, or the prompt does not fit in memory.
        """
        if len(ids) > self.longest:
            message = f"the prompt has {len(ids):,} tokens, and {self.longest:,} fit in the memory of the ranks"
            raise RequestError(400, f"{message}: shorten it", code="context_length_exceeded")
        if self.stopping:
            raise RequestError(503, "the server is shutting down", code="shutting_down")
        if not self._places.acquire(blocking=False):
            raise RequestError(503, f"{MOST_WAITING} requests wait for their turn, try again later", code="overloaded")
        answer = Answer(request, ids)
        self._queue.put(answer)
        return answer

    def leave(self, answer: Answer) -> None:
        """End an answer that is complete or whose client has left."""
        answer.left = True
        self._places.release()

    def pieces(
        self, answer: Answer, check_client: Callable[[], None], progress: Callable[[int, int], None]
    ) -> Iterator[AnswerPiece]:
        """Yield the pieces of an answer as they come. `check_client` raises if the client has left."""
        checked = time.monotonic()
        while True:
            if time.monotonic() - checked > POLL_INTERVAL:
                check_client()
                checked = time.monotonic()
            try:
                reply = answer.replies.get(timeout=POLL_INTERVAL)
            except Empty:
                if self.stopping:
                    raise RequestError(503, "the server is shutting down", code="shutting_down") from None
                continue
            if reply is None:
                return
            if isinstance(reply, Exception):
                raise reply
            if isinstance(reply, tuple):
                progress(*reply)
            else:
                yield reply

    # Methods for the main thread of every rank

    def run(self) -> None:
        """Answer requests until rank 0's `stopping` is set. Collective."""
        while (found := self._next()) is not None or self.ring.rank:
            answer, options = found or (None, {})
            job = broadcast_bytes(self.ring, None if answer is None else _pack(answer))
            if not job:
                return
            self._serve(answer, options, *_unpack(job))
        broadcast_bytes(self.ring, b"")

    def _next(self) -> tuple[Answer, dict[str, Any]] | None:
        """Wait for the next request whose client is still there; return it and rank 0's options for its answer.

        ``None`` at the end, and on ranks other than 0. A request that fails here was not yet sent to the other ranks.
        """
        while not self.stopping and self.ring.rank == 0:
            try:
                answer = self._queue.get(timeout=POLL_INTERVAL)
            except Empty:
                continue
            if answer.left:
                continue
            try:
                return answer, self._options(answer)
            except Exception as error:
                answer.replies.put(error)
        return None

    def _options(self, answer: Answer) -> dict[str, Any]:
        """The options that rank 0 alone sets: the sampling, and the end where the client has left."""
        request = answer.request
        if request.seed is not None:
            mx.random.seed(request.seed)
        sampling = dict(request.sampling)
        return {
            "sampler": make_sampler(
                sampling.pop("temperature", 0.0), xtc_special_tokens=self._never_excluded, **sampling
            ),
            "logits_processors": make_logits_processors(**request.processors),
            "stopped": lambda: self.stopping or answer.left,
            "prompt_progress_callback": lambda done, total: answer.replies.put((done, total)),
        }

    def _serve(
        self, answer: Answer | None, options: dict[str, Any], ids: list[int], max_tokens: int, stop: list[str]
    ) -> None:
        """Answer one request. An error of this request alone goes to its client, and the server continues."""
        error: Exception | None = None
        try:
            self._generate(answer, options, ids, max_tokens, StopWords(stop))
        except Exception as raised:  # on every rank, since a collective call raises it on all of them
            error = raised
        if answer is not None:
            answer.replies.put(error)
        if isinstance(error, RingError):
            raise error

    def _generate(
        self, answer: Answer | None, options: dict[str, Any], ids: list[int], max_tokens: int, stop: StopWords
    ) -> None:
        cache, reuse = self._pool.pop(ids)
        self._pool.shrink(self.longest - len(ids))
        cache = self.model.make_cache() if cache is None else cache
        if answer is not None:
            answer.cached = reuse.kept
            if reuse.line is not None:
                self._log(reuse.line)
        held = list(ids)
        for response in stream_generate(
            self.model,  # type: ignore[arg-type]
            self.tokenizer,
            ids[reuse.kept :],
            max_tokens=max_tokens,
            prefill_step_size=self._prefill_step_size,
            prompt_cache=cache,
            **options,
        ):
            held.append(response.token)
            text, stopped = stop.push(response.text)
            if response.finish_reason is not None and not stopped:
                text += stop.flush()
            if answer is not None:
                self._reply(answer, response, text, "stop" if stopped else response.finish_reason)
            if stopped:
                break
        self._pool.push(held[: size_of(cache)], cache)

    def _reply(self, answer: Answer, response: Any, text: str, finish_reason: str | None) -> None:
        """Pass a piece to its client's thread. A failure ends the answer on all ranks through ``stopped``."""
        try:
            top = answer.request.logprobs
            ends = response.finish_reason == "stop" and response.token in self.tokenizer.eos_token_ids
            logprob: float | None = None
            likeliest: list[tuple[int, float]] = []
            if top is not None and not ends:
                logprob = response.logprobs[response.token].item()
                likeliest = _likeliest(response.logprobs, top)
            answer.replies.put(AnswerPiece(text, response.token, logprob, likeliest, finish_reason))
        except Exception as error:
            answer.replies.put(error)
            answer.left = True


def _likeliest(logprobs: mx.array, count: int) -> list[tuple[int, float]]:
    """The `count` likeliest tokens and their log-probabilities, the likeliest first."""
    if count == 0:
        return []
    ids = mx.argpartition(-logprobs, kth=count - 1)[:count]
    tokens: Any = ids.tolist()
    values: Any = logprobs[ids].tolist()
    return sorted(zip(tokens, values), key=lambda one: -one[1])


def _pack(answer: Answer) -> bytes:
    """The parts of a request that every rank needs, as bytes."""
    head = json.dumps([answer.request.max_tokens, answer.request.stop]).encode()
    return head + b"\n" + np.array(answer.ids, np.int32).tobytes()


def _unpack(job: bytes) -> tuple[list[int], int, list[str]]:
    """The prompt's ids, the largest number of tokens and the stop words from the bytes of `_pack`."""
    head, _, ids = job.partition(b"\n")
    max_tokens, stop = json.loads(head)
    return np.frombuffer(ids, np.int32).tolist(), max_tokens, stop
