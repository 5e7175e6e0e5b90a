"""Generation on all ranks: requests wait in rank 0's queue, and every rank works on one of them at a time."""

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
from ..generate import stream_generate
from ..shard import Sharded
from .api.fields import RequestError
from .api.requests import Request
from .cache_pool import KeptCaches
from .stop_words import StopWords

POLL_INTERVAL = 0.25  # s between two looks whether a client, or the server, is still there
MOST_WAITING = 192  # requests that wait for their turn


@dataclass
class Piece:
    """What one token adds to an answer.

    Attributes:
        text: Without stop words.
        token: Its id.
        logprob: Its log-probability; ``None`` where that is not wanted, or the token only ends the answer.
        top: The likeliest tokens in its place, with their log-probabilities.
        finish_reason: ``"stop"`` or ``"length"`` with the last token.
    """

    text: str
    token: int
    logprob: float | None
    top: list[tuple[int, float]]
    finish_reason: str | None


@dataclass
class Answer:
    """A request that waits for its turn or has it; rank 0 alone knows of it.

    Attributes:
        request: Checked.
        ids: The prompt.
        cached: How many tokens of the prompt were in a kept cache.
        left: Whether nobody waits for the answer any more.
        replies: Pieces, progress as ``(done, total)``, an exception, or ``None`` at the end.
    """

    request: Request
    ids: list[int]
    cached: int = 0
    left: bool = False
    replies: Queue = field(default_factory=Queue)


class Engine:
    """Answers of a sharded model.

    Args:
        model: Sharded.
        tokenizer: Its tokenizer.
        kept: How many caches of earlier requests are kept.
        chunk: As in `stream_generate`.

    Attributes:
        stopping: Whether the server is to end; set by a signal's handler.
    """

    def __init__(self, model: Sharded, tokenizer: Any, kept: int, chunk: int | None = None):
        self.model = model
        self.tokenizer = tokenizer
        self.ring = model.ring
        self.stopping = False
        self._kept = KeptCaches(kept)
        self._chunk = chunk
        self._queue: Queue[Answer] = Queue()
        self._places = threading.BoundedSemaphore(MOST_WAITING)
        self._never_excluded = [*tokenizer.encode("\n"), *tokenizer.eos_token_ids]  # by XTC sampling, as mlx-lm's

    # What the threads of HTTP requests call, on rank 0

    @property
    def vocabulary(self) -> int:
        """How many tokens can be named in a request."""
        width = getattr(getattr(self.model, "args", None), "vocab_size", None)
        known = len(self.tokenizer.get_vocab())
        return min(known, width) if isinstance(width, int) else known

    def submit(self, request: Request, ids: list[int]) -> Answer:
        """Queue a request. `leave` must be called in the end.

        Raises:
            RequestError: The server is shutting down, or too many requests wait.
        """
        if self.stopping:
            raise RequestError(503, "the server is shutting down", code="shutting_down")
        if not self._places.acquire(blocking=False):
            raise RequestError(503, f"{MOST_WAITING} requests wait for their turn, try again later", code="overloaded")
        answer = Answer(request, ids)
        self._queue.put(answer)
        return answer

    def leave(self, answer: Answer) -> None:
        """End an answer that nobody waits for any more, or that has come to its end."""
        answer.left = True
        self._places.release()

    def pieces(
        self, answer: Answer, check_client: Callable[[], None], progress: Callable[[int, int], None]
    ) -> Iterator[Piece]:
        """The pieces of an answer as they come. `check_client` raises if the client has left."""
        looked = time.monotonic()
        while True:
            if time.monotonic() - looked > POLL_INTERVAL:
                check_client()
                looked = time.monotonic()
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

    # What the main thread of every rank does

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
        """The next request whose client is still there, and what rank 0 needs to generate its answer.

        ``None`` at the end, and on other ranks than 0. What fails here fails before any other rank hears of it.
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
        """What rank 0 decides: the sampling, and the end where the client has left."""
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
        """Answer one request. An error of it alone goes to its client, and the next one has its turn."""
        error: Exception | None = None
        try:
            self._generate(answer, options, ids, max_tokens, StopWords(stop))
        except Exception as found:  # on every rank: a collective call tells all of them
            error = found
        if answer is not None:
            answer.replies.put(error)
        if isinstance(error, RingError):
            raise error

    def _generate(
        self, answer: Answer | None, options: dict[str, Any], ids: list[int], max_tokens: int, stop: StopWords
    ) -> None:
        cache, known = self._kept.take(ids)
        cache = self.model.make_cache() if cache is None else cache
        if answer is not None:
            answer.cached = known
        held = list(ids)
        for response in stream_generate(
            self.model,  # type: ignore[arg-type]
            self.tokenizer,
            ids[known:],
            max_tokens=max_tokens,
            chunk=self._chunk,
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
        self._kept.give(held[: cache[0].size()], cache)

    def _reply(self, answer: Answer, response: Any, text: str, finish_reason: str | None) -> None:
        """Hand a piece to its client's thread. A failure ends the answer on all ranks, by way of ``stopped``."""
        try:
            top = answer.request.logprobs
            ends = response.finish_reason == "stop" and response.token in self.tokenizer.eos_token_ids
            logprob, likeliest = None, []
            if top is not None and not ends:
                logprob = response.logprobs[response.token].item()
                likeliest = _likeliest(response.logprobs, top)
            answer.replies.put(Piece(text, response.token, logprob, likeliest, finish_reason))
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
    """What every rank has to know of a request."""
    head = json.dumps([answer.request.max_tokens, answer.request.stop]).encode()
    return head + b"\n" + np.array(answer.ids, np.int32).tobytes()


def _unpack(job: bytes) -> tuple[list[int], int, list[str]]:
    head, _, ids = job.partition(b"\n")
    max_tokens, stop = json.loads(head)
    return np.frombuffer(ids, np.int32).tolist(), max_tokens, stop
