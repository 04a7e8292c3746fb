"""`stepfold bench`: latency and quality of bundles beside baselines."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..loop.errors import UsageError
from ..loop.writing import require_writable
from .console import console, print_json, table, working
from .options import MOST_SAMPLES, AllowNative, Json, ReferenceCheckpoint, Seed


def bench(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Bundles of one model.")],
    reference: ReferenceCheckpoint = None,
    baselines: Annotated[
        str | None,
        typer.Option(
            "--baselines",
            metavar="LIST",
            help="With commas, each NAME\\[@STEPS][:solver]: eager, compile, onnxruntime, onnxruntime-int8, openvino, "
            "openvino-bf16, openvino-int8. They run the checkpoint of --reference.",
        ),
    ] = None,
    count: Annotated[
        int, typer.Option("--count", min=1, max=MOST_SAMPLES, metavar="N", help="Samples of one timed call.")
    ] = 1,
    quality_count: Annotated[
        int,
        typer.Option(
            "--quality-count", min=1, max=MOST_SAMPLES, metavar="N", help="Samples that quality is measured over."
        ),
    ] = 64,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, max=MOST_SAMPLES, metavar="N", help="Timed calls of each row.")
    ] = 10,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for report.json and report.html.")
    ] = None,
    allow_native: AllowNative = False,
    as_json: Json = False,
) -> None:
    """Measure bundles beside baselines: latency in turns, quality against the full loop, size and memory.

    $ stepfold bench out/mnist --reference examples/mnist_dit --count 10 --baselines eager,onnxruntime@13:ab2
    """
    from ..report.bench import bench as run
    from ..runtime.compiler import cache_folder

    if out is not None:
        if os.path.exists(out) and not os.path.isdir(out):
            raise UsageError(f"--out: expected a folder; received the file {out}.")
        require_writable("--out", out / "report.json")
    names = [name.strip() for name in (baselines or "").split(",") if name.strip()]
    with working() as progress:
        report = run(
            bundles,
            reference=reference,
            baselines=names,
            count=count,
            quality_count=quality_count,
            repeats=repeats,
            seed=seed,
            out=out,
            progress=progress,
            cache=cache_folder(),
            allow_native=allow_native,
        )
    if as_json:
        print_json(report.document())
    else:
        print_report(report.document(), out)


def print_report(document: Mapping[str, Any], out: Path | None) -> None:
    """Print the report of `bench` as a table."""
    screen = console()
    protocol, rows = document["protocol"], document["rows"]
    columns = ("row", *(name for name, _ in FIGURES))
    cells = [(row["name"], *(show(row) for _, show in FIGURES)) for row in rows]
    title = (
        f"Latency of {protocol['count']} samples ({protocol['repeats']} calls in turns, {protocol['threads']} threads), "
        f"quality over {protocol['quality_count']}"
    )
    screen.print(table(title, columns, cells, columns[1:]))
    for entry in document["skipped"]:
        screen.print(escape(f"skipped {entry['name']}: {entry['reason']}"), soft_wrap=True)
    if out is not None:
        page = out / "report.html"  # written where the extra `report` is installed
        written = page if page.is_file() else out / "report.json"
        screen.print(f"Report: {written}", markup=False, soft_wrap=True)


def _number(path: str, form: str) -> Callable[[Mapping[str, Any]], str]:
    """A function that shows the figure at a dotted path of a row, or a dash."""

    def show(row: Mapping[str, Any]) -> str:
        value: Any = row
        for key in path.split("."):
            value = None if value is None else value.get(key)
        return "-" if value is None else form.format(value)

    return show


FIGURES = (
    ("median ms", _number("latency_ms.median", "{:.1f}")),
    ("p10", _number("latency_ms.p10", "{:.1f}")),
    ("p90", _number("latency_ms.p90", "{:.1f}")),
    ("speedup", _number("speedup", "{:.1f}x")),
    ("evaluations", _number("evaluations", "{}")),
    ("PSNR dB", _number("psnr_db.mean", "{:.2f}")),
    ("5th percentile", _number("psnr_db.p05", "{:.2f}")),
    ("worst dB", _number("psnr_db.min", "{:.2f}")),
    ("SSIM", _number("ssim", "{:.4f}")),
    ("drift", _number("drift", "{:.1e}")),
    ("bytes", _number("size_bytes", "{:,}")),
    ("peak bytes", _number("peak_memory_bytes", "{:,}")),
)
"""Columns of the table: heading, and how a row shows it."""
