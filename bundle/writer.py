"""Write a bundle: into a temporary sibling that takes the place of the old folder in one step."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..loop.errors import StepfoldError, UsageError
from ..loop.held import utf8_folder
from ..loop.writing import disk_is_full, require_writable, temporary_sibling
from .files import MANIFEST, listing, sha256_of
from .manifest import FileEntry, Manifest
from .probe import PROBE, Probe
from .tables import TABLES, Tables

logger = logging.getLogger(__name__)

SCHEDULE = "schedule.json"


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse an output folder before any work starts.

    Raises:
        UsageError: `out` exists and may not be overwritten, is something else than a bundle, or cannot be written.
    """
    if not os.path.lexists(out):
        require_writable("--out", out)
        return
    if not overwrite:
        raise UsageError(f"{out}: already exists. Choose another --out, or pass --overwrite to replace the bundle.")
    if not out.is_dir():
        raise UsageError(f"{out}: expected a folder to overwrite; received a file. Choose another --out.")
    if not (out / MANIFEST).is_file() and any(out.iterdir()):
        raise UsageError(f"{out}: expected a bundle to overwrite; received another folder. Choose another --out.")
    require_writable("--out", out.resolve())


@contextmanager
def writing(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Write a bundle: `with writing(out) as folder:` fills a temporary sibling that becomes `out` at the end.

    Whatever goes wrong, an interruption included, leaves what was at `out` before, and nothing else.

    Args:
        out: the bundle's folder; missing parents are made.
        overwrite: replace a bundle that is there.

    Raises:
        UsageError: see `check_out`.
        StepfoldError: the disk is full.
    """
    check_out(out, overwrite)
    target = out.resolve()
    temporary = temporary_sibling(target)
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        temporary.mkdir(parents=True)
        with utf8_folder(temporary) as folder:
            yield folder
        _publish(temporary, target, overwrite)
        made = []
    except Exception as error:
        if not disk_is_full(error):
            raise
        raise StepfoldError(
            f"{out}: expected room for the bundle; the disk is full. Free some space, or choose another --out; "
            "nothing was left behind."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def write_manifest(folder: Path, manifest: Manifest, known: Mapping[str, FileEntry] | None = None) -> Manifest:
    """Write `manifest.json` last: it takes the hash and size of every file in the folder.

    Args:
        folder: folder of the bundle.
        manifest: its `files` are replaced.
        known: entries of files that were taken over from a checked bundle, which are kept: a file that was changed
            since then does not get a digest that fits it.

    Returns:
        The manifest with its `files`.
    """
    known = known or {}
    files = {name: known[name] if name in known else _entry(folder / name) for name in listing(folder)}
    manifest = manifest.model_copy(update={"files": files})
    write_json(folder / MANIFEST, manifest.model_dump(mode="json", by_alias=True))
    return manifest


def _entry(path: Path) -> FileEntry:
    return FileEntry(sha256=sha256_of(path), bytes=path.stat().st_size)


def write_tables(folder: Path, tables: Tables) -> None:
    """Write `tables.safetensors`."""
    tables.check()
    _write_arrays(folder / TABLES, tables.arrays())


def write_probe(folder: Path, probe: Probe, number: int = 0) -> str:
    """Write one of the probes and return its file name, for the manifest."""
    path = folder / PROBE
    if number:
        path = path.with_stem(f"{path.stem}_{number}")
    _write_arrays(path, probe.arrays())
    return path.name


def write_schedule(folder: Path, tables: Tables, fitted_on: str, details: Mapping[str, Any]) -> None:
    """Write `schedule.json`, the fitted tables as a person reads them."""
    scales = [
        {
            "scale": float(scale),
            "positions": [int(position) for position in plan.positions],
            "evaluations": plan.evaluations,
            "guided_evaluations": plan.guided_evaluations,
            "fitted_on": fitted_on,
        }
        for scale, plan in sorted(tables.fitted.items())
    ]
    grid_steps = tables.recurrence.calls if tables.recurrence is not None else 0
    write_json(folder / SCHEDULE, {"grid_steps": grid_steps, "scales": scales, "details": dict(details)})


def write_json(path: Path, value: Any) -> None:
    """Write JSON that is the same for the same value: sorted keys, a newline at the end, no NaN.

    Raises:
        StepfoldError: a number is not finite, or something is not JSON.
    """
    try:
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise StepfoldError(f"{path.name}: expected finite numbers, text, lists and mappings; {error}.") from error
    path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")  # as JSON escapes what is no UTF-8


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    from safetensors.numpy import save

    path.write_bytes(save({name: np.asarray(value, order="C") for name, value in sorted(arrays.items())}))


def _publish(temporary: Path, target: Path, overwrite: bool) -> None:
    """Put the finished folder in its place; what was there is left under the temporary name, to be removed."""
    check_out(target, overwrite)  # it may have appeared in the meantime
    if not target.exists():
        os.rename(temporary, target)
    elif not _exchange(temporary, target):
        _replace(temporary, target)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step where the system can (`renameat2` of Linux); False where it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def _replace(temporary: Path, target: Path) -> None:
    """Swap in two steps, and go back when the second one is interrupted."""
    aside = temporary.with_suffix(".old")
    try:
        os.rename(target, aside)
        os.rename(temporary, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
