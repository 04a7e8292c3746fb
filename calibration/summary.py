"""What a store holds, as a person or a script reads it; needs no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..loop.errors import StepfoldError
from .document import StoreDocument, read_document
from .read import Calibration, open_finished
from .shards import open_shard
from .tensors import TensorFile

Array = np.ndarray


def store_summary(folder: Path) -> dict[str, Any]:
    """The object of `inspect STORE --json`.

    Args:
        folder: folder of a store, finished or not; figures of sites need a finished one.

    Raises:
        UsageError: the folder is no store.
        StepfoldError: it is damaged; the message names the file.
    """
    document = read_document(folder)
    shards = _finished_shards(folder, document)
    calibration = open_finished(folder) if document.finished else None
    return {
        "store": str(folder),
        "format_version": document.format_version,
        "key": document.key,
        "parts": document.parts,
        "finished": document.finished,
        "shards": {"done": len(shards), "total": len(document.shards)},
        "plan": plan_bytes(document),
        "coverage": _coverage(document, shards),
        "sites": [_site(document, calibration, i) for i in range(len(document.sites))],
    }


def plan_bytes(document: StoreDocument) -> dict[str, int]:
    """Bytes by part, what collecting adds to the memory of a process, and what a finished store takes on disk."""
    memory, shards = document.plan, len(document.shards)
    sums = memory.shard_file + memory.rows * (shards - 1)  # raw rows are joined, everything else is added up
    return memory.model_dump(exclude={"shard_file"}) | {
        "planned": memory.planned,
        "disk": memory.shard_file * shards + sums,
    }


def _finished_shards(folder: Path, document: StoreDocument) -> list[TensorFile]:
    found = []
    for i in range(len(document.shards)):
        try:
            found.append(open_shard(folder, document.key, i))
        except FileNotFoundError:
            continue
    return found


def _coverage(document: StoreDocument, shards: Sequence[TensorFile]) -> list[dict[str, Any]]:
    """Samples times calls of each timestep bucket and guidance branch."""
    seen = np.zeros((document.buckets, len(document.branches)))
    for shard in shards:
        counted = shard.read("seen")
        if counted.shape != seen.shape:
            raise StepfoldError(f"{shard.path}: expected counts of shape {list(seen.shape)}; received {counted.shape}.")
        seen += counted
    rows = []
    for bucket in range(document.buckets):
        calls = document.calls_of(bucket)
        times = [document.timesteps[call] for call in (calls[0], calls[-1])] if document.timesteps else None
        for i, branch in enumerate(document.branches):
            rows.append(
                {
                    "bucket": bucket,
                    "calls": [calls[0], calls[-1]],
                    "timesteps": times,
                    "branch": branch,
                    "evaluations": int(seen[bucket, i]),
                }
            )
    return rows


def _site(document: StoreDocument, calibration: Calibration | None, index: int) -> dict[str, Any]:
    entry = document.sites[index]
    shown: dict[str, Any] = {
        "site": entry.name,
        "layers": [layer.model_dump() for layer in entry.layers],
        "width": entry.width,
        "tokens": entry.tokens,
    }
    figures = ("rows", "low", "high", "ranges", "drift", "gram_rows", "raw_rows")
    if calibration is None:
        return shown | dict.fromkeys(figures)
    site = calibration.statistics(index)
    drift = site.drift()
    values = (
        site.count(),
        float(site.low().min()),
        float(site.high().max()),
        [float(value) for value in site.ranges()],
        drift if math.isfinite(drift) else None,
        site.gram_count() if entry.gram else None,
        len(site.rows()),
    )
    return shown | dict(zip(figures, values, strict=True))
