"""Plan: what the driver follows. Sampler x guidance x schedule, collapsed into N evaluations and their updates.

With c_j and u_j the conditional and unconditional outputs of evaluation j,

    x[k+1] = state_k x[k] + sum_{j<=k} conditional_kj c_j + unconditional_kj u_j + predicted_kj f_j + sum_d noise_kd n_d

with the draws of noise n_d of a stochastic sampler, which are given with the request, before its first evaluation, and
the bounded predictions f_j of a sampler that clips (see `forms`).
A step that the schedule skips has no row: it is part of the update between its two neighbours. At each evaluation a
computing slot of the program is filled by one of its variants, or by a weighted sum of its own earlier outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .forms import Prediction
from .recurrence import PREDICTION, Array, Recurrence, below, of_calls, of_draws, one_number

LARGEST_WEIGHT = 1e30  # a product with it is still a float32 number
REUSED = -1
"""In the place of a variant's number: the slot repeats its own earlier outputs."""
CELLS = "cells"


@dataclass(frozen=True, eq=False)
class Cell:
    """What fills one computing slot at each of N evaluations.

    Attributes:
        variant: [N] number of the variant, `REUSED` where earlier outputs of the slot take its place.
        weights: [N, N] weights of the outputs of earlier evaluations, zero where the slot is computed, and of
            evaluations at which it was reused itself.
    """

    variant: Array
    weights: Array

    def __post_init__(self) -> None:
        N = len(self.variant)
        if self.variant.shape != (N,) or self.variant.dtype.kind != "i" or (self.variant < REUSED).any():
            raise ValueError(f"a cell of {N} evaluations needs [{N}] numbers of variants, {REUSED} where it is reused")
        if self.weights.shape != (N, N) or np.triu(self.weights).any():
            raise ValueError(f"a cell of {N} evaluations weighs earlier outputs only, by [{N}, {N}] below the diagonal")
        if not (np.abs(self.weights) <= LARGEST_WEIGHT).all():  # also NaN
            raise ValueError(f"weights of a cell must be finite, at most {LARGEST_WEIGHT:g}")
        reused = self.reused
        if self.weights[~reused].any() or self.weights[:, reused].any():
            raise ValueError("a cell weighs computed outputs where it is reused, and nothing elsewhere")
        if not self.weights[reused].any(axis=1).all():
            raise ValueError("a cell that is reused needs an earlier output")

    @property
    def reused(self) -> Array:
        """[N] whether earlier outputs take the place of a computation."""
        return self.variant == REUSED

    def last_reader(self, j: int) -> int:
        """The last evaluation that reads the outputs of evaluation j; j where none does."""
        return int(np.nonzero(self.weights[:, j])[0].max(initial=j))

    def arrays(self) -> dict[str, Array]:
        """The cell as named arrays."""
        return {"variant": self.variant.astype(np.int64), "weights": self.weights.astype(np.float64)}


