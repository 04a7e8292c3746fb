"""Read a bundle: check its version, its paths and every hash before anything in it is used."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from ..loop.array_files import read_arrays
from ..loop.errors import BundleError, UsageError
from ..loop.held import HeldFile, StageFiles
from ..loop.reading import Expected, read_json
from ..loop.spec import describe
from .files import AGAIN, MANIFEST, checked, inside, unlisted
from .manifest import FORMAT_VERSION, Manifest, StageEntry, stepfold_version
from .probe import Probe
from .tables import TABLES, Tables

Array = np.ndarray
LARGEST_MANIFEST_BYTES = 64 << 20
ARRAYS = Expected("a safetensors file", BundleError, AGAIN)
MANIFEST_FILE = Expected("the JSON of a manifest", BundleError, AGAIN)


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were checked.

    Attributes:
        path: the folder.
        manifest: its manifest.
        held: its files, open since they were checked.
    """

    path: Path
    manifest: Manifest
    held: Mapping[str, HeldFile] = field(repr=False)

    def file(self, name: str) -> Path:
        """A file of the bundle by its relative path."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: {name!r} is not among the files of the manifest. {AGAIN}")
        return inside(self.path, name)

    def opened(self, name: str) -> HeldFile:
        """The checked content of a file of the bundle by its relative path."""
        self.file(name)
        return self.held[name]

    def stage_files(self, stage: StageEntry) -> StageFiles:
        """What an engine may read for a stage: the files of the manifest that lie in the folder of its file."""
        folder, _, _ = stage.file.rpartition("/")
        beside = {
            name.rpartition("/")[2]: file for name, file in self.held.items() if name.rpartition("/")[0] == folder
        }
        return StageFiles(self.file(stage.file).parent, beside)

    def arrays(self, name: str) -> dict[str, Array]:
        """The arrays of a safetensors file of the bundle."""
        return read_arrays(self.opened(name), ARRAYS)

    def tables(self) -> Tables:
        """Recurrence, fitted tables, timestep values and constants; empty for a component without any."""
        tables = Tables.from_arrays(self.arrays(TABLES)) if TABLES in self.manifest.files else Tables()
        if self.manifest.loop is not None and tables.recurrence is None:
            raise BundleError(f"{self.path}: expected {TABLES} with the recurrence of the loop. {AGAIN}")
        if tables.recurrence is not None and self.manifest.loop is not None:
            here, there = self.manifest.loop.draws, tables.recurrence.draws
            if here != there:
                raise BundleError(
                    f"{self.path}: expected a sampler that draws noise {here} times, as the loop says; {TABLES} has one of "
                    f"{there} draws. {AGAIN}"
                )
        return tables

    def within(self, folder: str) -> Bundle:
        """A bundle that lies within this one, whose files were checked with it.

        Raises:
            BundleError: its manifest cannot be used, or names a file that this one does not.
        """
        file = self.opened(f"{folder}/{MANIFEST}")
        path = file.path.parent
        manifest = _manifest(path, read_json(file, MANIFEST_FILE, LARGEST_MANIFEST_BYTES))
        for name, entry in manifest.files.items():
            if self.manifest.files.get(f"{folder}/{name}") != entry:
                raise BundleError(f"{path}: {name!r} is not what the manifest of {self.path} says. {AGAIN}")
        return Bundle(path, manifest, {name: self.held[f"{folder}/{name}"] for name in manifest.files})

    def probe(self) -> Probe | None:
        """The first recorded probe, if there is one."""
        return next(self.probes(), None)

    def probes(self) -> Iterator[Probe]:
        """Every recorded probe: one, or one for each stage that shares the loop."""
        return (Probe.from_arrays(self.arrays(name)) for name in self.manifest.probes)


def read(path: Path | str) -> Bundle:
    """Open a bundle after checking all of its files.

    Raises:
        UsageError: there is no such folder.
        BundleError: no or a damaged manifest, a newer format, a path that leaves the folder, a file that is missing,
            not as it was written, or not named by the manifest.
    """
    path = Path(path)
    manifest = read_manifest(path)
    held, problems = hold(path, manifest)
    for found in (*problems, *unlisted(path, manifest.files)):
        raise BundleError(f"{path}: {found}")
    return Bundle(path, manifest, held)


def hold(path: Path, manifest: Manifest) -> tuple[dict[str, HeldFile], list[str]]:
    """Open the files of a bundle and check them.

    Returns:
        Those that are as they were written, by name, and a line for each of the others.
    """
    found = {name: checked(path, name, entry.sha256, entry.bytes) for name, entry in manifest.files.items()}
    held = {name: file for name, file in found.items() if isinstance(file, HeldFile)}
    return held, [problem for problem in found.values() if isinstance(problem, str)]


def read_manifest(path: Path) -> Manifest:
    """The manifest of a bundle, with version and paths checked but no hashes; raises as `read` does."""
    if not os.path.isdir(path):
        raise UsageError(f"{path}: expected the folder of a bundle; there is none. Make it with `stepfold optimize`.")
    return _manifest(path, _json(path / MANIFEST))


def _manifest(path: Path, data: Any) -> Manifest:
    """The manifest in a JSON value; `path` is the folder of the bundle."""
    _check_version(path, data)
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        raise BundleError(f"{path / MANIFEST}: {describe(error)}. {AGAIN}") from None
    shared = [] if manifest.shared is None else [manifest.shared.file]
    used = [*(stage.file for stage in manifest.stages), *shared, *manifest.probes, *_around(manifest)]
    for name in (*manifest.files, *used):
        inside(path, name)
    for name in used:
        if name not in manifest.files:
            raise BundleError(f"{path / MANIFEST}: {name!r} has no hash among the files. {AGAIN}")
    return manifest


def _around(manifest: Manifest) -> list[str]:
    """The files of what surrounds the loop that the manifest names."""
    if manifest.pipeline is None:
        return []
    tokenizers = [entry.file for entry in manifest.pipeline.tokenizers]
    return tokenizers + [f"{folder}/{MANIFEST}" for folder in manifest.pipeline.folders]


def _json(path: Path) -> Any:
    if not os.path.lexists(path):
        raise BundleError(f"{path.parent}: expected a bundle; it has no {path.name}. {AGAIN}")
    return read_json(path, MANIFEST_FILE, LARGEST_MANIFEST_BYTES)


def _check_version(path: Path, data: Any) -> None:
    version = data.get("format_version") if isinstance(data, dict) else None
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise BundleError(f"{path / MANIFEST}: expected a format_version; received {version!r}. {AGAIN}")
    if version < FORMAT_VERSION:
        raise BundleError(
            f"{path / MANIFEST}: format version {version} is that of an older stepfold, and this one reads {FORMAT_VERSION}. "
            "Build the bundle again: stepfold optimize CHECKPOINT --out BUNDLE --overwrite."
        )
    if version > FORMAT_VERSION:
        writer = data.get("stepfold_version")
        raise BundleError(
            f"{path}: format version {version} is newer than this stepfold {stepfold_version()}, which reads up to "
            f"{FORMAT_VERSION}. It was written by stepfold {writer}: pip install 'stepfold>={writer}'."
        )
