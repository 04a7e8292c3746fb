"""`store.json`: what a calibration store holds and which run it belongs to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from ..bundle.files import sha256_of
from ..bundle.manifest import Count, FileEntry
from ..loop.errors import StepfoldError, UsageError
from ..loop.reading import Expected, read_json
from ..loop.spec import Strict, describe

FORMAT_VERSION = 1
STORE = "store.json"
STATISTICS = "statistics.safetensors"
SHARDS = "shards"
CONDITIONAL, UNCONDITIONAL = "conditional", "unconditional"
BRANCHES = ((CONDITIONAL,), (CONDITIONAL, UNCONDITIONAL))
LARGEST_DOCUMENT_BYTES = 64 << 20
REPAIR_DOCUMENT = "Delete it and run `stepfold calibrate` again, which keeps the finished shards."
DOCUMENT = Expected("the JSON of a calibration store", StepfoldError, f"It is damaged. {REPAIR_DOCUMENT}")
STEADY = 1.5
"""Largest range over the median range up to which one static scale serves all timesteps."""
REPAIR = "Delete it or run `stepfold calibrate` again, which makes it anew."


class Layer(Strict):
    """A linear layer: the path of its module, and its node in the graph, which tells two calls of one module apart."""

    path: str
    node: str


class SiteEntry(Strict):
    """A value that linear layers read.

    Attributes:
        name: module path of the first layer, with `#2`, `#3`... after one that occurs again.
        value: its node.
        layers: layers that read it.
        width: M.
        tokens: rows a sample T.
        gram: whether its Gram matrix is kept; not of values wider than the limit.
    """

    name: str
    value: str
    layers: tuple[Layer, ...]
    width: Count
    tokens: Count
    gram: bool


class Memory(Strict):
    """Bytes of one process, known before the start.

    Attributes:
        weights: bytes of the program's weights, which lie in memory already.
        accumulators: ranges, sums and counts.
        gram: Gram matrices.
        rows: raw rows.
        activations: the largest set of values that are alive at once in one evaluation of a shard.
        shard_file: bytes of each shard on disk.
    """

    weights: Count
    accumulators: Count
    gram: Count
    rows: Count
    activations: Count
    shard_file: Count

    @property
    def planned(self) -> int:
        """What collecting adds to the memory of the process."""
        return self.accumulators + self.gram + self.rows + self.activations


class PassPart(Strict):
    """A pass that ran before, and the hash of what it did."""

    name: str = Field(alias="pass")
    sha256: str


class Parts(BaseModel):
    """Those parts of the key that are read again, among others."""

    model_config = ConfigDict(strict=True)

    model: str
    samples: int = Field(ge=1)
    seed: int = Field(ge=0)
    buckets: int = Field(ge=1)
    passes: list[PassPart]


class StoreDocument(Strict):
    """All of `store.json`.

    Attributes:
        key: hash of `parts`.
        parts: everything the statistics depend on, so that a stale store can say what differs.
        branches: the guidance branches, conditional first.
        timesteps: what the denoiser receives at each call of the grid; empty for a component.
        sites: the values that statistics were taken of.
        shards: first and last (exclusive) sample of each.
        plan: memory.
        finished: whether the shards are added up.
        files: digest of every file once finished.
    """

    format_version: int = FORMAT_VERSION
    key: str
    parts: dict[str, JsonValue]
    branches: tuple[str, ...]
    timesteps: tuple[float, ...]
    sites: tuple[SiteEntry, ...]
    shards: tuple[tuple[Count, Count], ...]
    plan: Memory
    finished: bool = False
    files: dict[str, FileEntry] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> StoreDocument:
        """What the figures of a store are read with: the parts that are named here, buckets and branches that exist."""
        Parts.model_validate(self.parts)
        if self.branches not in BRANCHES:
            raise ValueError(f"branches: expected conditional, then maybe unconditional; received {self.branches}")
        if self.buckets > self.calls:
            raise ValueError(f"expected at most {self.calls} buckets, one for each call; received {self.buckets}")
        return self

    @property
    def buckets(self) -> int:
        """Equal parts of the calls of the grid."""
        return self.number("buckets")

    @property
    def calls(self) -> int:
        """Calls of the grid; one for a component."""
        return max(1, len(self.timesteps))

    def number(self, part: str) -> int:
        """A part of the key that is a number."""
        value = self.parts.get(part)
        if isinstance(value, bool) or not isinstance(value, int):
            raise StepfoldError(f"{STORE}: expected a number for {part!r}; received {value!r}. {REPAIR_DOCUMENT}")
        return value

    def calls_of(self, bucket: int) -> range:
        """The calls of one bucket."""
        return range(-(-bucket * self.calls // self.buckets), -(-(bucket + 1) * self.calls // self.buckets))


def bucket_of(call: int, calls: int, buckets: int) -> int:
    """The bucket of a call of the grid: equal parts of all calls."""
    return call * buckets // calls


def is_store(path: Path) -> bool:
    """Whether a folder is a calibration store, finished or not."""
    return os.path.lexists(path / STORE)


def read_document(folder: Path) -> StoreDocument:
    """Read `store.json`.

    Raises:
        UsageError: the folder is no store.
        StepfoldError: the file is damaged, or of a newer version of stepfold.
    """
    if not is_store(folder):
        raise UsageError(
            f"{folder}: expected a calibration store; there is no {STORE}. "
            f"Make one: stepfold calibrate CHECKPOINT --out {folder}"
        )
    path = folder / STORE
    data = _json(path)
    version = data.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise StepfoldError(
            f"{path}: expected format version {FORMAT_VERSION}; received {version}, of a newer stepfold. "
            "Update stepfold, or calibrate into another folder."
        )
    try:
        return StoreDocument.model_validate(data)
    except ValidationError as error:
        _damaged(path, describe(error))


def is_finished(folder: Path) -> bool:
    """Whether the shards are added up and every file is as it was written."""
    document = read_document(folder)
    return document.finished and not any(damage(folder, name, entry) for name, entry in document.files.items())


def damage(folder: Path, name: str, entry: FileEntry, *, content: bool = True) -> str | None:
    """What is wrong with a file of a finished store, or None.

    Args:
        folder: folder of the store.
        name: name of the file, relative to the folder.
        entry: its size and digest.
        content: check the digest too, which reads the file.
    """
    path = folder / name
    if not path.is_file():
        return f"{path}: expected a file of {entry.bytes} bytes; it is missing. {REPAIR}"
    if path.stat().st_size != entry.bytes:
        return f"{path}: expected {entry.bytes} bytes; received {path.stat().st_size}. {REPAIR}"
    if content and sha256_of(path) != entry.sha256:
        return f"{path}: expected the content it was written with; it was changed. {REPAIR}"
    return None


def _json(path: Path) -> dict[str, Any]:
    data = read_json(path, DOCUMENT, LARGEST_DOCUMENT_BYTES)
    if not isinstance(data, dict):
        _damaged(path, f"expected a JSON object; received {type(data).__name__}")
    return data


def _damaged(path: Path, what: str) -> NoReturn:
    raise StepfoldError(f"{path}: damaged: {what}. {REPAIR_DOCUMENT}")