@dataclass(frozen=True, eq=False)
class Update:
    """The weights of one update of a plan of N evaluations.

    Attributes:
        state: weight of the latent.
        conditional: [N] weights of the conditional outputs.
        unconditional: [N] weights of the unconditional outputs.
        predicted: [N] weights of the bounded predictions; None where nothing is bounded.
    """

    state: float
    conditional: Array
    unconditional: Array
    predicted: Array | None = None

    def plus(self, other: Update) -> Update:
        """The sum of two updates of one plan."""
        predicted = None if self.predicted is None or other.predicted is None else self.predicted + other.predicted
        return Update(
            self.state + other.state,
            self.conditional + other.conditional,
            self.unconditional + other.unconditional,
            predicted,
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """The loop a bundle runs: N evaluations, what fills the slots at each, and one linear update after it.

    Attributes:
        positions: [N] grid call of each evaluation, ascending from 0.
        timesteps: [N] the value the denoiser receives.
        input_scale: [N] multiplies the latent before it enters the denoiser.
        guided: [N] whether both guidance branches are evaluated; where False only the conditional one runs.
        state: [N] weight of the latent in the update.
        conditional: [N, N] lower triangular weights of the conditional outputs.
        unconditional: [N, N] lower triangular weights of the unconditional outputs; zero columns where not guided.
        initial_scale: multiplies the standard normal noise.
        landings: [N] grid call at which the latent stands after the update; S after the last.
        cells: computing slots by name; a slot without a cell is filled by the variant of the grid call.
        noise: [N, D] weights of the draws of noise; [N, 0] for a deterministic sampler.
        prediction: bounded samples that the updates weigh too; None for a sampler that bounds nothing.
        scales: [N] guidance scale of each evaluation, for the forms that need the guided output itself; 1 without.
    """

    positions: Array
    timesteps: Array
    input_scale: Array
    guided: Array
    state: Array
    conditional: Array
    unconditional: Array
    initial_scale: float
    landings: Array
    cells: Mapping[str, Cell] = field(default_factory=dict)
    noise: Array = field(default_factory=lambda: np.zeros((0, 0)))
    prediction: Prediction | None = None
    scales: Array = field(default_factory=lambda: np.ones(0))

    def __post_init__(self) -> None:
        N = len(self.positions)
        object.__setattr__(self, "noise", of_draws(self.noise, N))
        object.__setattr__(self, "scales", of_calls(self.scales, N))
        for name in ("timesteps", "input_scale", "guided", "state", "landings"):
            if getattr(self, name).shape != (N,):
                raise ValueError(f"{name} of a plan of {N} evaluations must be [{N}]")
        for name in ("conditional", "unconditional"):
            weights = getattr(self, name)
            if weights.shape != (N, N) or not np.allclose(weights, np.tril(weights)):
                raise ValueError(f"{name} of a plan of {N} evaluations must be lower triangular [{N}, {N}]")
        if self.prediction is not None and len(self.prediction.latent) != N:
            raise ValueError(f"a plan of {N} evaluations has predictions of {len(self.prediction.latent)}")
        for name, weights in self._weights().items():
            if not (np.abs(weights) <= LARGEST_WEIGHT).all():  # also NaN
                raise ValueError(f"{name} weights of a plan must be finite, at most {LARGEST_WEIGHT:g}")
        if self.unconditional[:, ~self.guided].any():
            raise ValueError("an unguided evaluation has no unconditional output to weigh")
        for name, cell in self.cells.items():
            if len(cell.variant) != N:
                raise ValueError(f"the cell of slot {name!r} must be of {N} evaluations; it is of {len(cell.variant)}")
            if cell.weights[np.ix_(self.guided, ~self.guided)].any():
                raise ValueError(f"slot {name!r}: a guided evaluation reuses outputs of both branches")

    @property
    def evaluations(self) -> int:
        """N, the number of denoiser evaluations."""
        return len(self.positions)

    @property
    def draws(self) -> int:
        """D, how many draws of noise the updates weigh."""
        return self.noise.shape[1]

    @property
    def guided_evaluations(self) -> int:
        """How many evaluations run both branches."""
        return int(self.guided.sum())

    def update(self, k: int) -> Update:
        """The weights of the update after evaluation k."""
        predicted = None if self.prediction is None else self.prediction.weights[k]
        return Update(float(self.state[k]), self.conditional[k], self.unconditional[k], predicted)

    def with_updates(self, updates: Sequence[Update]) -> Plan:
        """The plan with other weights, those of the noise left as they are."""
        predicted = [one.predicted for one in updates if one.predicted is not None]
        return replace(
            self,
            state=np.asarray([one.state for one in updates]),
            conditional=np.stack([one.conditional for one in updates]),
            unconditional=np.stack([one.unconditional for one in updates]),
            prediction=replace(self.prediction, weights=np.stack(predicted)) if self.prediction is not None else None,
        )

    def same_as(self, other: Plan) -> bool:
        """Whether two plans are equal, number by number."""
        mine, theirs = self.arrays(), other.arrays()
        return mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in mine)

    def last_reader(self, j: int) -> int:
        """The last update that reads the outputs of evaluation j; the ring may drop them afterwards."""
        columns = [self.conditional[:, j], self.unconditional[:, j]]
        if self.prediction is not None:
            columns.append(self.prediction.weights[:, j])
        return int(np.nonzero(np.any(columns, axis=0))[0].max(initial=j))

    def arrays(self) -> dict[str, Array]:
        """The plan as named arrays, for `tables.safetensors`."""
        predicted = {} if self.prediction is None else self.prediction.arrays()
        return {
            "positions": self.positions.astype(np.int64),
            "timesteps": self.timesteps.astype(np.float64),
            "input_scale": self.input_scale.astype(np.float64),
            "guided": self.guided.astype(np.uint8),
            "state": self.state.astype(np.float64),
            "conditional": self.conditional.astype(np.float64),
            "unconditional": self.unconditional.astype(np.float64),
            "initial_scale": np.asarray([self.initial_scale], np.float64),
            "landings": self.landings.astype(np.int64),
            **({"noise": self.noise.astype(np.float64)} if self.draws else {}),
            **({"scales": self.scales.astype(np.float64)} if (self.scales != 1.0).any() else {}),
            **{f"{PREDICTION}/{name}": value for name, value in predicted.items()},
            **{
                f"{CELLS}/{name}/{key}": array
                for name, cell in self.cells.items()
                for key, array in cell.arrays().items()
            },
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Plan:
        """Rebuild a plan from `arrays()`."""
        return cls(
            positions=arrays["positions"],
            timesteps=arrays["timesteps"],
            input_scale=arrays["input_scale"],
            guided=arrays["guided"].astype(bool),
            state=arrays["state"],
            conditional=arrays["conditional"],
            unconditional=arrays["unconditional"],
            initial_scale=one_number(arrays["initial_scale"]),
            landings=arrays["landings"],
            cells=_cells(arrays),
            noise=arrays.get("noise", np.zeros((0, 0))),
            prediction=Prediction.from_arrays(below(PREDICTION, arrays)),
            scales=arrays.get("scales", np.ones(0)),
        )

    def _weights(self) -> dict[str, Array]:
        weights = {name: getattr(self, name) for name in ("state", "conditional", "unconditional", "noise")}
        return weights if self.prediction is None else weights | {"predicted": self.prediction.weights}


def _cells(arrays: Mapping[str, Array]) -> dict[str, Cell]:
    """The cells of `Plan.arrays()`; a slot's name may hold slashes."""
    names = {key.split("/", 1)[1].rpartition("/")[0] for key in arrays if key.startswith(f"{CELLS}/")}
    return {name: Cell(arrays[f"{CELLS}/{name}/variant"], arrays[f"{CELLS}/{name}/weights"]) for name in sorted(names)}


def guides(scale: float | None) -> bool:
    """Whether a guidance scale asks for the unconditional branch: above 1, as in every pipeline."""
    return scale is not None and scale > 1.0


def fold(
    recurrence: Recurrence,
    scale: float | None = None,
    positions: Sequence[int] | None = None,
    order: int = 0,
) -> Plan:
    """Fold a sampler, a guidance scale and a set of evaluated calls into a plan.

    An output that is skipped is forecast from the `order + 1` newest evaluated outputs by the polynomial through
    them in the call index (order 0: reuse); near the start fewer are used. Exact, because everything is linear.

    Args:
        recurrence: the sampler over S calls.
        scale: guidance scale, one branch where it is at most 1; None for a denoiser without guidance.
        positions: calls to evaluate, ascending, beginning with 0; None evaluates all.
        order: order of the forecast of skipped outputs.

    Raises:
        ValueError: positions are not ascending calls that begin with 0, or the order is negative.
    """
    S = recurrence.calls
    if order < 0:
        raise ValueError(f"the order of a forecast must be 0 (reuse) or more; received {order}")
    chosen = np.arange(S) if positions is None else np.asarray(positions, np.int64)
    if len(chosen) == 0 or chosen[0] != 0 or (np.diff(chosen) <= 0).any() or chosen[-1] >= S:
        raise ValueError(f"positions must ascend from 0 and stay below {S}; received {list(chosen)}")
    N = len(chosen)
    forecasts = np.stack([_forecast(i, chosen, order) for i in range(S)])  # [S, N]: v_i ~ forecasts_i . evaluated
    ends = np.append(chosen[1:], S)
    bounded = recurrence.prediction
    state, outputs, noise, predicted = np.ones(N), np.zeros((N, N)), np.zeros((N, recurrence.draws)), np.zeros((N, N))
    for k, (start, end) in enumerate(zip(chosen, ends, strict=True)):
        for i in range(start, end):
            state[k] *= recurrence.state[i]
            outputs[k] = recurrence.state[i] * outputs[k] + recurrence.outputs[i] @ forecasts
            noise[k] = recurrence.state[i] * noise[k] + recurrence.noise[i]
            if bounded is not None:
                predicted[k] = recurrence.state[i] * predicted[k] + bounded.weights[i] @ forecasts
    prediction = None
    if bounded is not None:
        prediction = Prediction(bounded.latent[chosen], bounded.output[chosen], predicted, bounded.bound)
    plan = with_guidance(recurrence, scale, chosen, state, outputs)
    return replace(plan, noise=noise, prediction=prediction)


def with_guidance(recurrence: Recurrence, scale: float | None, positions: Array, state: Array, outputs: Array) -> Plan:
    """Build the plan whose update weighs *guided* outputs `v = u + scale (c - u)` by `outputs` [N, N]."""
    scales = recurrence.scales(scale if guides(scale) else None)[positions]
    return Plan(
        positions=positions,
        timesteps=recurrence.timesteps[positions],
        input_scale=recurrence.input_scale[positions],
        guided=scales > 1.0,
        state=state,
        conditional=scales * outputs,
        unconditional=(1.0 - scales) * outputs,
        initial_scale=recurrence.initial_scale,
        landings=np.append(positions[1:], recurrence.calls),
        scales=scales,
    )


def _forecast(call: int, positions: Array, order: int) -> Array:
    """Weights [N] that express the output of `call` in the outputs evaluated up to it (Lagrange in the index)."""
    weights = np.zeros(len(positions))
    newest = int(np.searchsorted(positions, call, side="right")) - 1
    anchors = range(max(0, newest - order), newest + 1)
    for j in anchors:
        others = [m for m in anchors if m != j]
        weights[j] = np.prod([(call - positions[m]) / (positions[j] - positions[m]) for m in others])
    return weights
