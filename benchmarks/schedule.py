"""PSNR over evaluations on the reference checkpoint in float32: the fitted schedule against classical solvers.

    python benchmarks/schedule.py [--evaluations 13,10,8] [--seed 0]

Every row uses the same held-out samples, which are never used to choose or fit anything. Prints the table of
docs/performance.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from stepfold.bundle.reader import read
from stepfold.calibration.trajectories import slices, trajectories
from stepfold.frontend.load import load_checkpoint
from stepfold.frontend.solvers import solver_recurrence
from stepfold.ir.program import Program
from stepfold.loop.driver import run_loop
from stepfold.loop.metrics import psnr
from stepfold.loop.noise import SampleSet
from stepfold.loop.plan import Plan, fold
from stepfold.loop.solvers import taylorseer_lite
from stepfold.runtime.compiler import Job, cache_folder, optimize
from stepfold.runtime.quality import HELD_OUT

REFERENCE = Path(__file__).resolve().parents[1] / "examples" / "mnist_dit"
FEWEST_OF_A_CACHE = 13
"""Evaluations of a second row of TaylorSeer Lite, beside the 22 that its own settings make of 50."""
SOLVERS = {"Euler": None, "AB2": "ab2", "DPM++ 2M": "DPMSolverMultistepScheduler", "UniPC": "UniPCMultistepScheduler"}


def quality(program: Program, table: Plan, held_out, scale: float) -> np.ndarray:
    """PSNR [B] of the samples a table makes with the unoptimized network."""
    assert program.loop is not None
    bound = program.bind()
    samples = [run_loop(bound, program.loop, piece, table) for piece in slices(held_out.request, 16)]
    return psnr(np.concatenate(samples), held_out.latents[-1])


def fitted_quality(evaluations: int, seed: int) -> float:
    """Held-out PSNR of `passes: [hoist, {schedule: {evaluations: N}}]`."""
    recipe = {"name": "fp32-schedule", "passes": [{"hoist": {}}, {"schedule": {"evaluations": evaluations}}]}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "bundle"
        optimize(Job(REFERENCE, out, recipe=recipe, seed=seed), lambda task, done, total: None)
        found = read(out).manifest.quality
    assert found is not None
    return found.psnr_db.mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evaluations", default="13,10,8")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts = [int(count) for count in options.evaluations.split(",")]
    program = load_checkpoint(REFERENCE).capture()
    assert program.loop is not None and program.loop.guidance is not None
    scale = program.loop.guidance.scales[0]
    samples = SampleSet("held-out", options.seed, HELD_OUT)
    held_out = trajectories(
        program, program.bind(), samples, scale, cache_folder(), lambda done, total: None, whole=False
    )
    print(f"| evaluations | {' | '.join(SOLVERS)} | **fitted schedule** |")
    print("|---" * (len(SOLVERS) + 2) + "|")
    full = solver_recurrence(program.loop.sampler, None, program.loop.sampler.steps)
    for count in counts:
        cells = []
        for name in SOLVERS.values():
            recurrence = solver_recurrence(program.loop.sampler, name, count)
            cells.append(f"{quality(program, fold(recurrence, scale), held_out, scale).mean():.1f}")
        print(f"| {count} | {' | '.join(cells)} | **{fitted_quality(count, options.seed):.1f}** |", flush=True)
    for count in (None, FEWEST_OF_A_CACHE):
        calls = taylorseer_lite(full.calls, count)
        found = quality(program, fold(full, scale, calls, order=1), held_out, scale)
        print(
            f"\nTaylorSeer Lite, {len(calls)} evaluations: {found.mean():.1f} dB (worst {found.min():.1f}).", flush=True
        )


if __name__ == "__main__":
    main()
