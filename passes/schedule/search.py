"""The search of one plan: fewest evaluations within a budget, then the least that has to be computed at each of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from ...ir.program import Program
from ...loop.budget import QualityBudget
from ...loop.errors import GateError, UsageError
from ...loop.plan import Plan, guides
from ...loop.ports import BoundProgram
from ..base import Context
from .costs import Costs
from .options import ScheduleOptions
from .outline import Outline, fillable
from .positions import WARPS, Positions, moved, warped, without_one
from .savings import Menu, Savings
from .trials import POLISHED, Candidate, Trials, choice

KEPT_WARPS = 4
"""How many warps the first comparison of all of them leaves for other numbers of evaluations."""

POLISH_REACH = 4.0
"""A fitted plan that misses the budget by more dB than this is not polished; the step gains 1 to 2."""

RIVAL_DB = 0.5
"""Of two sets of positions, the one whose fit is worse by more is not polished: it hardly ever wins."""

SCORE_DB = 1.0
"""How far the score of the few search samples may be wrong about the many."""

RAISES = 3
"""How often the budget of latents is raised where their images miss what was asked for."""

MORE = 3
"""How many evaluations more than the fewest are tried where an evaluation may leave out a part of the network."""

LADDER = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 17, 20, 25, 30, 40, 50, 65, 80, 100)
"""Numbers of evaluations the search tries first."""


class ScheduleSearch:
    """The search for one guidance scale.

    Attributes:
        trials: everything that was tried.
    """

    def __init__(
        self, options: ScheduleOptions, program: Program, bound: BoundProgram, context: Context, scale: float | None
    ):
        """Search with the options of the pass.

        Args:
            options: options of the pass.
            program: its loop and sampler.
            bound: the program on the engine the updates are fitted on.
            context: context of the pass.
            scale: guidance scale, None for a loop without guidance.
        """
        assert program.recurrence is not None
        self.trials = Trials(options, program, bound, context, scale)
        self._options, self._context, self._scale = options, context, scale
        self._calls = program.recurrence.calls
        of_recipe = options.min_psnr if options.evaluations == "auto" else None
        self._asked = of_recipe if context.min_psnr is None else context.min_psnr
        self._budget = self._asked  # of the search itself, which reads latents: raised where their images lack more
        self._refined: dict[int, Positions] = {}
        self._warps = WARPS
        context.progress("searching schedules", 0, 1)

    def run(self) -> Candidate:
        """The plan to ship.

        Raises:
            GateError: no plan meets the budget.
            UsageError: there is neither a budget nor a number of evaluations.
        """
        best, asked = self._search(), self._asked
        if asked is None:
            return best
        for _ in range(RAISES):
            if asked.met_by(self.trials.judged(best)) or not self._meets(best):
                break
            self._budget = asked.of_latents(best.psnr, self.trials.judged(best))
            best = self._search()
        if not asked.met_by(self.trials.judged(best)):
            raise self._missed(asked)
        return best

    def _meets(self, candidate: Candidate) -> bool:
        """Whether a candidate meets the budget of the search."""
        return self._budget is None or self._budget.met_by(candidate.psnr)

    def _search(self) -> Candidate:
        """The plan to take by the samples of the loop; the one that comes nearest where none meets the budget."""
        if self._options.evaluations != "auto":
            return self._best(self._options.evaluations)
        if self._budget is None:
            raise UsageError("schedule: evaluations `auto` needs a budget: set min_psnr or a number of evaluations.")
        fewest = self._fewest(self._budget)
        if not self._meets(fewest):
            return choice(self.trials.tried, self._budget)
        return self._cheaper(fewest, self._budget) or self._best(fewest.plan.evaluations)

    def refit(self, plan: Plan) -> tuple[Candidate, bool]:
        """Fit the updates of a plan again where it evaluates; search only when the budget is missed then.

        Returns:
            The plan to ship, and whether it was searched for.

        Raises:
            GateError: no plan meets the budget.
        """
        outline = Outline.of(plan, guides(self._scale))
        self.trials.polished(outline)
        self.trials.unfitted(outline.positions)
        self.trials.measure(plan, "as it was")
        as_cheap = [one for one in self.trials.tried if one.cheap_like(plan)]
        best = choice(as_cheap, self._budget)
        if self._asked is None or self._asked.met_by(self.trials.judged(best)):
            return best, False
        return self.run(), True

    def _fewest(self, budget: QualityBudget) -> Candidate:
        """The fewest evaluations that meet the budget: bisection over warped grids, then refinement of fewer.

        All of them where no number does.
        """
        rungs = [n for n in LADDER if n < self._calls] + [self._calls]
        low, high = 0, len(rungs) - 1
        best: Candidate | None = None
        middle = min(range(len(rungs)), key=lambda i: abs(rungs[i] - self._calls // 5))
        while low <= high:
            candidate = self.trials.fitted(Outline(self._best_warp(rungs[middle])))
            if budget.met_by(candidate.psnr):
                best, high = candidate, middle - 1
            else:
                low = middle + 1
            middle = (low + high) // 2
        if best is None:
            best = self._best(self._calls)
            if not budget.met_by(best.psnr):
                return best
        while best.plan.evaluations > 1:
            candidate = self._best(best.plan.evaluations - 1, sparing=True)
            if not budget.met_by(candidate.psnr):
                break
            best = candidate
        return self._best(best.plan.evaluations, sparing=True)

    def _missed(self, asked: QualityBudget) -> GateError:
        images = self.trials.images
        nearest = (
            min(images, key=lambda one: asked.shortfall(images[one])) if images else choice(self.trials.tried, asked)
        )
        reached = asked.reached(self.trials.judged(nearest), f" over {self._options.validation} validation samples")
        latents = f", where latents reach {asked.reached(nearest.psnr)}" if images else ""
        wanted = self._options.evaluations
        which = "no schedule" if wanted == "auto" else f"no schedule of {wanted} evaluations"
        return GateError(
            f"schedule: {which} reaches {asked}{' of images' if images else ''}; the best was {reached} with "
            f"{nearest.plan.evaluations} of {self._calls} evaluations{latents}. Lower min_psnr, "
            f"{'' if wanted == 'auto' else 'allow more evaluations, '}or use a recipe of higher precision."
        )

    def _best(self, evaluations: int, sparing: bool = False) -> Candidate:
        """The plan to take of those with so many evaluations and both branches in each.

        Refined positions are fitted and polished; what was tried with so many before, and the unfitted folds, stand
        beside them.

        Args:
            evaluations: number of evaluations.
            sparing: leave the polish out where the budget is met without it or is too far away.
        """
        coarse = self._best_warp(evaluations)
        even = warped(self._calls, evaluations, 1.0, 1.0)
        more = self._refined.get(evaluations + 1, ())
        start = max([coarse, even, *without_one(more)], key=self._score)
        self._refined[evaluations] = self._refine(start)
        outlines = [Outline(positions) for positions in dict.fromkeys((self._refined[evaluations], coarse))]
        fits = {outline: self.trials.fitted(outline) for outline in outlines}
        self._polish(fits, sparing)
        self.trials.unfitted(even)
        same = [one for one in self.trials.tried if one.plan.evaluations == evaluations and not one.thinned]
        return choice(same, self._budget)

    def _polish(self, fits: Mapping[Outline, Candidate], sparing: bool) -> None:
        """Polish the fits that may end in front, the best first.

        A sparing search stops where the budget is met, or so far away that a further polish would not reach it.
        """
        ranked = sorted(fits.items(), key=lambda item: item[1].psnr.mean, reverse=True)
        found, reach = list(fits.values()), POLISH_REACH
        for outline, fit in ranked:
            missing = np.inf if self._budget is None else self._budget.shortfall(choice(found, self._budget).psnr)
            if fit.psnr.mean <= ranked[0][1].psnr.mean - RIVAL_DB or (sparing and not 0 < missing < reach):
                return
            found.append(self.trials.polished(outline))
            reach = RIVAL_DB

    def _cheaper(self, best: Candidate, budget: QualityBudget) -> Candidate | None:
        """The cheapest plan that leaves out branches, and bodies of a cut, where the budget allows it, if any does.

        The fit weighs what remains instead of what is left out. It has to meet the budget alone: only what is shipped
        is polished. Where bodies may be left out, a few evaluations more may cost less.
        """
        found: tuple[Outline, Candidate] | None = None
        N = best.plan.evaluations
        if N > POLISHED:
            return None
        savings = Savings(self.trials.score, self.trials.guided, self._costs, self._menus)
        for evaluations in range(N, min(self._calls, N + (MORE if self._menus else 0)) + 1):
            full = Outline(self._refined.get(evaluations) or self._best_warp(evaluations))
            start = best if evaluations == N else self.trials.fitted(full)
            spare = SCORE_DB - budget.shortfall(start.psnr)
            for outline in reversed(savings.outlines(full, self._score(full.positions) - spare)):
                if savings.cost(outline) >= savings.cost(found[0] if found else Outline(self._refined[N])):
                    break
                fit = self.trials.fitted(outline)
                if budget.met_by(fit.psnr):
                    found = outline, fit
                    break
        return None if found is None else choice([found[1], self.trials.polished(found[0])], budget)

    @cached_property
    def _costs(self) -> Costs:
        return self.trials.costs()

    @cached_property
    def _menus(self) -> list[Menu]:
        """What may fill each slot beside its original."""
        slots = fillable(self.trials.computing)
        return [Menu(slot.name, (*range(1, len(slot.variants)), *self._options.fill)) for slot in slots]

    def _best_warp(self, evaluations: int) -> Positions:
        """The best warped grid; once the grids of all warps were compared, only those of the best are tried.

        Warps that give one grid here are kept together, because they may give several elsewhere; few calls have so few
        grids that nothing is learned about warps.
        """
        grids = {warp: warped(self._calls, evaluations, *warp) for warp in self._warps}
        ranked = sorted(dict.fromkeys(grids.values()), key=self._score, reverse=True)
        if len(ranked) > KEPT_WARPS:
            self._warps = tuple(warp for warp, positions in grids.items() if positions in ranked[:KEPT_WARPS])
        return ranked[0]

    def _refine(self, positions: Positions) -> Positions:
        """Accept random moves that improve the closed loop on the search samples; seeded, so deterministic."""
        moves = self._options.moves
        if len(positions) in (1, self._calls):
            return positions
        generator = np.random.default_rng([self._context.seed, len(positions)])
        for move in range(moves):
            proposal = moved(positions, self._calls, generator)
            if self._score(proposal) > self._score(positions):
                positions = proposal
            self._context.progress(f"searching {len(positions)} evaluations", move + 1, moves)
        return positions

    def _score(self, positions: Positions) -> float:
        """Mean PSNR of the closed-loop fit of guided evaluations on the search samples."""
        return self.trials.score(Outline(positions))
