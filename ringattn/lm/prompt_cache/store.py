"""Saving and loading prompt caches: one safetensors file a rank, and a manifest that names the files.

A cache is saved under new file names. When all files are on disk, the manifest is replaced in one step, so that it
names them. After that the files of earlier saves are removed.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...core.intervals import intersection, positions
from ...errors import ArgumentError, CacheFileError
from ...layout import Layout
from ...transport.collectives import broadcast_bytes
from ...transport.consensus import agree, raise_on_all_ranks
from ...transport.interface import Transport
from ..shard import everyone_of, sharded
from ..sharding.cache_kinds import check_caches
from ..sharding.forward_pass import flat
from ..sharding.history import TokenHistory
from ..sharding.sharded_cache import pick
from .atomic_files import Part, sweep
from .fingerprint import shared_fingerprint
from .layers import NAMES, SavedKeys, arrays_of, describe
from .manifest import TOKENS, File, Manifest

SAVE = "save_cache"
LOAD = "load_cache"
PIECE = 1 << 24  # bytes in one read


def save_cache(
    path: str | Path, cache: Sequence[Any], metadata: Mapping[str, str] | None = None, *, model: nn.Module
) -> None:
    """Write a sharded cache to disk. Collective. An earlier cache at `path` stays until the new one is complete.

    On a grid each column writes a manifest: the first one at `path`, the others beside it.

    Args:
        path: The manifest, a JSON file; the ranks' files go beside it. The same on every rank; on machines that share
            no disk each writes its own part.
        cache: The cache of each layer, not empty. The states of recurrent layers are in each rank's file.
        metadata: Texts that `load_cache` returns again; those of rank 0 are saved.
        model: The sharded model that made the cache: `load_cache` refuses any other.

    Raises:
        ArgumentError: The cache is empty or another model's, or the model is not sharded.
        OSError: This rank could not write a file; on the other ranks it is an ArgumentError. No file of the attempt
            stays, unless it failed while manifests were replaced.
    """
    path = Path(path)
    ring, everyone = _rings_of(model)
    with raise_on_all_ranks(everyone, SAVE):
        leaves = check_caches("cache", cache, model.make_cache())
        if not leaves[0].size():
            raise ArgumentError("cache: empty, expected at least one token in it")
    made_by = shared_fingerprint(everyone, model)
    name = path.name
    path = _path_of_part(path, model)
    with Part(path, f"{_generation(everyone)}-{ring.rank + 1}of{ring.size}") as part:
        with raise_on_all_ranks(everyone, SAVE):
            arrays = {f"{i}.{name}": x for i, leaf in enumerate(leaves) for name, x in arrays_of(leaf).items()}
            tokens = leaves[0].tokens
            part.write({TOKENS: mx.array(tokens), **arrays})
            own = {"file": vars(_described(part.data)), "metadata": dict(metadata or {})}
            payload = memoryview(json.dumps(own).encode())
            layers = tuple(map(describe, leaves))
        replies = [json.loads(bytes(reply)) for reply in agree(everyone, SAVE, (("path", name),), payload=[payload])]
        part_of_weights, parts = model.part
        files = tuple(File(**reply["file"]) for reply in replies[part_of_weights::parts])
        with raise_on_all_ranks(everyone, SAVE):
            part.write_manifest(Manifest(files, tokens.shape, layers, made_by, replies[0]["metadata"]).text())
        agree(everyone, SAVE, (("path", name),))  # every rank's file is on disk
        part.complete = True
        with raise_on_all_ranks(everyone, SAVE):
            part.publish()
        agree(everyone, SAVE, (("path", name),))  # every rank has the new manifest
    with suppress(CacheFileError, OSError):  # the cache is saved already
        sweep(path, lambda: {file.name for file in Manifest.read(path).files})


def load_cache(path: str | Path, model: nn.Module) -> tuple[list[Any], dict[str, str]]:
    """Read a cache that `save_cache` wrote on the same or another number of ranks. Collective.

    Args:
        path: The manifest. A rank needs its own file, or all files where the number of ranks is another.
        model: The sharded model that made the cache: the same class and configuration, with the same weights of the
            same dtypes, from any source.

    Returns:
        The cache of each layer, and the metadata.

    Raises:
        CacheFileError: A file is missing, torn, or does not belong to the manifest or the model. The message names the
            file and the reason. The error of another rank is an `ArgumentError`.
    """
    ring, everyone = _rings_of(model)
    name = Path(path).name
    path = _path_of_part(Path(path), model)
    expected = shared_fingerprint(everyone, model)
    with raise_on_all_ranks(everyone, LOAD):
        manifest = Manifest.read(path)
        cache = model.make_cache()
        leaves = flat(cache)
        manifest.check_model(path, expected, leaves)
        arrays = _arrays(path, manifest, ring)
        history = TokenHistory(next(file[TOKENS] for file in arrays if file))
        for i, leaf in enumerate(leaves):
            leaf.restore(*_part(i, manifest, ring, arrays), history)
        digest = blake2b(manifest.text().encode(), digest_size=8).hexdigest()
        saved = manifest.files[0].name.rpartition("-")[0].rpartition(".")[2]  # the same in all columns' manifests
    own = (("path", f"{name} ({digest})"),)
    agree(everyone, LOAD, (*(own if ring is everyone else ()), ("the columns of the cache", saved)))
    if ring is not everyone:  # each column of a grid has a manifest of its own
        with raise_on_all_ranks(everyone, LOAD):
            agree(ring, LOAD, own)
        agree(everyone, LOAD)
    return cache, dict(manifest.metadata)


def _rings_of(model: nn.Module) -> tuple[Transport, Transport]:
    """The ring of a sharded model's context, and that of all ranks."""
    known = sharded(model)
    return known.ring, everyone_of(known)


