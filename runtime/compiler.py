"""From a checkpoint to a bundle: capture, passes, lowering, quality, report.

The modules that need PyTorch are imported when something is compiled, so `stepfold.runtime` loads without it.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends.registry import Backend, get
from ..bundle.manifest import QualityEntry
from ..bundle.writer import check_out, writing
from ..loop.errors import GateError, UsageError
from ..loop.metrics import lower_bound, psnr
from ..loop.noise import SampleSet
from ..loop.ports import BoundProgram, BoundStage

if TYPE_CHECKING:
    from ..calibration.trajectories import Trajectories
    from ..ir.program import Program, Stage
    from ..passes.base import Context
    from ..passes.recipe import Recipe

logger = logging.getLogger(__name__)

HELD_OUT = 64
"""Samples of the reported quality; never used to choose anything."""

Progress = Callable[[str, int, int], None]
Settings = Sequence[tuple[str, str, Any]]


def cache_folder() -> Path:
    """Where reference trajectories are kept: `$STEPFOLD_CACHE`, or `stepfold` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepfold"
    return Path(os.environ.get("STEPFOLD_CACHE") or default)


@dataclass(frozen=True)
class Job:
    """One `stepfold optimize`.

    Attributes:
        checkpoint: folder.
        out: folder of the bundle.
        recipe: name, file or content.
        settings: (pass, option, value) that replace options of the recipe.
        backend: engine; None takes the recipe's, or `onnxruntime`.
        loop: a `loop.yaml` that replaces the checkpoint's.
        inputs: example tensors.
        min_psnr: quality budget in dB.
        seed: of the three sample sets.
        overwrite: replace a bundle that is there.
    """

    checkpoint: Path
    out: Path
    recipe: str | Path | Mapping[str, Any] = "default"
    settings: Settings = ()
    backend: str | None = None
    loop: Path | None = None
    inputs: Path | None = None
    min_psnr: float | None = None
    seed: int = 0
    overwrite: bool = False


@dataclass
class Workshop:
    """Compiles stages into a folder, each once, and opens them.

    A stage is immutable, so its identity is the key: the bundle takes the artifacts the schedule was fitted on.
    """

    backend: Backend
    folder: Path
    _built: dict[int, tuple[Stage, list[Path]]] = field(default_factory=dict)

    def build(self, stage: Stage) -> list[Path]:
        """The files of a compiled stage, the engine file first."""
        if id(stage) not in self._built:
            target = self.folder / f"{len(self._built)}"
            target.mkdir()
            main = self.backend.module("lower").lower(stage, target)
            others = [path for path in sorted(target.iterdir()) if path != main]
            self._built[id(stage)] = (stage, [main, *others])
        return self._built[id(stage)][1]

    def open(self, program: Program) -> BoundProgram:
        """The program on the engine."""
        stages = []
        for stage in program.stages:
            call = self.backend.open_session(self.build(stage)[0], stage.inputs, stage.outputs)
            stages.append(BoundStage(stage.name, stage.rate, stage.inputs, stage.outputs, call))
        return BoundProgram(program.inputs, program.outputs, tuple(stages), program.tables)


@contextmanager
def workshop(backend: str) -> Iterator[Workshop]:
    """A workshop in a temporary folder.

    Raises:
        UsageError: the backend is unknown or cannot build here.
    """
    engine = get(backend)
    capability = engine.capability()
    if not capability.can_build:
        raise UsageError(f"backend {backend!r} cannot build here: {capability.reason} Install: {capability.install}")
    with tempfile.TemporaryDirectory(prefix="stepfold-") as folder:
        yield Workshop(engine, Path(folder))


def optimize(job: Job, progress: Progress) -> dict[str, Any]:
    """Compile a checkpoint into a bundle.

    Returns:
        The object of `optimize --json`.

    Raises:
        UsageError: wrong use; nothing was started.
        GateError: the quality budget cannot be met; nothing is left behind.
        StepfoldError: the work failed.
    """
    from ..frontend.load import load_checkpoint
    from ..passes.manager import run_passes
    from .packing import pack, summary

    start = time.perf_counter()
    check_out(job.out, job.overwrite)
    recipe = _recipe(job)
    steps = recipe.steps()
    with workshop(job.backend or recipe.backend or "onnxruntime") as shop:
        progress("loading", 0, 1)
        checkpoint = load_checkpoint(job.checkpoint, loop=job.loop, inputs=job.inputs)
        progress("capturing", 0, 1)
        original = checkpoint.capture()
        context = make_context(original, shop, job.seed, job.min_psnr, progress)
        program = run_passes(original, steps, context)
        progress("compiling", 0, len(program.stages))
        bound = shop.open(program)
        quality = measure(program, bound, context)
        check_budget(program, quality, job.min_psnr)
        with writing(job.out, job.overwrite) as folder:
            manifest = pack(folder, program, bound, shop, recipe, quality, job.seed)
    return summary(job.out, manifest, program, time.perf_counter() - start)


