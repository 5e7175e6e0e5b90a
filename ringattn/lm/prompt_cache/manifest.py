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
from ..sharding.cache_list import LayerCache, leaves
from ..sharding.sharded_cache import ShardedKVCache
from .atomic_files import DATA
from .fingerprint import difference

VERSION = 3
TOKENS = "tokens"  # the name of the array of token ids, in every file
NAMES = ("keys", "values")  # the names of a layer's arrays, after its index
_VERSION = "ringattn prompt cache"
_CHECKSUM = "checksum"


@dataclass(frozen=True)
class File:
    """A rank's data file, in the folder of the manifest."""

    name: str
    bytes: int
    digest: str


@dataclass(frozen=True)
class Layer:
    """Keys and values of one layer in all files.

    Attributes:
        layout: The tokens in each rank's file.
        window: The layer's window in tokens, or ``None``.
        keys, values: The shapes, ``(batch, kv heads, head_dim)``.
        dtype: The dtype of both.
    """

    layout: Layout
    window: int | None
    keys: tuple[int, int, int]
    values: tuple[int, int, int]
    dtype: str

    @classmethod
    def of(cls, cache: ShardedKVCache) -> Layer:
        """Describe the cache of a layer."""
        keys, values = cache.state
        (b, heads, _, dim), (_, v_heads, _, v_dim) = keys.shape, values.shape
        return cls(cache.layout, cache.window, (b, heads, dim), (b, v_heads, v_dim), str(keys.dtype))

    def expected(self, file: int) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Shape and dtype of the keys and of the values in a file."""
        tokens = self.layout.local_length(file)
        return tuple(((b, heads, tokens, dim), self.dtype) for b, heads, dim in (self.keys, self.values))


@dataclass(frozen=True)
class Manifest:
    """The contents of a manifest.

    Attributes:
        files: The data files, in the order of the ranks that wrote them.
        layers: The layers of the model.
        model: The `fingerprint` of the model.
        metadata: The metadata that the user saved.
    """

    files: tuple[File, ...]
    layers: tuple[Layer, ...]
    model: Mapping[str, Any]
    metadata: Mapping[str, str]

    def expected(self, file: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each array in a file."""
        first = self.layers[0]
        arrays: dict[str, tuple[tuple[int, ...], str]] = {TOKENS: ((first.keys[0], first.layout.stop), str(mx.int32))}
        for i, layer in enumerate(self.layers):
            arrays |= {f"{i}.{name}": found for name, found in zip(NAMES, layer.expected(file))}
        return arrays

    def text(self) -> str:
        """The text of the file, with a checksum."""
        layouts = list(dict.fromkeys(layer.layout for layer in self.layers))
        content = {
            "files": [vars(file) for file in self.files],
            "layouts": [{"start": layout.start, "spans": layout.spans} for layout in layouts],
            "layers": [{**vars(layer), "layout": layouts.index(layer.layout)} for layer in self.layers],
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
        layers = tuple(
            Layer(**{name: _tuples(value) for name, value in layer.items()} | {"layout": layouts[layer["layout"]]})
            for layer in found["layers"]
        )
        for i, file in enumerate(files, 1):
            if Path(file.name).name != file.name or not file.name.endswith(f"-{i}of{len(files)}{DATA}"):
                raise ValueError(f"files: {file.name!r}, expected the name of the file of rank {i - 1}")
        if any(layer.layout.size != len(files) for layer in layers):
            raise ValueError("layouts: expected one rank for each file")
        return cls(files, layers, found["model"], found["metadata"])

    def check_model(self, path: Path, model: Mapping[str, Any], cache: Sequence[LayerCache]) -> None:
        """Raise CacheFileError unless the cache was made by the model with this fingerprint and this (empty) cache."""
        differs = difference(self.model, model)
        windows = [layer.window for layer in self.layers]
        expected = [c.window for c in leaves(cache)]
        if differs is None and windows != expected:
            differs = f"windows of its layers {windows}, expected {expected}"
        if differs is not None:
            raise CacheFileError(f"{path}: another model's: {differs}")


def _tuples(value: Any) -> Any:
    """Convert JSON's lists to tuples, at all depths."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _checksum(content: Mapping[str, Any]) -> str:
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
