"""The report inside a bundle: `report.json`, what `optimize --json` prints, and the page beside it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..bundle.files import MANIFEST, sha256_of
from ..bundle.manifest import FileEntry, Manifest
from ..bundle.writer import write_json
from ..runtime.comparison import Pictures
from .page import PAGE, build_page, describe_bundle, missing_packages, write_page
from .records import REPORT

logger = logging.getLogger(__name__)


def write_bundle_report(
    folder: Path,
    manifest: Manifest,
    summary: Mapping[str, Any],
    pictures: Pictures | None = None,
    model: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write report.json and report.html into a bundle in the making and enter them into its manifest.

    Without the extra `report` the page is left out, and the log says what to install.

    Args:
        folder: folder of the bundle, with its manifest written; the name of the bundle is that of `summary["bundle"]`.
        manifest: manifest as it was written.
        summary: the object of `optimize --json`.
        pictures: samples to show.
        model: the checkpoint as `inspect --json` tells it.

    Returns:
        The manifest with the new files.

    Raises:
        StepfoldError: a number of the summary is not finite.
    """
    write_json(folder / REPORT, dict(summary))
    written = [REPORT]
    missing = missing_packages()
    if missing is None:
        name = Path(str(summary["bundle"])).resolve().name
        described = {**describe_bundle(folder, summary), "name": name}
        write_page(folder / PAGE, build_page(f"stepfold optimize: {name}", None, [described], pictures, model))
        written.append(PAGE)
    else:
        logger.warning("%s was not written: %s", PAGE, missing)
    entries = {
        name: FileEntry(sha256=sha256_of(folder / name), bytes=(folder / name).stat().st_size) for name in written
    }
    manifest = manifest.model_copy(update={"files": {**manifest.files, **entries}})
    write_json(folder / MANIFEST, manifest.model_dump(mode="json", by_alias=True))
    return manifest