def _recipe(job: Job) -> Recipe:
    """The recipe of a job with the options of its command line, as the manifest records it.

    Raises:
        UsageError: an unknown pass, option or value, in the recipe or on the command line.
    """
    from ..passes.recipe import load_recipe, override

    loaded = load_recipe(job.recipe)
    loaded.steps()  # a mistake of the file is reported with its line, before the command line replaces options
    settings = list(job.settings)
    if job.min_psnr is not None and any(entry.name == "schedule" for entry in loaded.entries):
        settings.append(("schedule", "min_psnr", job.min_psnr))
    return override(loaded, settings)


def make_context(original: Program, shop: Workshop, seed: int, min_psnr: float | None, progress: Progress) -> Context:
    """What passes work with."""
    from ..passes.base import Context

    return Context(
        original=original,
        engine=shop.open,
        reference=original.bind,
        engine_name=shop.backend.name,
        seed=seed,
        cache=cache_folder(),
        min_psnr=min_psnr,
        progress=progress,
    )


def measure(program: Program, bound: BoundProgram, context: Context) -> QualityEntry | None:
    """PSNR of the compiled program's samples against the full loop on held-out samples; None without a loop."""
    from ..calibration.trajectories import slices, trajectories
    from ..loop.driver import run_loop
    from ..loop.table import fold

    if program.loop is None or program.recurrence is None:
        return None
    scale = program.loop.guidance.scales[0] if program.loop.guidance else None
    held_out: Trajectories = trajectories(
        context.original,
        context.reference(),
        SampleSet("held-out", context.seed, HELD_OUT),
        scale,
        context.cache,
        lambda done, total: context.progress("reference trajectories (held-out)", done, total),
        whole=False,
    )
    fitted = program.schedule.fitted if program.schedule else {}
    table = fitted.get(1.0 if scale is None else scale) or fold(program.recurrence, scale)
    samples = [run_loop(bound, program.loop, piece, table) for piece in slices(held_out.request, 16)]
    values = psnr(np.concatenate(samples), held_out.latents[-1])
    figures = {"mean": float(values.mean()), "min": float(values.min()), "low": lower_bound(values)}
    return QualityEntry.model_validate({"psnr_db": figures, "samples": HELD_OUT, "set": "held-out"})


def check_budget(program: Program, quality: QualityEntry | None, min_psnr: float | None) -> None:
    """A budget given by the user holds for a recipe without a schedule too.

    Raises:
        GateError: the held-out quality of a program that was not searched is below the budget.
        UsageError: a budget for a component, which has no samples.
    """
    if min_psnr is None or program.schedule is not None:
        return
    if quality is None:
        raise UsageError("--min-psnr: expected a model with a loop; received a component, which makes no samples.")
    if quality.psnr_db.low < min_psnr:
        raise GateError(
            f"quality: expected {min_psnr:g} dB; the best that was reached is {quality.psnr_db.low:.2f} dB (lower "
            "95 % bound of the mean). Lower --min-psnr, or use a recipe of higher precision."
        )


def apply(
    program: Program,
    recipe: str | Path | Mapping[str, Any],
    *,
    calibration: Path | None = None,
    seed: int = 0,
    backend: str | None = None,
) -> tuple[Program, tuple[Any, ...]]:
    """Run a recipe on a program.

    Args:
        program: a captured program.
        recipe: name, file or content.
        calibration: a store of statistics; None, because passes calibrate by themselves so far.
        seed: of the sample sets.
        backend: engine the schedule is fitted on.

    Returns:
        The new program and one record for each pass.

    Raises:
        UsageError: an unknown recipe, pass, option or value, or a calibration store.
        GateError: the quality budget cannot be met.
        StepfoldError: a pass broke its contract.
    """
    from ..passes.base import silent
    from ..passes.manager import run_passes
    from ..passes.recipe import load_recipe

    if calibration is not None:
        raise UsageError(
            f"apply: expected no calibration store; received {calibration}. Passes of this version calibrate by "
            "themselves: leave it out."
        )
    loaded = load_recipe(recipe)
    with workshop(backend or loaded.backend or "onnxruntime") as shop:
        result = run_passes(program, loaded.steps(), make_context(program, shop, seed, None, silent))
    return result, result.records[len(program.records) :]


def lower(program: Program, backend: str = "onnxruntime", *, out: Path | str, overwrite: bool = False) -> Path:
    """Compile a program into a bundle and return its folder.

    Args:
        program: a captured program, with or without passes applied.
        backend: engine.
        out: folder of the bundle.
        overwrite: replace a bundle that is there.

    Raises:
        UsageError: the backend is unknown or cannot build here, or `out` exists.
        StepfoldError: a stage has no form for this engine.
    """
    from ..passes.recipe import Recipe
    from .packing import pack

    path = Path(out)
    check_out(path, overwrite)
    with workshop(backend) as shop:
        bound = shop.open(program)
        with writing(path, overwrite) as folder:
            pack(folder, program, bound, shop, Recipe("python", "", {}, ()), None, None)
    return path
