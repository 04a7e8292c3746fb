"""Compiled stages of earlier builds, by what they were made from."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue, ValidationError

from ..bundle.files import inside, problem, sha256_of
from ..bundle.manifest import FileEntry
from ..bundle.writer import write_json
from ..loop.errors import BundleError
from ..loop.spec import Strict

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
ENTRY = "entry.json"
PARTIAL = ".partial"
LIMIT_BYTES = 8 << 30
ABANDONED_SECONDS = 24 * 3600  # after which what a killed process was writing is removed
PUBLISHED = (errno.EEXIST, errno.ENOTEMPTY)


class Entry(Strict):
    """What one folder of the cache holds.

    Attributes:
        stage: its name, for people.
        parts: what the key was made from.
        main: the engine file.
        files: digest and size of every file.
    """

    format_version: int = FORMAT_VERSION
    stage: str
    parts: dict[str, JsonValue]
    main: str
    files: dict[str, FileEntry]


def key_of(parts: Mapping[str, JsonValue]) -> str:
    """SHA-256 of all that a compiled stage depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ArtifactCache:
    """A folder with one sub-folder for each compiled stage. Several processes may use it at once.

    A sub-folder appears whole, by a rename, and is never written to again. Whoever takes a stage from it copies the
    files and then checks the hashes of the copies, so a reader never works with half a stage or a damaged one.

    Attributes:
        folder: it is made when the first stage is kept.
        limit: bytes; beyond them the stages that were not used for longest are removed.
    """

    folder: Path
    limit: int = LIMIT_BYTES

    def take(self, key: str, target: Path) -> list[Path] | None:
        """Copy a compiled stage into an empty folder.

        Returns:
            Its files, the engine file first; None when it is not here, or damaged, which is warned of.
        """
        source = self.folder / key
        if not source.is_dir():
            return None
        try:
            entry = Entry.model_validate_json((source / ENTRY).read_bytes())
            reason = _copied(source, entry, target)
        except (FileNotFoundError, ValidationError, BundleError) as error:
            reason = str(error).splitlines()[0]
        if reason is not None:
            _empty(target)
            self._discard(source, reason)
            return None
        with suppress(OSError):  # a cache that may only be read is not put in order
            os.utime(source)
        return [target / entry.main, *(target / name for name in sorted(entry.files) if name != entry.main)]

    def keep(self, key: str, stage: str, parts: Mapping[str, JsonValue], files: Sequence[Path]) -> None:
        """Store the files of a compiled stage, the engine file first. What goes wrong is warned of, not raised."""
        if sum(file.stat().st_size for file in files) > self.limit:
            return
        partial = self.folder / f".{key}.{secrets.token_hex(4)}{PARTIAL}"
        try:
            partial.mkdir(parents=True)
            for file in files:
                shutil.copyfile(file, partial / file.name)
            entries = {f.name: FileEntry(sha256=sha256_of(f), bytes=f.stat().st_size) for f in files}
            entry = Entry(stage=stage, parts=dict(parts), main=files[0].name, files=entries)
            write_json(partial / ENTRY, entry.model_dump(mode="json"))
            os.rename(partial, self.folder / key)
            self._make_room()
        except OSError as error:
            if error.errno not in PUBLISHED:  # else another process has compiled the same stage in the meantime
                logger.warning("%s: the compiled stage %s cannot be kept: %s", self.folder, stage, error)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _make_room(self) -> None:
        """Remove the stages that were not used for longest, and what killed processes left."""
        kept = []
        for path in self.folder.iterdir():
            with suppress(OSError):  # another process may be removing it
                used = path.stat().st_mtime
                if not path.name.endswith(PARTIAL):
                    kept.append((used, sum(file.stat().st_size for file in path.iterdir()), path))
                elif time.time() - used > ABANDONED_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total <= self.limit:
                break
            self._remove(path)
            total -= size

    def _discard(self, source: Path, reason: str) -> None:
        if source.is_dir():  # else another process has just removed it to make room
            logger.warning("%s: the stored stage is damaged and is compiled again: %s", source, reason)
            self._remove(source)

    def _remove(self, path: Path) -> None:
        """Take a stage out in one step, so that nobody finds half of it."""
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        with suppress(OSError):
            os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)


def _copied(source: Path, entry: Entry, target: Path) -> str | None:
    """Copy the files of an entry; what is wrong with the copies, or None."""
    if entry.format_version != FORMAT_VERSION or entry.main not in entry.files:
        return f"expected format {FORMAT_VERSION} with a main file; received {entry.format_version}."
    for name, file in entry.files.items():
        path = inside(source, name)
        if path.parent != source:
            return f"expected files without folders; received {name!r}."
        shutil.copyfile(path, target / name)
        reason = problem(target, name, file.sha256, file.bytes)
        if reason is not None:
            return reason
    return None


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
