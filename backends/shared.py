"""Weights that several compiled stages of a bundle hold: written once, into a file that all of them read.

An engine that can read weights from another file has `share(files)` in its `lower` module, see `Backend.share`; what
is the same for all engines is here. What is compared is bytes: the type and the shape of a tensor stay with the stage.
Files of weights, which may be larger than the memory, are read in chunks.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

SHARED = "shared.weights"
"""Name of the file, beside the stages. No engine gives a stage's own files this ending."""
SMALLEST_BYTES = 4096
"""Of a tensor that is worth a file of its own: the reference that takes its place costs about a hundred."""
CHUNK_BYTES = 1 << 20
LARGE_BYTES = 1 << 20
PAGE, LINE, WORD = 1 << 16, 64, 8
"""Where large, middle and small tensors begin: whole pages can be mapped on every system, on Windows those of 64 KiB."""


@dataclass(frozen=True)
class Span:
    """Bytes of a file."""

    file: Path
    offset: int
    size: int


Content = bytes | Span
"""The bytes of a tensor, in memory or in a file."""


@dataclass(frozen=True)
class Shared:
    """What was shared.

    Attributes:
        file: file with the weights.
        readers: the main files of the stages that read it, in the order they were given.
        saved_bytes: bytes of tensors that would otherwise be stored again.
    """

    file: Path
    readers: tuple[Path, ...]
    saved_bytes: int


def size_of(content: Content) -> int:
    """Bytes of a tensor."""
    return content.size if isinstance(content, Span) else len(content)


def digest_of(content: Content) -> str:
    """SHA-256 of the bytes of a tensor."""
    digest = hashlib.sha256()
    for chunk in chunks(content):
        digest.update(chunk)
    return digest.hexdigest()


def chunks(content: Content) -> Iterator[bytes]:
    """The bytes of a tensor, a chunk at a time.

    Raises:
        EOFError: the file ends before the tensor does.
    """
    if not isinstance(content, Span):
        yield content
        return
    with content.file.open("rb") as stream:
        stream.seek(content.offset)
        left = content.size
        while left:
            chunk = stream.read(min(left, CHUNK_BYTES))
            if not chunk:
                raise EOFError(f"{content.file}: it ends before {content.offset + content.size} bytes")
            left -= len(chunk)
            yield chunk


def common(stages: Iterable[Mapping[str, int]]) -> set[str]:
    """What two or more stages hold and is not small.

    Args:
        stages: digests of the tensors of each stage, with their bytes.
    """
    counts = Counter(digest for stage in stages for digest, size in stage.items() if size >= SMALLEST_BYTES)
    return {digest for digest, count in counts.items() if count > 1}


class WeightFile:
    """A file of tensors that holds equal bytes once, in the order in which they were added.

    Attributes:
        saved_bytes: bytes of added tensors that the file holds already.
    """

    def __init__(self, path: Path):
        """Begin the file.

        Args:
            path: path to write to; it must not exist.
        """
        self.saved_bytes = 0
        self._path = path
        self._offsets: dict[str, int] = {}
        self._end = 0

    def __enter__(self) -> Self:
        """Open the file."""
        self._stream: BinaryIO = self._path.open("xb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Close the file."""
        self._stream.close()

    def add(self, digest: str, content: Content) -> int:
        """Where the bytes begin; they are written unless they are there.

        Args:
            digest: digest of the content.
            content: the bytes of a tensor.
        """
        size = size_of(content)
        if digest in self._offsets:
            self.saved_bytes += size
            return self._offsets[digest]
        offset = _aligned(self._end, size)
        self._stream.write(bytes(offset - self._end))
        for chunk in chunks(content):
            self._stream.write(chunk)
        self._offsets[digest] = offset
        self._end = offset + size
        return offset


def _aligned(position: int, size: int) -> int:
    """The first place from a position on at which a tensor of this size may begin."""
    step = PAGE if size >= LARGE_BYTES else LINE if size >= SMALLEST_BYTES else WORD
    return -(-position // step) * step
