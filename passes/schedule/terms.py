"""What an update weighs: the latent, the newest guided outputs, the newest guidance directions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...loop.driver import LoopRun
from ...loop.plan import Plan
from ...loop.recurrence import Array


@dataclass(frozen=True)
class Terms:
    """What an update may weigh beside the latent: the newest guided outputs and guidance directions (c - u)."""

    outputs: int = 3
    directions: int = 0

    @property
    def reach(self) -> int:
        """How many evaluations back a term may lie."""
        return max(self.outputs, self.directions)


@dataclass(frozen=True)
class Term:
    """One value an update weighs: the latent, the guided output of evaluation j, or its guidance direction."""

    kind: str
    evaluation: int = -1

    def value(self, run: LoopRun, scale: float | None) -> Array:
        """The value [B, *latent] where a run stands."""
        if self.kind == "latent":
            return run.latent
        c, u = run.history[self.evaluation]
        if self.kind == "direction":
            assert u is not None
            return c - u
        return c if u is None or scale is None else u + np.float32(scale) * (c - u)


@dataclass(frozen=True)
class Row:
    """The weights of one update: state, conditional [N] and unconditional [N]."""

    state: float
    conditional: Array
    unconditional: Array


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
    return chosen


def forget(run: LoopRun, k: int, guided: Array, terms: Terms) -> None:
    """Drop the outputs that no update after update k can weigh.

    Where only some evaluations are guided, a direction of any age may still be needed, and nothing is dropped.
    """
    if guided.all() or not guided.any():
        run.forget(k - terms.reach)


def row(chosen: list[Term], weights: Array, guided: Array, scale: float | None) -> Row:
    """Weights of terms as weights of the two branches."""
    state, conditional, unconditional = 0.0, np.zeros(len(guided)), np.zeros(len(guided))
    for term, weight in zip(chosen, weights, strict=True):
        if term.kind == "latent":
            state = float(weight)
        elif term.kind == "direction":
            conditional[term.evaluation] += weight
            unconditional[term.evaluation] -= weight
        else:
            factor = scale if scale is not None and guided[term.evaluation] else 1.0
            conditional[term.evaluation] += factor * weight
            unconditional[term.evaluation] += (1.0 - factor) * weight
    return Row(state, conditional, unconditional)


def prior_weights(chosen: list[Term], prior: Plan, k: int) -> Array:
    """Update k of an unfitted plan in these terms: its weights of guided outputs."""
    outputs = prior.conditional[k] + prior.unconditional[k]  # of the guided outputs, at any scale, 0 included
    values = {"latent": prior.state[k], "direction": 0.0}
    return np.asarray([outputs[t.evaluation] if t.kind == "output" else values[t.kind] for t in chosen])
