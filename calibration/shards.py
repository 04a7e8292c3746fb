"""The files of finished shards; reading them needs no PyTorch."""

from __future__ import annotations

from pathlib import Path

from ..loop.errors import StepfoldError
from .document import REPAIR, SHARDS
from .tensors import TensorFile, TensorFileError, open_tensors

STAMP, DIGEST = "stepfold", "sha256"


def shard_name(index: int) -> str:
    """The file of a shard, relative to the store."""
    return f"{SHARDS}/{index:05d}.safetensors"


def stamp(key: str, index: int) -> str:
    """What a shard says about itself, so that one of another store is noticed."""
    return f"{key} {index}"


def is_whole(folder: Path, key: str, index: int) -> bool:
    """Whether a shard is there, belongs to the store, and holds what was written; reads all of it."""
    try:
        checked_shard(folder, key, index)
    except (StepfoldError, FileNotFoundError):
        return False
    return True


def checked_shard(folder: Path, key: str, index: int) -> TensorFile:
    """A shard whose content was compared with its digest; raises as `open_shard` does, and when it was changed."""
    shard = open_shard(folder, key, index)
    try:
        received = shard.digest()
    except OSError as error:
        raise StepfoldError(f"{shard.path}: expected a shard that can be read; {error}. {REPAIR}") from None
    if received != shard.metadata.get(DIGEST):
        raise StepfoldError(f"{shard.path}: expected the content it was written with; it was changed. {REPAIR}")
    return shard


def open_shard(folder: Path, key: str, index: int) -> TensorFile:
    """The header of a shard.

    Raises:
        FileNotFoundError: it was not collected yet.
        StepfoldError: it is cut short, or of another store.
    """
    path = folder / shard_name(index)
    try:
        file = open_tensors(path)
    except FileNotFoundError:
        raise
    except (TensorFileError, OSError) as error:
        raise StepfoldError(f"{path}: expected a whole shard; received a damaged one: {error}. {REPAIR}") from None
    if file.metadata.get(STAMP) != stamp(key, index):
        raise StepfoldError(f"{path}: expected a shard of this store; received one of another. {REPAIR}")
    return file
