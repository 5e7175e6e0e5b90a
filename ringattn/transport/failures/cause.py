"""The cause of a failure: why a ring broke or a rank ended, as one record.

Heartbeats, the status file and the launcher pass it on. Every message about a failure is made from it, so that all say
the same.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...errors import RingError

_LONGEST_DETAIL = 4000  # characters that travel; short messages need no answer from the receiver
_SENTENCES = {
    "failed": "{who} failed {where}: {detail}",
    "silent": "{who} gave no sign of life for {detail}; it was last heard of {where}{note}",
    "disconnected": "{who} died: its connection was closed; it was last heard of {where}",
    "left": "{who} left the ring while {detail} waited for it {where}",
    "stuck": "{detail} {who} are stuck {where}{note}",
    "ended": "{who} {detail} {where}",
    "unwatched": "{who}: its wrapper was killed",
    "lost": "{who}: the connection to it was lost",
    "other": "{detail}",
}


@dataclass(frozen=True)
class Cause:
    """The reason why a ring broke or a rank ended.

    Attributes:
        kind: A key of the sentences above.
        rank: The rank that caused it, or ``None`` where that is not known.
        host: Its host name, or ``None``.
        call: The call it was in, ``"after NAME"`` between calls and empty before the first; ``None``: not known.
        hop: The hop it was in, or ``None``.
        detail: The part of the sentence that the other fields do not say.
        note: Text to add to the sentence.
        exit_code: The exit code of the rank, negative for a signal. All ranks end with it, because the launcher may see
            any of them end first.
    """

    kind: str
    rank: int | None
    host: str | None
    call: str | None = None
    hop: int | None = None
    detail: str = ""
    note: str = ""
    exit_code: int = 1

    def __str__(self) -> str:
        who = name_rank(self.rank, self.host)
        sentence = _SENTENCES[self.kind].format(who=who, where=self._where, detail=self.detail, note=self.note)
        return sentence.rstrip()

    @property
    def _where(self) -> str:
        if not self.call:
            return "" if self.call is None else "before its first call"
        if self.call.startswith("after "):
            return self.call
        return f"in {self.call}" if self.hop is None else f"in {self.call}, hop {self.hop}"

    @property
    def error(self) -> RingError:
        """An exception with this cause."""
        return RingError(str(self), rank=self.rank, host=self.host, hop=self.hop)

    def encode(self) -> bytes:
        """Encode as bytes for another rank."""
        return json.dumps({**asdict(self), "detail": self.detail[:_LONGEST_DETAIL]}).encode()

    @classmethod
    def decode(cls, encoded: bytes) -> Cause:
        """Undo `encode`."""
        return cls(**json.loads(encoded))

    @classmethod
    def of_exception(cls, error: BaseException, rank: int, host: str, call: str, hop: int) -> Cause:
        """The cause for a ring that `error` breaks, raised on a rank that is in a call."""
        return cls("failed", rank, host, call, hop, f"{type(error).__name__}: {error}", exit_code=exit_code_of(error))

    @classmethod
    def of_end(cls, rank: str, host: str, code: int, known: Mapping[str, Any]) -> Cause:
        """The cause for a process whose wrapper saw it end; `known` is the content of its status file."""
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        call, hop = known.get("call"), known.get("hop")
        return cls("ended", known.get("rank", int(rank)), host, call, hop, how, exit_code=code)


def name_rank(rank: int | None, host: str | None) -> str:
    """Name a rank and its host in a message."""
    return f"rank {rank} ({host})"


def exit_code_of(error: BaseException) -> int:
    """The exit code of a Python process after `error`; 1 where that is 0, because the other ranks cannot go on."""
    code = error.code if isinstance(error, SystemExit) else 1
    return (code & 255 or 1) if isinstance(code, int) else 1
