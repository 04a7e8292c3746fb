"""`stepfold refit`: fit a bundle's schedule again on this machine's engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..loop.writing import require_writable
from .console import console, print_json, working
from .optimize import quality_line, schedule_line
from .options import AllowNative, Json, MinPsnr, quality_budget


def refit(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that `stepfold optimize` wrote.")],
    reference: Annotated[
        Path, typer.Option("--reference", metavar="CHECKPOINT", help="Checkpoint that the bundle was made from.")
    ],
    min_psnr: MinPsnr = None,
    allow_native: AllowNative = False,
    as_json: Json = False,
) -> None:
    """Fit the schedule of a bundle again, with the outputs of the engine of this machine.

    The evaluated calls stay as they are while the quality budget is met; otherwise they are searched again. Ends with
    exit code 3, and leaves the bundle as it was, when no schedule meets the budget.

    $ stepfold refit out/mnist --reference examples/mnist_dit
    """
    budget = quality_budget(min_psnr)
    if os.path.isdir(bundle):
        require_writable("BUNDLE", bundle.resolve())
    from ..runtime.refit import refit as run

    with working() as progress:
        document = run(bundle, reference, budget, progress, allow_native=allow_native)
    if as_json:
        print_json(document)
    else:
        _print(document)


def _print(document: Mapping[str, Any]) -> None:
    screen = console()
    for title, state in (("Before", document["before"]), ("Now", document)):
        for line in (schedule_line(state["schedule"]), quality_line(state["quality"])):
            screen.print(escape(f"{title}: {line}"), soft_wrap=True)
    how = "searched again" if document["searched"] else "kept"
    screen.print(f"The evaluated calls were {how}.")
    screen.print(f"Bundle: {document['bundle']} ({document['seconds']:.0f} s)", markup=False, soft_wrap=True)
