"""Fit the schedule of a bundle again, with the outputs of the engine of this machine.

An engine may round differently from one machine to the next, and a bundle built where its engine could not run was
fitted on the PyTorch reference. The stages stay as they are, with the weights they share and what surrounds the loop;
tables, schedule and manifest are written anew, the report of the old schedule is left out.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from ..backends.registry import get
from ..bundle.bind import other_branch
from ..bundle.files import AGAIN
from ..bundle.manifest import Manifest, QualityEntry, ScheduleEntry
from ..bundle.tables import TABLES, Tables
from ..bundle.writer import SCHEDULE, write_manifest, write_schedule, write_tables, writing
from ..loop.budget import QualityBudget
from ..loop.errors import BundleError, UsageError
from ..loop.options import option_problem
from ..loop.plan import Plan
from .compiler import Progress, cache_folder
from .decoding import Decoding
from .engine import UNGUIDED, Engine, load
from .packing import plain
from .quality import measure

if TYPE_CHECKING:
    from ..ir.program import Program, Schedule
    from ..passes.base import Context
    from ..passes.schedule.options import ScheduleOptions


REPORT = ("report.json", "report.html")
"""What `optimize` said of the schedule that is replaced."""


@dataclass(frozen=True)
class Refitted:
    """New tables for the declared guidance scales, and whether positions had to be searched again."""

    schedule: Schedule
    searched: bool


def refit(
    bundle: Path, checkpoint: Path, min_psnr: QualityBudget | None, progress: Progress, *, allow_native: bool = False
) -> dict[str, Any]:
    """Fit the schedule of a bundle again and write it back in one step.

    The evaluated calls of each plan are kept while the budget is met, because fitting them again takes seconds and a
    search minutes. When it is not met, positions are searched as `optimize` does. The budget is that of the recipe; a
    recipe that gives the number of evaluations has none. `min_psnr` gives one in both cases.

    Args:
        bundle: folder of the bundle.
        checkpoint: the checkpoint it was made from.
        min_psnr: quality budget in dB, None for that of the recipe.
        progress: called with (task, done, total).
        allow_native: whether native code that was not built here by this user may be opened.

    Returns:
        The object of `refit --json`.

    Raises:
        UsageError: the bundle has no fitted schedule, or the checkpoint is another model.
        BundleError: the bundle is damaged.
        GateError: no schedule meets the budget; the bundle is as it was.
    """
    start = time.perf_counter()
    progress("loading", 0, 1)
    engine = load(bundle, allow_native=allow_native)
    options = _options(engine, min_psnr)
    original = _original(engine, checkpoint)
    decoding = _decoding(engine, progress)
    context = _context(original, engine, min_psnr, progress, decoding)
    refitted = _fit(engine, original, options, context)
    quality = measure(replace(original, schedule=refitted.schedule), engine.program, context, decoding)
    manifest = _manifest(engine.manifest, options, refitted, quality.entry if quality else None)
    _write(bundle, engine, manifest, refitted.schedule)
    return {
        "bundle": str(bundle),
        "schedule": _dumped(manifest.schedule),
        "quality": _dumped(manifest.quality),
        "searched": refitted.searched,
        "before": {"schedule": _dumped(engine.manifest.schedule), "quality": _dumped(engine.manifest.quality)},
        "seconds": time.perf_counter() - start,
    }


def _options(engine: Engine, min_psnr: QualityBudget | None) -> ScheduleOptions:
    """The options of the `schedule` pass the bundle was built with; a budget replaces a number of evaluations."""
    from ..passes.schedule.options import ScheduleOptions

    manifest = engine.manifest
    recipe = manifest.recipe if isinstance(manifest.recipe, dict) else {}
    listed = recipe.get("passes")
    passes = listed if isinstance(listed, list) else []
    found = [entry["schedule"] for entry in passes if isinstance(entry, dict) and "schedule" in entry]
    scales = manifest.loop.guidance.scales if manifest.loop is not None and manifest.loop.guidance else (UNGUIDED,)
    if manifest.schedule is None or not found or not set(scales) <= set(engine.tables.fitted):
        raise UsageError(
            f"{engine.bundle.path}: expected a bundle with a fitted schedule; its recipe has no `schedule`, so every call of the "
            "loop is evaluated. Build it with one: stepfold optimize --recipe default"
        )
    try:
        options = ScheduleOptions.model_validate(found[-1])
    except ValidationError as error:
        problem = option_problem(ScheduleOptions, "pass", error)
        raise BundleError(f"{engine.bundle.path}: recipe: pass schedule: {problem} {AGAIN}") from None
    return options if min_psnr is None else options.model_copy(update={"evaluations": "auto", "min_psnr": min_psnr})


def _original(engine: Engine, checkpoint: Path) -> Program:
    """The captured checkpoint with the loop, the sampler and the example conditions of both branches of the bundle.

    Raises:
        UsageError: it is another model.
    """
    import torch

    from ..frontend.load import load_checkpoint

    with tempfile.TemporaryDirectory(prefix="stepfold-") as folder:
        loop, inputs = _calling(engine, Path(folder))
        loaded = load_checkpoint(checkpoint, loop=loop, inputs=inputs)
    expected, received = engine.manifest.model.weights_sha256, loaded.weights_sha256
    if received != expected:
        raise UsageError(
            f"--reference {checkpoint}: expected the checkpoint the bundle was made from, with weights "
            f"{expected[:12]}...; received {received[:12]}... of class {loaded.class_name}."
        )
    unconditional = {name: torch.from_numpy(value) for name, value in other_branch(engine.bundle).items()}
    return replace(loaded.capture(), recurrence=engine.tables.recurrence, unconditional=unconditional)


def _calling(engine: Engine, folder: Path) -> tuple[Path, Path]:
    """Write down how the bundle's model is called, as `optimize --loop --inputs` takes it."""
    from safetensors.numpy import save_file

    assert engine.loop is not None
    loop, inputs = folder / "loop.yaml", folder / "inputs.safetensors"
    loop.write_text(yaml.safe_dump(engine.loop.model_dump(mode="json")), encoding="utf-8")
    probe = engine.bundle.probe()
    recorded = {**(probe.inputs if probe is not None else {}), **engine.tables.constants}
    wanted = [name for name, spec in engine.loop.inputs.items() if spec.role in ("condition", "constant")]
    save_file({name: value for name, value in recorded.items() if name.partition(".")[0] in wanted}, inputs)
    return loop, inputs


