"""The page a person reads: one HTML file that loads nothing from anywhere.

`bench` writes it beside its report, `optimize` into the bundle, `compare` on request. Every section is left out when
there is nothing to say: a component has no loop, a bench without a reference no quality.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from ..bundle.files import AGAIN, MANIFEST
from ..bundle.reader import MANIFEST_FILE
from ..loop.errors import BundleError, UsageError
from ..loop.reading import Expected, read_json
from ..loop.spec import describe
from ..runtime.comparison import Pictures
from . import charts, images, prose
from .compare import Comparison
from .records import Report, write_text

logger = logging.getLogger(__name__)

Array = np.ndarray
PAGE = "report.html"
SCHEDULE = "schedule.json"
SCHEDULE_FILE = Expected("the JSON of a schedule", BundleError, AGAIN)
NEEDS = ("jinja2", "plotly")
COLUMNS = (  # of the table, where any row has the figure
    ("speedup", "speedup"),
    ("evaluations", "evaluations"),
    ("psnr_db", "PSNR"),
    ("ssim", "SSIM"),
    ("drift", "drift"),
)
SHOWN_REFUSALS = 12  # of one pass; the manifest has all


def missing_packages() -> str | None:
    """What to install before a page can be written, or None."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    return f"the page needs {' and '.join(missing)}: pip install 'stepfold[report]'" if missing else None


