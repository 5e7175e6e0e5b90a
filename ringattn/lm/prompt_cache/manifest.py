"""The manifest of a saved cache: the files that belong to it, their contents, and the model that made it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...errors import CacheFileError
from ...layout import Layout
from ..sharding.forward_pass import ShardedCache
from .atomic_files import DATA
from .fingerprint import difference
from .layers import Expected, SavedKeys, SavedLayer, SavedStates

VERSION = 4
TOKENS = "tokens"  # the name of the array of token ids, in every file
_VERSION = "ringattn prompt cache"
_CHECKSUM = "checksum"


@dataclass(frozen=True)
class File:
    """A rank's data file, in the folder of the manifest."""

    name: str
    bytes: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """The contents of a manifest.

    Attributes:
        files: The data files, in the order of the ranks that wrote them.
        tokens: The shape of the token ids, ``(batch, tokens)``.
        layers: The caches of the model's layers, in order; a layer may have several.
        model: The `fingerprint` of the model.
        metadata: The metadata that the user saved.
    """

    files: tuple[File, ...]
    tokens: tuple[int, int]
    layers: tuple[SavedLayer, ...]
    model: Mapping[str, Any]
    metadata: Mapping[str, str]

    def expected(self, file: int) -> Expected:
        """Shape and dtype of each array in a file."""
        arrays: Expected = {TOKENS: (self.tokens, str(mx.int32))}
        for i, layer in enumerate(self.layers):
            arrays |= {f"{i}.{name}": found for name, found in layer.expected(file).items()}
        return arrays

    def text(self) -> str:
        """The text of the file, with a checksum."""
        layouts = list(dict.fromkeys(layer.layout for layer in self.layers if isinstance(layer, SavedKeys)))
        content = {
            "files": [vars(file) for file in self.files],
            "tokens": self.tokens,
            "layouts": [{"start": layout.start, "spans": layout.spans} for layout in layouts],
            "layers": [
                {**vars(layer), "layout": layouts.index(layer.layout)} if isinstance(layer, SavedKeys) else vars(layer)
                for layer in self.layers
            ],
            "model": dict(self.model),
            "metadata": dict(self.metadata),
        }
        return json.dumps({_VERSION: VERSION, _CHECKSUM: _checksum(content), **content})

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a manifest. Raise CacheFileError, which names the file, for any error in it."""
        try:
            found = json.loads(path.read_bytes())
            version, checksum = found.pop(_VERSION), found.pop(_CHECKSUM, None)
        except OSError as error:
            raise CacheFileError(f"{path}: {error.strerror}") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise CacheFileError(f"{path}: not the manifest of a prompt cache, or torn") from None
        if version != VERSION:
            raise CacheFileError(f"{path}: of version {version!r}, expected {VERSION}")
        if checksum != _checksum(found):
            raise CacheFileError(f"{path}: torn or changed: a checksum of {_checksum(found)}, expected {checksum!r}")
        try:
            return cls._of(found)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CacheFileError(f"{path}: not what this version writes ({type(error).__name__}: {error})") from None

    @classmethod
    def _of(cls, found: Mapping[str, Any]) -> Manifest:
        """Build a manifest from the JSON of its file."""
        files = tuple(File(**file) for file in found["files"])
        layouts = [Layout(_tuples(one["spans"]), one["start"]) for one in found["layouts"]]
        layers = tuple(_layer(layer, layouts) for layer in found["layers"])
        for i, file in enumerate(files, 1):
            if Path(file.name).name != file.name or not file.name.endswith(f"-{i}of{len(files)}{DATA}"):
                raise ValueError(f"files: {file.name!r}, expected the name of the file of rank {i - 1}")
        if any(layout.size != len(files) for layout in layouts):
            raise ValueError("layouts: expected one rank for each file")
        tokens = _tuples(found["tokens"])
        ends = [layer.layout.stop if isinstance(layer, SavedKeys) else layer.sizes[-1] for layer in layers]
        if any(end != tokens[1] for end in ends):
            raise ValueError(f"layers: the first {ends} tokens, expected {tokens[1]}")
        return cls(files, tokens, layers, found["model"], found["metadata"])

    def check_model(self, path: Path, model: Mapping[str, Any], caches: Sequence[ShardedCache]) -> None:
        """Raise CacheFileError unless the model with this fingerprint and these (empty) caches made the saved cache."""
        differs = difference(self.model, model)
        forms = [layer.form for layer in self.layers]
        expected = [cache.form for cache in caches]
        if differs is None and len(forms) != len(expected):
            differs = f"{len(forms)} caches, expected {len(expected)}"
        pairs = enumerate(zip(forms, expected))
        if differs is None and forms != expected:
            differs = next(f"cache {i} with {one}, expected {other}" for i, (one, other) in pairs if one != other)
        if differs is not None:
            raise CacheFileError(f"{path}: another model's: {differs}")


def _layer(found: Mapping[str, Any], layouts: Sequence[Layout]) -> SavedLayer:
    """Build the description of a layer from its JSON."""
    values = {name: _tuples(value) for name, value in found.items()}
    return SavedKeys(**{**values, "layout": layouts[values["layout"]]}) if "layout" in values else SavedStates(**values)


def _tuples(value: Any) -> Any:
    """Convert JSON's lists to tuples, at all depths."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _checksum(content: Mapping[str, Any]) -> str:
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
