"""Files that are opened once: what was hashed is what is read, whatever takes their names in the meantime."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

import numpy as np

from .errors import UsageError

Array = np.ndarray


class HeldFile:
    """A regular file behind an open descriptor, which is closed when nobody refers to it any more."""

    def __init__(self, path: Path):
        """Open a file.

        Raises:
            OSError: it cannot be opened, or is no regular file.
        """
        self.path = path
        # without waiting, so that a pipe in the place of a file is refused and not waited for
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        self._stream = os.fdopen(descriptor, "rb")
        weakref.finalize(self, self._stream.close)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        self.size = status.st_size
        self._opened = _state(status)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def stream(self) -> BufferedReader:
        """The open file, at its beginning."""
        self._stream.seek(0)
        return self._stream

    @property
    def address(self) -> Path:
        """A path that leads to this very file on Linux, and to what lies at its path by now elsewhere."""
        own = Path(f"/proc/self/fd/{self._stream.fileno()}")
        return own if own.exists() else self.path.resolve()

    def lies_at_its_path(self) -> bool:
        """Whether its path still leads to this file, and nobody wrote to it or renamed it since it was opened."""
        try:
            return _state(os.stat(self.path)) == self._opened
        except OSError:
            return False

    def sha256(self) -> str:
        """SHA-256 as hexadecimal text."""
        return hashlib.file_digest(self.stream, "sha256").hexdigest()

    def read(self) -> bytes:
        """All of it."""
        return self.stream.read()

    def mapped(self) -> Array:
        """[bytes] uint8, mapped into memory; what is written there stays in this process."""
        if self.size == 0:
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(self._stream.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)


def _state(status: os.stat_result) -> tuple[int, ...]:
    """What tells a file from another one, and from itself after a change: a renaming counts, which may be undone."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@contextmanager
def utf8_folder(folder: Path) -> Iterator[Path]:
    """A path to a folder that is UTF-8 text, as long as the block lasts: engines take paths as text.

    Linux has names that are no UTF-8. Such a folder is held open, and reached by the name of its descriptor, which
    other processes of the user can use as well.

    Raises:
        UsageError: the system has no other name for it.
    """
    if is_utf8(folder):
        yield folder
        return
    descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        address = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
        if not address.exists():
            raise UsageError(f"{folder}: expected a path that is UTF-8 text, as engines take it. Choose another path.")
        yield address
    finally:
        os.close(descriptor)


def is_utf8(path: Path) -> bool:
    """Whether a path, with the folder that it is relative to, is UTF-8 text."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        return False
    return True


Source = Path | HeldFile
"""A file to read: by its path, or one that was opened before."""


class StageFiles:
    """The files that an engine may read for one stage: its main file and those that lie beside it.

    Of a bundle they are the checked ones of the manifest and no others.
    """

    def __init__(self, folder: Path, held: Mapping[str, HeldFile] | None = None):
        """Say which files.

        Args:
            folder: folder of the stage.
            held: files by name; None takes whatever lies in the folder, which the caller has just made.
        """
        self.folder = folder
        self._held = held

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return (self.folder / name).is_file() if self._held is None else name in self._held

    def open(self, name: str) -> HeldFile:
        """A file by name.

        Raises:
            OSError: it is missing, or is not one of these files.
        """
        if self._held is None:
            return HeldFile(self.folder / name)
        if name not in self._held:
            raise FileNotFoundError(errno.ENOENT, "not among the files of the bundle", str(self.folder / name))
        return self._held[name]
