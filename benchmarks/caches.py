"""Bodies of a cut filled from earlier outputs against fewer evaluations, on the reference checkpoint.

    python benchmarks/caches.py [--bodies 1,-2] [--int8] [--evaluations 9,12] [--budgets 35,40]

Each row is a plan whose updates are fitted on ONNX Runtime; PSNR is of 64 held-out samples, milliseconds are those that the
search counts with: each slot measured alone, one sample. Prints the table of docs/passes/schedule.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import stepfold
from stepfold.calibration.trajectories import trajectories
from stepfold.frontend.load import load_checkpoint
from stepfold.ir.program import Program
from stepfold.loop.errors import GateError
from stepfold.loop.metrics import psnr
from stepfold.loop.noise import SampleSet
from stepfold.loop.plan import REUSED, Plan
from stepfold.loop.ports import BoundProgram
from stepfold.passes.base import Context
from stepfold.passes.schedule.fit import Fitter
from stepfold.passes.schedule.methods import METHODS
from stepfold.passes.schedule.options import ScheduleOptions
from stepfold.passes.schedule.outline import Fill, Outline
from stepfold.passes.schedule.positions import WARPS, warped
from stepfold.passes.schedule.search import ScheduleSearch
from stepfold.runtime.compiler import cache_folder
from stepfold.runtime.quality import HELD_OUT
from stepfold.runtime.workshop import workshop

REFERENCE = Path(__file__).resolve().parents[1] / "examples" / "mnist_dit"
BODY = "step.body"


class Bench:
    """One compiled program, its samples, and what its evaluations cost."""

    def __init__(self, original: Program, program: Program, bound: BoundProgram, seed: int):
        assert original.loop is not None and original.loop.guidance is not None and original.recurrence is not None
        self.program, self.bound = program, bound
        self.scale = original.loop.guidance.scales[0]
        self.calls = original.recurrence.calls
        self.context = Context(original, lambda _: bound, original.bind, "onnxruntime", seed, cache_folder())
        self.trials = self.search().trials
        self.costs = self.trials.costs()
        samples = SampleSet("held-out", seed, HELD_OUT)
        self.held_out = trajectories(
            original, original.bind(), samples, self.scale, cache_folder(), lambda done, total: None, whole=False
        )
        self.fitter = Fitter(bound, original.loop, original.recurrence, self.scale, self.held_out)

    def search(self, **options: Any) -> ScheduleSearch:
        return ScheduleSearch(
            ScheduleOptions.model_validate(options), self.program, self.bound, self.context, self.scale
        )

    def row(self, name: str, plan: Plan) -> str:
        values = psnr(self.fitter.samples(plan), self.held_out.latents[-1])
        cells = [cell.variant != REUSED for cell in plan.cells.values()] or [np.ones(plan.evaluations, bool)]
        computed = [int((cell * (1 + plan.guided)).sum()) for cell in cells]
        seconds = self.costs.of(Outline.of(plan, True), plan.guided)
        return (
            f"| {name} | {plan.evaluations} | {int((1 + plan.guided).sum())} | {', '.join(map(str, computed))} | "
            f"{1000 * seconds:.0f} | {values.mean():.1f} | {np.percentile(values, 5):.1f} |"
        )

    def best(self, evaluations: int) -> tuple[int, ...]:
        """The warped grid with the best score."""
        grids = dict.fromkeys(warped(self.calls, evaluations, *warp) for warp in WARPS)
        return max(grids, key=lambda positions: self.trials.score(Outline(positions)))

    def by_hand(self, evaluations: int) -> Iterator[str]:
        """Everything computed, and every second body filled by each method."""
        positions = self.best(evaluations)
        yield self.row("all computed", self.trials.fitted(Outline(positions)).plan)
        for method in METHODS:
            fills = frozenset(Fill(BODY, one, method) for one in positions[2::2])
            plan = self.trials.fitted(Outline(positions, fills=fills)).plan
            yield self.row(f"every second body, {method}", plan)

    def searched(self, budget: float) -> Iterator[str]:
        """What the search takes with bodies on its menu, and without."""
        for name, fill in (("searched, bodies computed", ()), ("searched, bodies filled", ("fitted",))):
            try:
                plan = self.search(min_psnr=budget, fill=fill).run().plan
            except GateError as error:
                yield f"| {name}, {budget:g} dB: {error} |"
            else:
                yield self.row(f"{name}, {budget:g} dB", plan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bodies", default="1,-2")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--evaluations", default="9,12")
    parser.add_argument("--budgets", default="35,40")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    body = [int(one) for one in options.bodies.split(",")]
    int8 = [{"quantize": {"scheme": "int8", "smooth": 0.7, "rounding": "auto"}}] if options.int8 else []
    original = load_checkpoint(REFERENCE).capture()
    recipe = {"name": "cut", "passes": [{"hoist": {}}, {"cut": {"bodies": [body]}}, *int8, {"fuse": {}}]}
    program, _ = stepfold.apply(original, recipe)
    with workshop("onnxruntime") as shop:
        report(Bench(original, program, shop.open(program), options.seed), options)


def report(bench: Bench, options: argparse.Namespace) -> None:
    """Print the table."""
    print("| plan | evaluations | branches | bodies | ms | held-out dB | 5th percentile |\n|" + "---|" * 7)
    for count in (int(one) for one in options.evaluations.split(",") if one):
        for row in bench.by_hand(count):
            print(row, flush=True)
    for budget in (float(one) for one in options.budgets.split(",") if one):
        for row in bench.searched(budget):
            print(row, flush=True)


if __name__ == "__main__":
    main()
