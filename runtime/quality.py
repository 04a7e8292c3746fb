"""The reported quality of a compiled program: held-out samples against the full loop."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..bundle.manifest import Compared, PsnrEntry, QualityEntry
from ..loop.budget import PsnrFigures, QualityBudget
from ..loop.errors import GateError, UsageError
from ..loop.metrics import sample_psnr
from ..loop.noise import SampleSet
from ..loop.ports import BoundProgram
from .comparison import Comparison, Pictures

if TYPE_CHECKING:
    from ..calibration.trajectories import Trajectories
    from ..ir.program import Program
    from ..passes.base import Context
    from .decoding import Decoding

Array = np.ndarray

HELD_OUT = 64
"""Samples of the reported quality; never used to choose anything."""

SAMPLES_OF_A_PASS = 16
"""Held-out samples behind the PSNR in the record of a pass."""


SHOWN = 10
"""Held-out samples shown in a report."""


@dataclass(frozen=True, eq=False)
class Quality:
    """Figures and the samples behind them.

    Attributes:
        of: what a budget is compared with: images where latents are decoded.
        psnr: its figures.
        latents: figures of the latents behind images; None where nothing is decoded.
        shown: the samples that a report shows.
    """

    of: Compared
    psnr: PsnrFigures
    latents: PsnrFigures | None
    shown: Comparison

    @property
    def entry(self) -> QualityEntry:
        """The figures as the manifest keeps them."""
        latents = None if self.latents is None else _entry(self.latents)
        return QualityEntry(
            psnr_db=_entry(self.psnr), samples=HELD_OUT, set="held-out", of=self.of, latent_psnr_db=latents
        )

    def pictures(self) -> Pictures:
        """The first samples of both and the worst, for a report."""
        return Pictures(
            {"reference": self.shown.reference, "compiled": self.shown.samples}, {"compiled": self.shown.worst}
        )


def measure(
    program: Program, bound: BoundProgram, context: Context, decoding: Decoding | None = None
) -> Quality | None:
    """PSNR of the compiled program's samples against the full loop on held-out samples; None without a loop.

    Args:
        program: program after all passes.
        bound: the program on the engine.
        context: what its passes worked with.
        decoding: what makes images of latents; None where samples are compared as they are.
    """
    if program.loop is None:
        return None
    held_out, kind = _held_out(program, context), program.loop.latent.kind
    samples, reference = _samples(program, bound, held_out), held_out.latents[-1]
    values = sample_psnr(kind)(samples, reference)
    figures = PsnrFigures.of(values)
    if decoding is None:
        return Quality(kind, figures, None, Comparison.of(samples, reference, values, SHOWN))
    images = decoding.compared(samples, reference, SHOWN)
    return Quality("images", PsnrFigures.of(images.psnr), figures, images)


def _entry(psnr: PsnrFigures) -> PsnrEntry:
    return PsnrEntry(**asdict(psnr))


def quality_of_pass(program: Program, bound: BoundProgram, context: Context) -> float:
    """Mean PSNR in dB of a few held-out samples of a loop program as a pass leaves it."""
    from ..calibration.trajectories import first

    assert program.loop is not None
    held_out = first(_held_out(program, context), SAMPLES_OF_A_PASS)
    measure = sample_psnr(program.loop.latent.kind)
    return float(measure(_samples(program, bound, held_out), held_out.latents[-1]).mean())


def _held_out(program: Program, context: Context) -> Trajectories:
    """Noise, conditions and samples of the full loop."""
    from ..calibration.trajectories import trajectories

    return trajectories(
        context.original,
        context.reference(),
        SampleSet("held-out", context.seed, HELD_OUT),
        _scale(program),
        context.cache,
        lambda done, total: context.progress("reference trajectories (held-out)", done, total),
        whole=False,
    )


def _samples(program: Program, bound: BoundProgram, data: Trajectories) -> Array:
    """The samples of a program from the noise of `data`: with its schedule, or every call evaluated."""
    from ..calibration.trajectories import BATCH, slices
    from ..loop.driver import run_loop
    from ..loop.plan import fold

    assert program.loop is not None and program.recurrence is not None
    scale = _scale(program)
    fitted = program.schedule.fitted if program.schedule else {}
    plan = fitted.get(1.0 if scale is None else scale) or fold(program.recurrence, scale)
    return np.concatenate([run_loop(bound, program.loop, piece, plan) for piece in slices(data.request, BATCH)])


def _scale(program: Program) -> float | None:
    assert program.loop is not None
    return program.loop.guidance.scales[0] if program.loop.guidance else None


def check_budget(program: Program, quality: Quality | None, budget: QualityBudget | None) -> None:
    """A budget given by the user holds for a recipe without a schedule too.

    Raises:
        GateError: the held-out quality of a program that was not searched is below the budget.
        UsageError: a budget for a component, which has no samples.
    """
    if budget is None or program.schedule is not None:
        return
    if quality is None:
        raise UsageError("--min-psnr: expected a model with a loop; received a component, which makes no samples.")
    if not budget.met_by(quality.psnr):
        latents = "" if quality.latents is None else f", where latents reach {budget.reached(quality.latents)}"
        raise GateError(
            f"quality: expected {budget}{' of images' if quality.latents else ''}; the best that was reached is "
            f"{budget.reached(quality.psnr)}{latents}. Lower --min-psnr, or use a recipe of higher precision."
        )