def describe_bundle(folder: Path, summary: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the page says about a bundle: its manifest, with `name` and the content of `schedule.json`.

    Args:
        folder: folder of the bundle, finished or in the making.
        summary: the object of `optimize --json`, which knows the FLOPs of each stage.
    """
    described = read_json(folder / MANIFEST, MANIFEST_FILE)
    schedule = folder / SCHEDULE
    described["name"] = folder.resolve().name
    described["schedule_file"] = read_json(schedule, SCHEDULE_FILE) if schedule.is_file() else None
    flops = {stage["name"]: stage["flops"] for stage in summary["stages"]} if summary is not None else {}
    described["stages"] = [{**stage, "flops": flops.get(stage["name"])} for stage in described["stages"]]
    return described


def build_page(
    title: str,
    report: Mapping[str, Any] | None,
    manifests: Sequence[Mapping[str, Any]],
    pictures: Pictures | None = None,
    model: Mapping[str, Any] | None = None,
) -> str:
    """The page of a bench, or of one `optimize` (no report).

    Args:
        title: title of the page.
        report: the object of `bench --json`.
        manifests: manifests of bundles, best as `describe_bundle` gives them.
        pictures: samples of rows, which are drawn where they are images [B, C, H, W] in [-1, 1].
        model: the checkpoint as `inspect --json` tells it, for its rates and sites.

    Raises:
        UsageError: the extra `report` is not installed.
    """
    parsed = None if report is None else Report.model_validate(report)
    return _render(
        "page.html.j2",
        title=title,
        report=parsed,
        headlines=prose.headlines(parsed) if parsed else [_bundle_headline(manifest) for manifest in manifests],
        latency=charts.latency_bars(parsed.rows) if parsed else None,
        quality=charts.quality_over_cost(parsed.rows) if parsed else None,
        bundles=[_bundle(manifest) for manifest in manifests],
        pictures=_pictures(pictures or Pictures(), parsed),
        exact=prose.EXACT_DB,
        columns=_columns(parsed),
        model=model,
    )


def comparison_page(title: str, comparison: Comparison, reports: Mapping[str, Report]) -> str:
    """The page of a comparison: ratios, and the plots of every report.

    Args:
        title: title of the page.
        comparison: what `compare` found.
        reports: file as it was given -> report, the base first.

    Raises:
        UsageError: the extra `report` is not installed.
    """
    plots = [
        {
            "name": name,
            "latency": charts.latency_bars(report.rows),
            "quality": charts.quality_over_cost(report.rows),
            "machine": report.machine,
        }
        for name, report in reports.items()
    ]
    return _render("compare.html.j2", title=title, comparison=comparison, plots=plots, base=next(iter(reports), ""))


def write_page(path: Path, html: str) -> None:
    """Write a page in one step."""
    write_text(path, html)


def _render(template: str, **values: Any) -> str:
    missing = missing_packages()
    if missing is not None:
        raise UsageError(missing)
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("stepfold.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("milliseconds", "seconds", "size", "quantity", "decibels", "drift", "times"):
        environment.filters[name] = getattr(prose, name)
    return environment.get_template(template).render(plotly=charts.plotly_script(), **values)


def _columns(report: Report | None) -> list[tuple[str, str]]:
    """Key and heading of the figures that at least one row has."""
    rows = report.rows if report is not None else ()
    return [(key, heading) for key, heading in COLUMNS if any(getattr(row, key) is not None for row in rows)]


def _pictures(pictures: Pictures, report: Report | None) -> list[dict[str, Any]]:
    """Name, figures and PNG of the first samples of each row, the reference first, and of its worst sample."""
    rows = {row.name: row for row in report.rows} if report else {}
    first = pictures.first
    names = [name for name in sorted(first, key=lambda name: name != "reference") if images.is_image(first[name])]
    drawn = [(name, first[name], pictures.worst.get(name)) for name in names]
    return [
        {
            "name": name,
            "uri": images.data_uri(samples),
            "worst": None if worst is None else images.data_uri(worst),
            "row": rows.get(name),
        }
        for name, samples, worst in drawn
    ]


def _bundle(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The sections about one bundle."""
    loop = manifest.get("loop")
    return {
        "name": manifest.get("name", manifest["model"]["class"]),
        "manifest": manifest,
        "passes": _passes(manifest.get("passes", [])),
        "stages": _stages(manifest),
        "schedules": _schedules(manifest),
        "tried": _tried(manifest),
        "loop": loop,
        "recipe": _recipe_name(manifest.get("recipe")),
        "proof": prose.proof_words(manifest["proof"]) if manifest.get("proof") else None,
    }


def _passes(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for entry, cost in zip(entries, prose.pass_costs(entries), strict=True):
        refused = list(entry.get("refused", []))
        more = max(0, len(refused) - SHOWN_REFUSALS)
        found.append({"psnr_db": None, **entry, "cost_db": cost, "refused": refused[:SHOWN_REFUSALS], "more": more})
    return found


def _stages(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Stages with the bytes of their files, external data included."""
    files = manifest.get("files", {})
    found = []
    for stage in manifest.get("stages", []):
        stem = stage["file"].rsplit(".", 1)[0]
        own = [entry["bytes"] for name, entry in files.items() if name.startswith(f"{stem}.")]
        found.append({"flops": None, **stage, "bytes": sum(own)})
    return found


def _schedules(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each fitted scale, which calls of the grid are evaluated."""
    content = manifest.get("schedule_file")
    if not content:
        return []
    return [{**scale, "grid_steps": content["grid_steps"]} for scale in content.get("scales", [])]


class _Point(BaseModel):
    """A candidate of the schedule search, as far as it is drawn."""

    origin: str
    evaluations: int = Field(ge=0, lt=1 << 31)
    validation_psnr_db: FiniteFloat


class _Search(BaseModel):
    """What the details of a pass say about its search; they are free, so whoever reads them checks them."""

    tried: list[_Point]
    chosen: _Point | None = None


def _tried(manifest: Mapping[str, Any]) -> list[dict[str, str]]:
    """A plot for each scale the schedule search recorded its candidates of."""
    found = []
    for entry in manifest.get("passes", []):
        for scale, search in (entry.get("details") or {}).items():
            if isinstance(search, Mapping) and search.get("tried"):
                try:
                    checked = _Search.model_validate(search).model_dump()
                except ValidationError as error:
                    logger.warning("what the search of scale %s tried is not shown: %s", scale, describe(error))
                    continue
                found.append({"scale": scale, "plot": charts.tried_schedules(checked["tried"], checked["chosen"])})
    return found


def _recipe_name(recipe: Any) -> str:
    return str(recipe.get("name", "")) if isinstance(recipe, Mapping) else str(recipe or "")


def _bundle_headline(manifest: Mapping[str, Any]) -> str:
    name, schedule = manifest.get("name", manifest["model"]["class"]), manifest.get("schedule")
    text = f"{name} is {manifest['model']['class']} compiled for {manifest['backend']['name']}"
    if schedule:
        text += f"; it evaluates the denoiser {schedule['evaluations']} times for a loop of {schedule['grid_steps']}"
    quality = manifest.get("quality")
    if quality:
        psnr, latents = quality["psnr_db"], quality.get("latent_psnr_db")
        behind = "" if latents is None else f", with a latent PSNR of {prose.decibels(latents['mean'])}"
        text += (
            f"; its {'images' if quality.get('of') == 'images' else 'samples'} are {prose.decibels(psnr['mean'])} from those "
            f"of the full loop ({prose.tail(psnr)}, over {quality['samples']} {quality['set']} samples){behind}"
        )
    return text + "."
