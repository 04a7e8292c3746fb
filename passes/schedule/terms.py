"""What an update weighs: the latent, the newest guided outputs, guidance directions and bounded predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...loop.driver import LoopRun
from ...loop.forms import guided
from ...loop.plan import Plan, Update
from ...loop.recurrence import Array


@dataclass(frozen=True)
class Terms:
    """What an update may weigh beside the latent.

    Attributes:
        outputs: number of the newest guided outputs.
        directions: number of the newest guidance directions (c - u).
        predictions: number of the newest bounded predictions.
    """

    outputs: int = 3
    directions: int = 0
    predictions: int = 0

    @property
    def reach(self) -> int:
        """How many evaluations back a term may lie."""
        return max(self.outputs, self.directions, self.predictions)


@dataclass(frozen=True)
class Term:
    """One value an update weighs: the latent, or the guided output, direction or prediction of evaluation j."""

    kind: str
    evaluation: int = -1

    def value(self, run: LoopRun, plan: Plan) -> Array:
        """The value [B, *latent] where a run along a plan stands."""
        if self.kind == "latent":
            return run.latent
        if self.kind == "prediction":
            return run.predictions[self.evaluation]
        c, u = run.history[self.evaluation]
        if self.kind == "direction":
            assert u is not None
            return c - u
        return guided(c, u, float(plan.scales[self.evaluation]))


def basis(k: int, guided: Array, terms: Terms) -> list[Term]:
    """The terms of update k, the latent first.

    Args:
        k: evaluation the update follows.
        guided: [N] whether both branches are evaluated.
        terms: how many of each kind.
    """
    chosen = [Term("latent")]
    chosen += [Term("output", j) for j in range(k, max(-1, k - terms.outputs), -1)]
    recent = [j for j in range(k, -1, -1) if guided[j]]
    missing = 0 if guided[k] else 1  # an unguided output needs a direction from an earlier evaluation
    chosen += [Term("direction", j) for j in recent[: max(terms.directions, missing)]]
    chosen += [Term("prediction", j) for j in range(k, max(-1, k - terms.predictions), -1)]
    return chosen


def forget(run: LoopRun, k: int, guided: Array, terms: Terms) -> None:
    """Drop the outputs that no update after update k can weigh.

    Where only some evaluations are guided, a direction of any age may still be needed, and nothing is dropped.
    """
    if guided.all() or not guided.any():
        run.forget(k - terms.reach)


def update_of(chosen: Sequence[Term], weights: Array, plan: Plan) -> Update:
    """The weights of terms as those of an update of a plan, which weighs the two branches."""
    state, N = 0.0, plan.evaluations
    conditional, unconditional, predicted = np.zeros(N), np.zeros(N), np.zeros(N)
    for term, weight in zip(chosen, weights, strict=True):
        if term.kind == "latent":
            state = float(weight)
        elif term.kind == "direction":
            conditional[term.evaluation] += weight
            unconditional[term.evaluation] -= weight
        elif term.kind == "prediction":
            predicted[term.evaluation] += weight
        else:
            factor = plan.scales[term.evaluation] if plan.guided[term.evaluation] else 1.0
            conditional[term.evaluation] += factor * weight
            unconditional[term.evaluation] += (1.0 - factor) * weight
    return Update(state, conditional, unconditional, predicted if plan.prediction is not None else None)


def prior_weights(chosen: Sequence[Term], prior: Plan, k: int) -> Array:
    """Update k of an unfitted plan in these terms: its weights of guided outputs, and of predictions."""
    update = prior.update(k)
    by_kind = {"output": update.conditional + update.unconditional, "prediction": update.predicted}  # at any scale
    fixed = {"latent": update.state, "direction": 0.0}
    return np.asarray([fixed[t.kind] if t.kind in fixed else by_kind[t.kind][t.evaluation] for t in chosen])
