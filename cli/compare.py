"""`stepfold compare`: reports of `bench` side by side, with an optional gate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ..loop.errors import UsageError
from .console import console, print_json, table
from .options import Json

if TYPE_CHECKING:
    from ..report.compare import ComparedRow, Comparison

GATE = 3  # exit code of a failed gate


def compare(
    reports: Annotated[
        list[Path], typer.Argument(metavar="REPORT REPORT...", help="report.json files or their folders; base first.")
    ],
    max_slowdown: Annotated[
        float | None,
        typer.Option("--max-slowdown", metavar="PCT", help="Fail when a bundle is slower than the base by more."),
    ] = None,
    max_psnr_drop: Annotated[
        float | None,
        typer.Option("--max-psnr-drop", metavar="DB", help="Fail when a bundle's mean PSNR falls by more."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.html", help="Page to write.")] = None,
    as_json: Json = False,
) -> None:
    """Compare reports with the first of them; rows are matched by name, or as the only bundles.

    Ends with exit code 3 when a limit is exceeded.

    $ stepfold compare before/report.json after/report.json --max-slowdown 5 --max-psnr-drop 0.2
    """
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out: expected a file that ends in .html; received {out}.")
    from ..report.compare import compare as run

    comparison = run(reports, max_slowdown, max_psnr_drop)
    if out is not None:
        _write_page(out, comparison)
    if as_json:
        print_json(comparison.document())
    else:
        print_comparison(comparison)
    if comparison.gate == "failed":
        raise typer.Exit(GATE)
