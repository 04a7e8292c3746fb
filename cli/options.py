"""Options that several commands share."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated

import typer

from ..loop.errors import UsageError

BUNDLE_OR_CHECKPOINT = "BUNDLE|CHECKPOINT"
MOST_SAMPLES = 1_000_000_000  # what a NumPy array can still count
ANY_FOLDER = "CHECKPOINT|BUNDLE|STORE"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of the noise.")]
Guidance = Annotated[
    float | None, typer.Option("--guidance", metavar="SCALE", help="Guidance scale; that of the loop by default.")
]
AllowNative = Annotated[
    bool,
    typer.Option(
        "--allow-native", help="Open native code (inductor) that you did not build here; it runs with all your rights."
    ),
]
MinPsnr = Annotated[
    float | None,
    typer.Option("--min-psnr", metavar="DB", help="Quality budget in dB; overrides that of the recipe."),
]
ReferenceCheckpoint = Annotated[
    Path | None,
    typer.Option("--reference", metavar="CHECKPOINT", help="Checkpoint whose full loop quality is measured against."),
]


def check_min_psnr(value: float | None) -> None:
    """Raise UsageError unless a budget is a number of decibels."""
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise UsageError(f"--min-psnr: expected a number of decibels, 0 or more; received {value:g}.")


def is_bundle(path: Path) -> bool:
    """Whether a folder is a bundle; otherwise it is taken for a checkpoint.

    Raises:
        UsageError: there is no such folder.
    """
    if not os.path.isdir(path):  # False, too, where the system refuses to say
        raise UsageError(f"{path}: expected the folder of a bundle or a checkpoint; there is none.")
    return os.path.lexists(path / "manifest.json")


def is_store(path: Path) -> bool:
    """Whether a folder is a calibration store."""
    return os.path.lexists(path / "store.json")
