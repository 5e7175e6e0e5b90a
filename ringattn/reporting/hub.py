"""Why a model that is no folder was not found on Hugging Face, with the remedy."""

from __future__ import annotations

_UNREACHED = "Hugging Face cannot be reached: check the network, unset HF_HUB_OFFLINE, or give a model's folder"
# By the names of huggingface_hub's errors, the most special first: importing that package takes a second.
_REASONS = {
    "GatedRepoError": "Hugging Face gives it to who accepts its terms: do so on its page, then hf auth login",
    "RepositoryNotFoundError": "Hugging Face has no such repository: check the name, or hf auth login if it is private",
    "LocalEntryNotFoundError": _UNREACHED,
    "OfflineModeIsEnabled": _UNREACHED,
}


def why_not_found(error: Exception, message: str) -> str:
    """Tell why `error` came instead of a model: by its `message` where the reason is none of those known here."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    known = (reason for name, reason in _REASONS.items() if name in kinds)
    return f"no such folder, and {next(known, f'Hugging Face: {message}')}"
