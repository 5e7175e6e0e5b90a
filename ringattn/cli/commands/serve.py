"""``ringattn serve``."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import click

from ...errors import ArgumentError
from .. import INTERRUPTED
from ..host_options import with_options
from ..lm_command import run
from ..lm_options import OPTIONS, JsonObject
from ..session import Session

DEFAULTS = ("max_tokens", "top_p", "top_k", "min_p")  # and --temp: a request may change them

SERVING = (
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="Port; 0: a free one."),
    click.option(
        "--chat-template-args",
        type=JsonObject(),
        default="{}",
        metavar="JSON",
        help="Further arguments of the model's chat template, such as '{\"enable_thinking\": false}'.",
    ),
    click.option(
        "--allowed-origins",
        default="*",
        show_default=True,
        metavar="ORIGIN,...",
        help="Web pages whose scripts may send requests.",
    ),
    click.option(
        "--prompt-cache-size",
        default=2,
        show_default=True,
        type=click.IntRange(min=0),
        help="Contexts of earlier requests that are kept for later requests which continue them.",
    ),
    click.option(
        "--max-body",
        default=4,
        show_default=True,
        type=click.IntRange(1, 1024),
        metavar="MB",
        help="Largest size of a request.",
    ),
)


@click.command(context_settings={"default_map": {"max_tokens": 512}})
@with_options(*OPTIONS, *SERVING)
def serve(**options: Any) -> None:
    """Answer HTTP requests with an mlx-lm model whose context is spread over the ranks.

    Rank 0 has the endpoints of mlx_lm.server: /v1/chat/completions, /v1/completions (both with streaming), /v1/models
    and /health. Requests are answered one after the other. A request may change the sampling options. There is no
    password: everybody who can reach the address can send requests.

        ringattn serve -n 2 --model smollm2 --dtype float32
    """
    run(_serve, "serve", options, _check_address)


def _check_address(options: dict[str, Any]) -> None:
    from ...lm.server import check_address

    _listen(check_address, options["host"], options["port"])


def _serve(session: Session) -> int:
    """Listen on rank 0, and answer on all ranks until a signal arrives. Return the exit code."""
    from ...lm.server import Engine, Settings, open_server
    from ...transport.consensus import raise_on_all_ranks

    options = session.options
    settings = Settings(
        model=options["model"],
        defaults={"temperature": options["temp"], **{name: options[name] for name in DEFAULTS}},
        template=options["chat_template_args"],
        origins=tuple(options["allowed_origins"].split(",")),
        max_body=options["max_body"] << 20,
    )
    engine = Engine(
        session.model,
        session.tokenizer,
        options["prompt_cache_size"],
        options["prefill_step_size"],
        log=partial(click.echo, err=True),
    )
    signals: list[int] = []

    def stop(number: int, frame: object) -> None:
        signals.append(number)
        engine.stopping = True  # only that of rank 0 has an effect

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if session.is_first:
        with raise_on_all_ranks(session.ring, "broadcast"):
            server = _listen(partial(open_server, engine, settings), options["host"], options["port"])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host, port = server.server_address[:2]
        shown = f"[{host!s}]" if ":" in str(host) else host
        many = "1 rank" if session.ring.size == 1 else f"{session.ring.size} ranks"
        click.echo(f"Serving {options['model']} on http://{shown}:{port}/v1 ({many}).", err=True)
    engine.run()
    return INTERRUPTED if signal.SIGINT in signals else 0


def _listen(open_at: Callable[[str, int], Any], host: str, port: int) -> Any:
    """Call `open_at` with an address. Raise ArgumentError if nothing can listen there."""
    try:
        return open_at(host, port)
    except OSError as error:
        raise ArgumentError(f"--host, --port: cannot listen on {host}:{port} ({error.strerror or error})") from None
