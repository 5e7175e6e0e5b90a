"""The server's settings, and the object that all its connections share."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..mlx_lm_compat import get_system_fingerprint
from .api.answers import AnswerParser
from .api.prompts import PromptBuilder
from .api.requests import DEFAULT_MODEL, Request, Served
from .api.responses import Responses
from .engine import Engine

MB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """Settings from the command line.

    Attributes:
        model: The name of the model.
        defaults: ``max_tokens`` and sampling options; a request may change them.
        template: Arguments of the chat template; a request may change them.
        origins: Web pages whose scripts may send requests; ``"*"``: all.
        max_body: The largest size of a request in bytes.
    """

    model: str
    defaults: Mapping[str, Any]
    template: Mapping[str, Any] = field(default_factory=dict)
    origins: tuple[str, ...] = ("*",)
    max_body: int = 4 * MB


class Service:
    """The engine, the settings and the prompt builder that all connections share."""

    def __init__(self, engine: Engine, settings: Settings):
        name = settings.model
        names = (name, Path(name).name, str(Path(name).resolve()), DEFAULT_MODEL)
        self.engine = engine
        self.settings = settings
        self.served = Served(names, engine.vocabulary, settings.defaults)
        self.prompts = PromptBuilder(engine.tokenizer, settings.template, 2 * settings.max_body)
        self.fingerprint = get_system_fingerprint()
        self.created = int(time.time())
        self.reading = threading.Lock()  # one body at a time: its objects take many times its bytes

    def responses(self, request: Request) -> Responses:
        """A builder of the responses to a request."""
        return Responses(
            chat=request.kind == "chat",
            stream=request.stream,
            include_usage=request.include_usage,
            model=self.settings.model,
            fingerprint=self.fingerprint,
            tokenizer=self.engine.tokenizer,
        )

    def parser(self, request: Request, state: str) -> AnswerParser:
        """A parser for the answer to a request; a text has no markers."""
        tokenizer = self.engine.tokenizer if request.kind == "chat" else None
        return AnswerParser(tokenizer, state, request.tools, request.stream)
