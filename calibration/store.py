"""The store: a folder with one file for each finished shard, and their sum once all are there.

    store.json               which run this is, its plan, whether it is finished
    shards/00000.safetensors statistics of the first samples
    statistics.safetensors   all shards, added in their order

A file is whole or absent. Nothing holds a time, so the same run gives the same bytes, killed and resumed or not, with
one worker or several.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import numpy as np

from ..bundle.files import sha256_of
from ..bundle.manifest import FileEntry
from ..loop.errors import StepfoldError, UsageError
from .document import REPAIR, SHARDS, STATISTICS, STORE, StoreDocument, is_store, read_document
from .durable import LOCK, PARTIAL, locked, remove_partials, replacing
from .key import differences
from .shards import DIGEST, STAMP, checked_shard, is_whole, shard_name, stamp
from .statistics import combine
from .tensors import TensorFile, TensorFileError, digest_of, shapes_of, stored, write_tensors

Array = np.ndarray


@contextmanager
def writing_store(folder: Path, document: StoreDocument, *, wait: bool = False) -> Iterator[None]:
    """Hold a store of this run, made when there is none.

    Args:
        folder: folder of the store.
        document: document of the run, not finished.
        wait: wait for another process that works on it, instead of refusing.

    Raises:
        UsageError: the folder holds something else, a store of another run, or another process works on it.
        StepfoldError: the store is damaged or cannot be written.
    """
    check_folder(folder)
    _make(folder / SHARDS)
    with locked(folder, wait=wait):
        remove_partials(folder)
        remove_partials(folder / SHARDS)
        if is_store(folder):
            require_same(folder, read_document(folder), document.parts)
        else:
            write_document(folder, document)
        yield


def require_same(folder: Path, stored: StoreDocument, parts: Mapping[str, object]) -> None:
    """Refuse a store that was made by another run.

    Args:
        folder: folder of the store, for the message.
        stored: its document.
        parts: parts of the run at hand; parts that it leaves out may differ.

    Raises:
        UsageError: the message names what differs.
    """
    found = differences({name: stored.parts.get(name) for name in parts}, parts)
    if found:
        raise UsageError(
            f"{folder}: expected a calibration store of this model and run; received a stale one: {'; '.join(found)}. "
            "Calibrate into another folder, or delete this one."
        )


def missing_shards(folder: Path, document: StoreDocument) -> list[int]:
    """The shards that are not there, or damaged."""
    return [i for i in range(len(document.shards)) if not is_whole(folder, document.key, i)]


def write_document(folder: Path, document: StoreDocument) -> None:
    """Write `store.json`."""
    text = json.dumps(document.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with replacing(folder / STORE) as stream:
        stream.write((text + "\n").encode())


def write_shard(folder: Path, key: str, index: int, arrays: Mapping[str, Array]) -> None:
    """Write a finished shard; once this returns it survives a power cut.

    Raises:
        StepfoldError: the disk is full; earlier shards stay valid.
    """
    ordered = dict(sorted(arrays.items()))
    with replacing(folder / shard_name(index)) as stream:
        shapes = shapes_of(ordered)
        metadata = {STAMP: stamp(key, index), DIGEST: digest_of(shapes, map(stored, ordered.values()))}
        write_tensors(stream, shapes, ordered.values(), metadata)


def finish(folder: Path, document: StoreDocument) -> StoreDocument:
    """Add the shards in their order, one tensor at a time, and say in `store.json` that the store is finished."""
    shards = [checked_shard(folder, document.key, i) for i in range(len(document.shards))]
    assert all(shard.shapes.keys() == shards[0].shapes.keys() for shard in shards)
    shapes = {
        name: (dtype, _joined(name, [shard.shapes[name][1] for shard in shards]))
        for name, (dtype, _) in shards[0].shapes.items()
    }
    sums = (_sum(name, shards) for name in shapes)
    with replacing(folder / STATISTICS) as stream:
        write_tensors(stream, shapes, sums, {STAMP: document.key})
    names = [STATISTICS, *(shard_name(i) for i in range(len(shards)))]
    files = {name: FileEntry(sha256=sha256_of(folder / name), bytes=(folder / name).stat().st_size) for name in names}
    finished = document.model_copy(update={"finished": True, "files": files})
    write_document(folder, finished)
    return finished


def _sum(name: str, shards: Sequence[TensorFile]) -> Array:
    accumulator = name.rpartition(".")[2]
    try:
        return reduce(
            lambda first, shard: combine(accumulator, first, shard.read(name)), shards[1:], shards[0].read(name)
        )
    except (TensorFileError, OSError) as error:
        raise StepfoldError(f"{shards[0].path.parent}: {error}. {REPAIR}") from error


def _joined(name: str, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of the sum; raw rows are joined."""
    if name.rpartition(".")[2] not in ("rows", "rows_at"):
        return shapes[0]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def check_folder(folder: Path) -> None:
    """Refuse a folder that is neither a store nor empty.

    Raises:
        UsageError: it holds something else, or is a file.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UsageError(f"{folder}: expected a folder for the calibration store; received a file.")
    known = {SHARDS, LOCK, STORE, STATISTICS}
    if os.path.isdir(folder) and not is_store(folder):
        foreign = sorted(p.name for p in folder.iterdir() if p.name not in known and not p.name.endswith(PARTIAL))
        if foreign:
            raise UsageError(
                f"{folder}: expected a calibration store or an empty folder; received one with {foreign[0]}. "
                "Choose another --out."
            )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StepfoldError(f"{folder}: expected a folder that can be made; received: {error.strerror}.") from error