def _path_of_part(path: Path, model: Any) -> Path:
    """The manifest of the ranks that hold the same part of the weights as this one."""
    part, parts = model.part
    return path if part == 0 else path.with_name(f"{path.stem}.heads-{part + 1}of{parts}{path.suffix}")


def _arrays(path: Path, manifest: Manifest, ring: Transport) -> list[dict[str, mx.array] | None]:
    """Read the arrays of each file that this rank needs; ``None`` for the others."""
    count = len(manifest.files)
    wanted = [ring.rank] if count == ring.size else range(count)
    return [_checked(path, manifest, i) if i in wanted else None for i in range(count)]


def _checked(path: Path, manifest: Manifest, i: int) -> dict[str, mx.array]:
    """Read the arrays of a file and check them against the manifest."""
    recorded = manifest.files[i]
    file = path.with_name(recorded.name)
    try:
        found = _described(file)
        arrays: dict[str, mx.array] = dict(mx.load(str(file))) if found == recorded else {}  # type: ignore[arg-type]
    except OSError as error:
        raise CacheFileError(f"{file}: {error.strerror}") from None
    except RuntimeError as error:
        raise CacheFileError(f"{file}: cannot be read: {error}") from None
    for name in ("bytes", "digest"):
        if getattr(found, name) != getattr(recorded, name):
            what = f"{name} {getattr(found, name)}, expected {getattr(recorded, name)}"
            raise CacheFileError(f"{file}: torn or changed: {what}")
    for name, expected in manifest.expected(i).items():
        x = arrays.get(name)
        if x is None or (x.shape, str(x.dtype)) != expected:
            shown = None if x is None else (x.shape, str(x.dtype))
            raise CacheFileError(f"{file}: array {name}: {shown}, expected {expected}")
    return arrays


def _part(
    layer: int, manifest: Manifest, ring: Transport, arrays: Sequence[dict[str, mx.array] | None]
) -> tuple[Any, ...]:
    """The layout of a layer over `ring` with this rank's keys and values; or the layer's states."""
    found = manifest.layers[layer]
    if not isinstance(found, SavedKeys):
        own = next(file for file in arrays if file)
        return (found.states({name.removeprefix(f"{layer}."): x for name, x in own.items()}),)
    held = found.layout
    if held.size == ring.size:
        own = arrays[ring.rank] or {}
        return held, own[f"{layer}.keys"], own[f"{layer}.values"]
    layout = Layout.contiguous(held.length, ring.size, start=held.start)
    want = layout.spans[ring.rank]
    parts = [intersection(want, spans) for spans in held.spans]
    order = mx.array(np.argsort(np.concatenate([positions(part) for part in parts])))
    keys, values = (
        mx.concatenate([pick(file[f"{layer}.{name}"], *at) for file, *at in zip(arrays, held.spans, parts) if file], 2)[
            :, :, order
        ]
        for name in NAMES
    )
    return layout, keys, values


def _generation(ring: Transport) -> str:
    """Draw a new random name, the same on every rank."""
    return broadcast_bytes(ring, None if ring.rank else secrets.token_bytes(6)).hex()


def _described(file: Path) -> File:
    """Compute the name, size and digest of a file."""
    digest = blake2b(digest_size=16)
    size = 0
    with file.open("rb") as opened:
        while piece := opened.read(PIECE):
            digest.update(piece)
            size += len(piece)
    return File(file.name, size, digest.hexdigest())
