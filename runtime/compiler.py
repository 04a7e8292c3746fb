"""From a checkpoint to a bundle: capture, passes, lowering, quality, report.

The modules that need PyTorch are imported when something is compiled, so `stepfold.runtime` loads without it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends import registry
from ..bundle.cache import Cache, cache_folder
from ..bundle.manifest import Manifest
from ..bundle.writer import check_out, writing
from ..loop.budget import QualityBudget
from ..loop.calls import instance, place, whole
from ..loop.errors import UsageError
from ..loop.pipeline_call import PipelineCall
from .comparison import Pictures
from .quality import check_budget, measure, quality_of_pass
from .workshop import Workshop, workshop

if TYPE_CHECKING:
    from ..calibration.read import Calibration
    from ..ir.program import Program
    from ..passes.base import Context
    from ..passes.recipe import Recipe
    from .decoding import Decoding

logger = logging.getLogger(__name__)

DEFAULT_BACKEND = "onnxruntime"
Progress = Callable[[str, int, int], None]
Finish = Callable[[Path, Manifest, dict[str, Any], Pictures, dict[str, Any]], object]
"""Called with folder, manifest, summary, pictures and the captured model before a bundle takes its place."""

Settings = Sequence[tuple[str, str, Any]]


def compiled_stages() -> Cache:
    """The stages that earlier builds compiled."""
    return Cache(cache_folder() / "stages", "compiled stage")


@dataclass(frozen=True)
class Job:
    """One `stepfold optimize`.

    Attributes:
        checkpoint: folder.
        out: folder of the bundle.
        recipe: name, file or content.
        settings: (pass or backend, option, value) that replace options of the recipe or defaults of the backend.
        backend: engine; None takes the recipe's, or `onnxruntime`.
        loop: a `loop.yaml` that replaces the checkpoint's.
        inputs: example tensors.
        min_psnr: quality budget in dB.
        seed: seed of the three sample sets.
        overwrite: replace a bundle that is there.
        calibration: a store of `stepfold calibrate` for the passes to take statistics from.
        call: arguments of a pipeline's call that replace its defaults.
        proof: whether the captured program of a pipeline is compared with the pipeline's own samples.
    """

    checkpoint: Path
    out: Path
    recipe: str | Path | Mapping[str, Any] = "default"
    settings: Settings = ()
    backend: str | None = None
    loop: Path | None = None
    inputs: Path | None = None
    min_psnr: QualityBudget | None = None
    seed: int = 0
    overwrite: bool = False
    calibration: Path | None = None
    call: PipelineCall | None = None
    proof: bool = True


def optimize(job: Job, progress: Progress, finish: Finish | None = None) -> dict[str, Any]:
    """Compile a checkpoint into a bundle.

    Args:
        job: what to compile, and how.
        progress: called with (task, done, total).
        finish: writes the report into the folder before it takes its place.

    Returns:
        The object of `optimize --json`.

    Raises:
        UsageError: wrong use; nothing was started.
        GateError: the quality budget cannot be met; nothing is left behind.
        StepfoldError: the work failed.
    """
    from ..calibration.read import open_finished
    from ..frontend.inspect import inspect_program
    from ..frontend.load import load_checkpoint
    from ..passes.manager import run_passes
    from .packing import pack, summary
    from .proof import prove, skipped
    from .surroundings import decoding_of, optimize_ends, pack_ends

    start = time.perf_counter()
    check_out(job.out, job.overwrite)
    recipe = _recipe(job)
    steps = recipe.steps()
    engine = registry.get(recipe.backend or DEFAULT_BACKEND if job.backend is None else job.backend).name
    statistics = open_finished(job.calibration) if job.calibration is not None else None
    with workshop(engine, _backend_options(job, engine), compiled_stages()) as shop:
        progress("loading", 0, 1)
        checkpoint = load_checkpoint(job.checkpoint, loop=job.loop, inputs=job.inputs, call=job.call)
        progress("capturing", 0, 1)
        original = checkpoint.capture()
        if statistics is not None:
            statistics.require(original)
        captured = checkpoint.capture_ends()
        proof = prove(checkpoint, original, captured, progress) if job.proof else skipped(checkpoint)
        ends, decoding = None, None
        if captured is not None:
            ends = optimize_ends(captured, steps, lambda end: make_context(end, shop, job.seed, None, progress))
            decoding = decoding_of(captured, ends, shop, progress)
        context = make_context(original, shop, job.seed, job.min_psnr, progress, statistics, decoding)
        program = run_passes(original, steps, context)
        progress("compiling", 0, len(program.stages))
        bound = shop.open(program)
        quality = measure(program, bound, context, decoding)
        check_budget(program, quality, job.min_psnr)
        with writing(job.out, job.overwrite) as folder:
            pipeline = None if ends is None else pack_ends(folder, ends, shop, recipe)
            entry = quality.entry if quality else None
            manifest = pack(folder, program, bound, shop, recipe, entry, job.seed, pipeline, job.call, proof)
            document = summary(job.out, manifest, program, shop, time.perf_counter() - start)
            if finish is not None:
                pictures = quality.pictures() if quality else Pictures()
                finish(folder, manifest, document, pictures, inspect_program(original))
    return document


def _recipe(job: Job) -> Recipe:
    """The recipe of a job with the options of its command line, as the manifest records it.

    Raises:
        UsageError: an unknown pass, option or value, in the recipe or on the command line.
    """
    from ..passes.recipe import load_recipe, override

    loaded = load_recipe(job.recipe)
    loaded.steps()  # a mistake of the file is reported with its line, before the command line replaces options
    settings = [setting for setting in job.settings if not _addresses_backend(setting)]
    if job.min_psnr is not None and any(entry.name == "schedule" for entry in loaded.entries):
        settings.append(("schedule", "min_psnr", job.min_psnr.plain()))
    return override(loaded, settings)


def _backend_options(job: Job, engine: str) -> dict[str, Any]:
    """The options of a job's command line for its engine.

    Raises:
        UsageError: one is for another engine.
    """
    chosen = [setting for setting in job.settings if _addresses_backend(setting)]
    for name, option, _ in chosen:
        if name != engine:
            raise UsageError(
                f"--set {name}.{option}: expected an option of a pass or of {engine!r}, the engine that is built for; "
                f"received one of {name!r}. Give --backend {name}, or leave the option out."
            )
    return {option: value for _, option, value in chosen}


def _addresses_backend(setting: tuple[str, str, Any]) -> bool:
    """Whether a setting is for an engine and not for a pass.

    Raises:
        UsageError: there are both of that name.
    """
    from ..passes.registry import names as passes

    name, option, _ = setting
    found = name in registry.names()
    if found and name in passes():
        raise UsageError(
            f"--set {name}.{option}: expected a pass or a backend; there are both of the name {name!r}. Give the option "
            "in a recipe, or rename one in the package that declares it."
        )
    return found


def make_context(
    original: Program,
    shop: Workshop,
    seed: int,
    min_psnr: QualityBudget | None,
    progress: Progress,
    calibration: Calibration | None = None,
    decoding: Decoding | None = None,
) -> Context:
    """What passes work with."""
    from ..passes.base import Context

    context = Context(
        original=original,
        engine=shop.open,
        reference=original.bind,
        engine_name=shop.backend.name,
        seed=seed,
        cache=cache_folder(),
        min_psnr=min_psnr,
        calibration=calibration,
        decoded=decoding.psnr if decoding else None,
        progress=progress,
        fitted_on="engine" if shop.runs else "reference",
        activations=shop.backend.activations,
    )
    return replace(context, quality=lambda program: quality_of_pass(program, shop.measured(program), context))


def apply(
    program: Program,
    recipe: str | Path | Mapping[str, Any],
    *,
    calibration: Path | str | None = None,
    seed: int = 0,
    backend: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Program, tuple[Any, ...]]:
    """Run a recipe on a program.

    Args:
        program: a captured program.
        recipe: name, file or content.
        calibration: a store of `stepfold calibrate`; without one, passes that need statistics calibrate by themselves.
        seed: seed of the sample sets.
        backend: engine the schedule is fitted on.
        options: options of that engine, see `stepfold backends`.

    Returns:
        The new program and one record for each pass.

    Raises:
        UsageError: an unknown recipe, pass, option or value, or a calibration store of another program.
        GateError: the quality budget cannot be met.
        StepfoldError: a pass broke its contract.
    """
    from ..calibration.read import open_store
    from ..ir.program import Program
    from ..passes.base import silent
    from ..passes.manager import run_passes
    from ..passes.recipe import load_recipe

    instance("program", program, Program, "what stepfold.capture returns")
    seed = whole("seed", seed, 0)
    loaded = load_recipe(recipe)
    statistics = open_store(place("calibration", calibration), program) if calibration is not None else None
    with workshop(
        loaded.backend or DEFAULT_BACKEND if backend is None else backend, options, compiled_stages()
    ) as shop:
        result = run_passes(program, loaded.steps(), make_context(program, shop, seed, None, silent, statistics))
    return result, result.records[len(program.records) :]


def lower(
    program: Program,
    backend: str = DEFAULT_BACKEND,
    *,
    out: Path | str,
    overwrite: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Compile a program into a bundle and return its folder.

    Args:
        program: a captured program, with or without passes applied.
        backend: engine.
        out: folder of the bundle.
        overwrite: replace a bundle that is there.
        options: options of the engine, see `stepfold backends`.

    Raises:
        UsageError: the backend is unknown, lacks an option or cannot build here, or `out` exists.
        StepfoldError: a stage has no form for this engine.
    """
    from ..ir.program import Program
    from ..passes.recipe import Recipe
    from .packing import pack

    instance("program", program, Program, "what stepfold.capture returns")
    path = place("out", out)
    check_out(path, overwrite)
    with workshop(backend, options, compiled_stages()) as shop:
        bound = shop.open(program)
        with writing(path, overwrite) as folder:
            pack(folder, program, bound, shop, Recipe("python", "", {}, ()), None, None)
    return path
