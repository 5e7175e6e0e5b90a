"""Prompt caches on disk: one safetensors file a rank, and a manifest that says which belong together.

A cache is saved under a new generation of names; only when all of it is on disk does the manifest, replaced in one
step, point to it, and only then are the files of the generation before removed.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..comm.agreement import agree, heard
from ..comm.collectives import broadcast_bytes
from ..errors import ArgumentError
from ..layout import Layout
from ..spans import intersection, positions
from .cache import ShardedKVCache, pick
from .errors import CacheFileError
from .model import Sharded

SAVE, LOAD = "save_cache", "load_cache"
VERSION = 1
PIECE = 1 << 24  # bytes that are read at once


def save_cache(path: str | Path, cache: Sequence[ShardedKVCache], metadata: Mapping[str, str] | None = None) -> None:
    """Write a sharded cache to disk. Collective; what was saved at `path` before stays until the new one is complete.

    Args:
        path: The manifest, a JSON file; the ranks' files go beside it. The same on every rank; on machines that share
            no disk each writes its own part.
        cache: Of all layers, not empty.
        metadata: To be given back by `load_cache`.

    Raises:
        ArgumentError: The cache is empty.
        OSError: A file could not be written, on this or another rank (there it is an ArgumentError).
    """
    path = Path(path)
    if not cache or cache[0].keys is None:
        raise ArgumentError("cache: empty, expected at least one token in it")
    ring = cache[0].ring
    generation = _generation(ring)
    own = path.with_name(f"{path.name}.{generation}-{ring.rank + 1}of{ring.size}.safetensors")
    with heard(ring, SAVE):
        arrays = {f"{i}.{name}": x for i, c in enumerate(cache) for name, x in zip(("keys", "values"), c.state)}
        mx.save_safetensors(str(own), arrays)
        _sync(own)
        told = json.dumps({"name": own.name, **_described(own)}).encode()
    replies = agree(ring, SAVE, (("path", path.name),), payload=[memoryview(told)])
    layouts = list(dict.fromkeys(c.layout for c in cache))
    manifest = {
        "ringattn prompt cache": VERSION,
        "files": [json.loads(bytes(reply)) for reply in replies],
        "layouts": [{"start": layout.start, "spans": layout.spans} for layout in layouts],
        "layers": [{"layout": layouts.index(c.layout), "window": c.window} for c in cache],
        "metadata": dict(metadata or {}),
    }
    with heard(ring, SAVE):
        old = list[Path]()
        with suppress(CacheFileError):  # nothing was there
            old = [path.with_name(file["name"]) for file in _Manifest.read(path).files]
        _replace(path, json.dumps(manifest), f"{generation}-{ring.rank}")
    agree(ring, SAVE, (("path", path.name),))  # every rank has the new manifest
    for file in old:
        if generation not in file.name:  # another rank on this disk may have been faster
            file.unlink(missing_ok=True)


def load_cache(path: str | Path, model: nn.Module) -> tuple[list[ShardedKVCache], dict[str, str]]:
    """Read a cache that `save_cache` wrote, on as many ranks or on another number. Collective.

    Args:
        path: The manifest. A rank needs its own file; all files where the number of ranks is another.
        model: The sharded model that the cache was made with.

    Returns:
        The cache of each layer, and the metadata.

    Raises:
        CacheFileError: A file is missing, torn, or does not belong to the manifest or the model. It names the file and
            the reason; where the trouble is another rank's it is an `ArgumentError`.
    """
    if not isinstance(model, Sharded):
        raise ArgumentError("model: not sharded, expected one that went through ringattn.lm.shard")
    ring, path = model.ring, Path(path)
    with heard(ring, LOAD):
        manifest = _Manifest.read(path)
        cache = model.make_cache()
        manifest.check_model(cache)
        arrays = manifest.arrays(ring)
        for i, c in enumerate(cache):
            c.restore(*manifest.part(i, ring, arrays))
    agree(ring, LOAD, (("path", f"{path.name} ({manifest.digest})"),))
    return cache, manifest.metadata


@dataclass(frozen=True)
class _Manifest:
    """What a manifest says."""

    path: Path
    digest: str
    files: list[dict[str, Any]]
    layouts: list[Layout]
    layers: list[dict[str, Any]]
    metadata: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> _Manifest:
        try:
            text = path.read_bytes()
            found = json.loads(text)
            if found["ringattn prompt cache"] != VERSION:
                raise CacheFileError(f"{path}: of version {found['ringattn prompt cache']}, expected {VERSION}")
            layouts = [
                Layout(tuple(tuple(map(tuple, spans)) for spans in one["spans"]), one["start"])
                for one in found["layouts"]
            ]
            digest = blake2b(text, digest_size=8).hexdigest()
            return cls(path, digest, found["files"], layouts, found["layers"], found["metadata"])
        except OSError as error:
            raise CacheFileError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, CacheFileError):
                raise
            raise CacheFileError(f"{path}: not the manifest of a prompt cache, or torn") from None

    def check_model(self, cache: Sequence[ShardedKVCache]) -> None:
        found, expected = [layer["window"] for layer in self.layers], [c.window for c in cache]
        if found != expected:
            raise CacheFileError(f"{self.path}: another model's: its layers are not those of this one")

    def arrays(self, ring: Any) -> list[dict[str, mx.array] | None]:
        """The arrays of each file that this rank needs."""
        wanted = [ring.rank] if len(self.files) == ring.size else range(len(self.files))
        return [self._checked(i) if i in wanted else None for i in range(len(self.files))]

    def _checked(self, i: int) -> dict[str, mx.array]:
        told, file = self.files[i], self.path.with_name(self.files[i]["name"])
        try:
            found = _described(file)
        except OSError as error:
            raise CacheFileError(f"{file}: {error.strerror}") from None
        for what, name in (("bytes", "bytes"), ("digest", "a digest of")):
            if found[what] != told[what]:
                raise CacheFileError(f"{file}: torn or changed: {name} {found[what]}, expected {told[what]}")
        return dict(mx.load(str(file)))  # type: ignore[arg-type]

    def part(
        self, layer: int, ring: Any, arrays: Sequence[dict[str, mx.array] | None]
    ) -> tuple[Layout, mx.array, mx.array]:
        """The layout of a layer over `ring`, and this rank's keys and values."""
        held = self.layouts[self.layers[layer]["layout"]]
        if held.size == ring.size:
            own: Any = arrays[ring.rank]
            return held, own[f"{layer}.keys"], own[f"{layer}.values"]
        layout = Layout.contiguous(held.length, ring.size, start=held.start)
        want = layout.spans[ring.rank]
        parts = [intersection(want, spans) for spans in held.spans]
        order = mx.array(np.argsort(np.concatenate([positions(part) for part in parts])))
        keys, values = (
            mx.concatenate(
                [pick(file[f"{layer}.{name}"], *at) for file, *at in zip(arrays, held.spans, parts) if file], 2
            )[:, :, order]
            for name in ("keys", "values")
        )
        return layout, keys, values


def _generation(ring: Any) -> str:
    """A name that no earlier cache has, the same on every rank."""
    return broadcast_bytes(ring, None if ring.rank else secrets.token_bytes(6)).hex()


def _described(file: Path) -> dict[str, Any]:
    """Its size and digest."""
    digest = blake2b(digest_size=16)
    with file.open("rb") as opened:
        while piece := opened.read(PIECE):
            digest.update(piece)
    return {"bytes": file.stat().st_size, "digest": digest.hexdigest()}


def _sync(file: Path) -> None:
    """See to it that it is on the disk."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _replace(path: Path, text: str, suffix: str) -> None:
    """Write the file in one step: it is the old one or the new one, never a part of it."""
    new = path.with_name(f"{path.name}.{suffix}.new")
    new.write_text(text)
    _sync(new)
    os.replace(new, path)
