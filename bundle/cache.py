"""Results of earlier runs, by what they were made from: a cache costs time when it fails, never a run."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue, ValidationError

from ..loop.errors import BundleError
from ..loop.spec import Strict
from .files import inside, problem, sha256_of
from .manifest import FileEntry
from .writer import write_json

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
ENTRY = "entry.json"
PARTIAL = ".partial"
LIMIT_BYTES = 8 << 30
ABANDONED_SECONDS = 24 * 3600  # after which what a killed process was writing is removed
PUBLISHED = (errno.EEXIST, errno.ENOTEMPTY)


class Entry(Strict):
    """What one folder of the cache holds.

    Attributes:
        name: name of the result, for people.
        parts: what the key was made from.
        main: the first of its files.
        files: digest and size of every file.
    """

    format_version: int = FORMAT_VERSION
    name: str
    parts: dict[str, JsonValue]
    main: str
    files: dict[str, FileEntry]


def cache_folder() -> Path:
    """Where trajectories and compiled stages are kept: `$STEPFOLD_CACHE`, or `stepfold` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepfold"
    return Path(os.environ.get("STEPFOLD_CACHE") or default)


def key_of(parts: Mapping[str, JsonValue]) -> str:
    """SHA-256 of all that a result depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Cache:
    """A folder with one sub-folder for each result. Several processes may use it at once.

    A sub-folder appears whole, by a rename, and is never written to again. What is taken from it is copied or read
    first and compared with its digest then, so nobody works with half a result or a damaged one. Nothing raises: a
    folder that cannot be read or written, one that is a file, and a damaged entry are warned of, and the run goes on as
    if there were no entry.

    Attributes:
        folder: it is made when the first result is kept.
        what: a result is, for messages, as in "the compiled stage step cannot be kept".
        limit: bytes; beyond them the results that were not used for longest are removed.
    """

    folder: Path
    what: str
    limit: int = LIMIT_BYTES

    def take(self, key: str, target: Path) -> list[Path] | None:
        """Copy a result into an empty folder.

        Returns:
            Its files, the main one first; None when it is not here, or damaged.
        """
        entry = self._entry(key)
        if entry is None:
            return None
        try:
            reason = _copied(self.folder / key, entry, target)
        except (OSError, BundleError) as error:
            reason = str(error)
        if reason is not None:
            _empty(target)
            self._discard(key, reason)
            return None
        self._used(key)
        return [target / entry.main, *(target / name for name in sorted(entry.files) if name != entry.main)]

    def read(self, key: str) -> bytes | None:
        """The content of a result that is one file; None when it is not here, or damaged."""
        entry = self._entry(key)
        if entry is None:
            return None
        try:
            content = inside(self.folder / key, entry.main).read_bytes()
        except (OSError, BundleError) as error:
            self._discard(key, str(error))
            return None
        if hashlib.sha256(content).hexdigest() != entry.files[entry.main].sha256:
            self._discard(key, f"{entry.main} is not what was written")
            return None
        self._used(key)
        return content

    def keep(self, key: str, name: str, parts: Mapping[str, JsonValue], files: Sequence[Path]) -> None:
        """Store the files of a result, the main one first.

        Args:
            key: key of the result, see `key_of`.
            name: name of the result, for people.
            parts: what the key was made from.
            files: files that are copied.
        """
        sizes = {file.name: file.stat().st_size for file in files}
        if sum(sizes.values()) > self.limit:
            return

        def fill(folder: Path) -> dict[str, FileEntry]:
            for file in files:
                shutil.copyfile(file, folder / file.name)
            return {file.name: FileEntry(sha256=sha256_of(file), bytes=sizes[file.name]) for file in files}

        self._store(key, name, parts, files[0].name, fill)

    def write(self, key: str, name: str, parts: Mapping[str, JsonValue], file: str, content: bytes) -> None:
        """Store a result that is one file.

        Args:
            key: key of the result, see `key_of`.
            name: name of the result, for people.
            parts: what the key was made from.
            file: its name.
            content: its bytes.
        """
        if len(content) > self.limit:
            return

        def fill(folder: Path) -> dict[str, FileEntry]:
            (folder / file).write_bytes(content)
            return {file: FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))}

        self._store(key, name, parts, file, fill)

    def _entry(self, key: str) -> Entry | None:
        """What the folder of a key says about itself; None where there is none that can be used."""
        source = self.folder / key
        try:
            os.stat(source)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            logger.warning("%s: the cache cannot be read, so the %s is made again: %s", self.folder, self.what, error)
            return None
        try:
            entry = Entry.model_validate_json((source / ENTRY).read_bytes())
        except (OSError, ValidationError) as error:
            self._discard(key, str(error))
            return None
        if entry.format_version != FORMAT_VERSION or entry.main not in entry.files:
            self._discard(key, f"expected format {FORMAT_VERSION} with a main file; received {entry.format_version}.")
            return None
        return entry

    def _store(
        self,
        key: str,
        name: str,
        parts: Mapping[str, JsonValue],
        main: str,
        fill: Callable[[Path], dict[str, FileEntry]],
    ) -> None:
        """Publish the folder that `fill` writes files into; what goes wrong is warned of."""
        partial = self.folder / f".{key}.{secrets.token_hex(4)}{PARTIAL}"
        try:
            partial.mkdir(parents=True)
            entry = Entry(name=name, parts=dict(parts), main=main, files=fill(partial))
            write_json(partial / ENTRY, entry.model_dump(mode="json"))
            self._publish(partial, key)
            self._make_room()
        except OSError as error:
            logger.warning("%s: the %s %s cannot be kept: %s", self.folder, self.what, name, error)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _publish(self, partial: Path, key: str) -> None:
        """Give a finished folder its name, unless another process has made the same result in the meantime."""
        try:
            os.rename(partial, self.folder / key)
        except OSError as error:
            if error.errno not in PUBLISHED:
                raise

    def _make_room(self) -> None:
        """Remove the results that were not used for longest, and what killed processes left."""
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

    def _used(self, key: str) -> None:
        """Note that a result is of use, so that it is not among the first to go."""
        with suppress(OSError):  # a cache that may only be read is not put in order
            os.utime(self.folder / key)

    def _discard(self, key: str, reason: str) -> None:
        source = self.folder / key
        if os.path.lexists(source):  # else another process has just removed it to make room
            logger.warning(
                "%s: the stored %s is damaged and is made again: %s", source, self.what, reason.splitlines()[0]
            )
            self._remove(source)

    def _remove(self, path: Path) -> None:
        """Take a result out in one step, so that nobody finds half of it."""
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        with suppress(OSError):
            os.rename(path, aside)
            if not aside.is_dir():
                aside.unlink()
        shutil.rmtree(aside, ignore_errors=True)


def _copied(source: Path, entry: Entry, target: Path) -> str | None:
    """Copy the files of an entry; what is wrong with the copies, or None."""
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