def _decoding(engine: Engine, progress: Progress) -> Decoding | None:
    """The decoder of the bundle for both sides: it stays as it is, and its error is none of the schedule's."""
    decoder = engine.decoder
    if decoder is None:
        return None
    return Decoding(lambda: decoder, lambda: decoder, lambda done, total: progress("decoding", done, total))


def _context(
    original: Program, engine: Engine, min_psnr: QualityBudget | None, progress: Progress, decoding: Decoding | None
) -> Context:
    from ..passes.base import Context

    seed = engine.manifest.seeds.get("seed", 0)
    return Context(
        original=original,
        engine=lambda program: engine.program,
        reference=original.bind,
        engine_name=engine.manifest.backend.name,
        seed=seed if isinstance(seed, int) else 0,
        cache=cache_folder(),
        min_psnr=min_psnr,
        decoded=decoding.psnr if decoding else None,
        progress=progress,
    )


def _fit(engine: Engine, original: Program, options: ScheduleOptions, context: Context) -> Refitted:
    from ..ir.program import Schedule
    from ..passes.schedule.search import ScheduleSearch

    guidance = original.loop.guidance if original.loop is not None else None
    tables: dict[float, Plan] = {}
    details, searched = {}, False
    for scale in guidance.scales if guidance is not None else (None,):
        key = UNGUIDED if scale is None else scale
        search = ScheduleSearch(options, original, engine.program, context, scale)
        chosen, again = search.refit(engine.tables.fitted[key])
        tables[key] = chosen.plan
        details[str(scale)] = search.trials.record(chosen)
        searched = searched or again
    return Refitted(Schedule(tables, "engine", details), searched)


def _manifest(
    manifest: Manifest, options: ScheduleOptions, refitted: Refitted, quality: QualityEntry | None
) -> Manifest:
    """The manifest with what the new fit changes: schedule, quality, its record, and the engine it was fitted on."""
    assert manifest.schedule is not None and isinstance(manifest.recipe, dict)
    plan = next(iter(refitted.schedule.fitted.values()))
    schedule = ScheduleEntry(
        grid_steps=manifest.schedule.grid_steps,
        evaluations=plan.evaluations,
        guided_evaluations=plan.guided_evaluations,
        fitted_on="engine",
    )
    details = plain(refitted.schedule.details)
    passes = tuple(
        entry.model_copy(update={"details": details}) if entry.name == "schedule" else entry
        for entry in manifest.passes
    )
    version = get(manifest.backend.name).capability().version or manifest.backend.version
    backend = manifest.backend.model_copy(update={"version": version})
    recipe = {**manifest.recipe, "passes": [_updated(entry, options) for entry in manifest.recipe["passes"]]}  # type: ignore[union-attr]
    changes = {"schedule": schedule, "quality": quality, "passes": passes, "backend": backend, "recipe": recipe}
    return manifest.model_copy(update=changes)


def _updated(entry: Any, options: ScheduleOptions) -> Any:
    """A pass of the recipe; `schedule` with the options that were used, so that the next fit has the same budget."""
    if not (isinstance(entry, dict) and "schedule" in entry):
        return entry
    used = options.model_dump(mode="json", include={*entry["schedule"], "evaluations", "min_psnr"})
    return {**entry, "schedule": used}


def _write(bundle: Path, engine: Engine, manifest: Manifest, schedule: Schedule) -> None:
    """Replace the bundle by one with the same stages; those are linked where the file system can."""
    tables = Tables(engine.tables.recurrence, schedule.fitted, engine.tables.values, engine.tables.constants)
    kept = {name: entry for name, entry in engine.manifest.files.items() if name not in (TABLES, SCHEDULE, *REPORT)}
    with writing(bundle, overwrite=True) as folder:
        for name in kept:
            _link(engine.bundle.file(name), folder / name)
        write_tables(folder, tables)
        write_schedule(folder, tables, schedule.fitted_on, plain(schedule.details))
        write_manifest(folder, manifest, kept)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _dumped(entry: ScheduleEntry | QualityEntry | None) -> dict[str, Any] | None:
    return None if entry is None else entry.model_dump(mode="json")
