"""`stepfold compare`: reports of `bench` side by side, with an optional gate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ..loop.errors import UsageError
from ..loop.writing import require_writable
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
    if out is not None:
        if os.path.isdir(out):
            raise UsageError(f"--out: expected a file; received the folder {out}.")
        require_writable("--out", out)
    from ..report.compare import compare as run

    comparison = run(reports, max_slowdown, max_psnr_drop)
    if out is not None:
        _write_page(out, comparison, reports)
    if as_json:
        print_json(comparison.document())
    else:
        print_comparison(comparison)
    if comparison.gate == "failed":
        raise typer.Exit(GATE)


def print_comparison(comparison: Comparison) -> None:
    """Print a comparison: a row each, what had no counterpart, and the gate."""
    screen = console()
    columns = ("report", "row", "against", "latency", "95 % interval", "PSNR", "size")
    screen.print(table("Against the base", columns, [_cells(row) for row in comparison.rows], columns[3:]))
    for name in comparison.unmatched:
        screen.print(escape(f"not in the base: {name}"), soft_wrap=True)
    for failure in comparison.failures:
        screen.print(f"[red]failed:[/] {escape(failure)}", soft_wrap=True)
    if comparison.gate is not None:
        screen.print(f"Gate: {comparison.gate}")


def _cells(row: ComparedRow) -> tuple[str, ...]:
    low, high = row.latency_ratio_ci
    return (
        row.report,
        row.name,
        row.base_name,
        f"{row.latency_ratio:.3f}x",
        f"{low:.3f} to {high:.3f}",
        "-" if row.psnr_change_db is None else f"{row.psnr_change_db:+.2f} dB",
        "-" if row.size_ratio is None else f"{row.size_ratio:.2f}x",
    )


def _write_page(out: Path, comparison: Comparison, reports: Sequence[Path]) -> None:
    from ..report.page import comparison_page, write_page
    from ..report.records import read_report

    title = " and ".join(str(path) for path in reports)
    write_page(out, comparison_page(title, comparison, {str(path): read_report(path) for path in reports}))
