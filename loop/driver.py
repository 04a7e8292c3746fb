"""The one driver: fills the slots of a program at their rates, along a plan.

PyTorch references and engine sessions are both callables from named arrays to arrays, so verification, calibration,
search and deployment share this loop. All state belongs to one `LoopRun`, so nothing leaks between requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import numpy as np

from .forms import guided, rescaled_branches
from .plan import REUSED, Plan, Update
from .ports import BoundProgram, BoundSlot, BoundStage, Port, Rate, repeat_row
from .recurrence import as_timesteps
from .spec import LoopSpec

Array = np.ndarray
OnStep = Callable[[int, int], None]

PREPARED_BYTES = 64 << 20
"""What one batch of a stage of rate once×timestep reads and writes at most; a row of any size is one batch."""


@dataclass(frozen=True)
class Request:
    """What one call of the loop works on.

    Attributes:
        noise: [B, *latent] float32, standard normal; for a loop that draws noise on its way [B, 1 + D, *latent], the
            start first and the D draws after it.
        conditions: name -> [B, ...] of the conditional branch.
        unconditional: name -> [B, ...] of the other branch, or None without guidance.
    """

    noise: Array
    conditions: Mapping[str, Array]
    unconditional: Mapping[str, Array] | None

    @cached_property
    def branches(self) -> dict[str, Array]:
        """Name -> [2 B, ...]: conditional rows first, unconditional rows after them; [B, ...] without guidance.

        So an unguided evaluation takes the first B.
        """
        if self.unconditional is None:
            return dict(self.conditions)
        return {name: np.concatenate([value, self.unconditional[name]]) for name, value in self.conditions.items()}

    @cached_property
    def distinct(self) -> tuple[dict[str, Array], Array]:
        """The R distinct rows of `branches`, and for each of the rows which of them it is.

        Found once for a request, because a search runs the same request for every schedule that it tries.
        """
        return _distinct_rows(self.branches)


@dataclass
class _History:
    """Outputs of a slot that a later evaluation reads: evaluation -> one [rows, ...] for each output."""

    kept: dict[int, Sequence[Array]] = field(default_factory=dict)

    def weighted(self, weights: Array, rows: int) -> list[Array]:
        """The sums of kept outputs, by weights [N]; an evaluation without guidance takes the conditional rows."""
        (first, *others) = [j for j in self.kept if weights[j]]
        sums = [np.float32(weights[first]) * value[:rows] for value in self.kept[first]]
        for j in others:
            for total, value in zip(sums, self.kept[j], strict=True):
                total += np.float32(weights[j]) * value[:rows]
        return sums

    def keep(self, wanted: Callable[[int], bool]) -> None:
        """Drop the outputs of evaluations that are not wanted any more."""
        self.kept = {j: outputs for j, outputs in self.kept.items() if wanted(j)}


class LoopRun:
    """One request on its way from noise to samples.

    `evaluate` computes the outputs of one evaluation, `update` applies one linear update. The schedule search
    calls them one at a time, because it solves for the update after it has seen the outputs.
    """

    def __init__(self, program: BoundProgram, loop: LoopSpec, request: Request, plan: Plan, keep: int = 0):
        """Start at the scaled noise and compute everything whose rate is below `step`.

        Args:
            program: the callables.
            loop: names of the inputs by role.
            request: B samples.
            plan: positions, timesteps, input scales, branches and cells of the evaluations; the weights of its updates
                are not read.
            keep: how many of the newest outputs of a slot are kept whether or not the plan reads them, with guidance and
                without; a fit chooses their weights later.

        Raises:
            ValueError: the plan has guided evaluations and the request no unconditional conditions, or the plan weighs
                more draws of noise than the loop has.
        """
        self._program, self._loop, self._plan, self._keep = program, loop, plan, keep
        self.batch = len(request.noise)
        self.history: dict[int, tuple[Array, Array | None]] = {}
        self.predictions: dict[int, Array] = {}
        if plan.guided.any() and request.unconditional is None:
            raise ValueError("the plan has guided evaluations, so the request needs unconditional conditions")
        if plan.draws > loop.draws:
            raise ValueError(f"the plan weighs {plan.draws} draws of noise, and the loop has {loop.draws}")
        noise = request.noise if loop.draws else request.noise[:, None]  # [B, 1 + draws, *latent]
        start, self._draws = noise[:, 0], noise[:, 1 : 1 + plan.draws]
        self.latent = start * np.float32(plan.initial_scale)
        self._times = as_timesteps(plan.timesteps, self._timestep_dtype())  # [N]
        self._conditions = request.branches
        self._rows, self._inverse = request.distinct
        self._computing = program.computing
        self._slots = {slot.name: _History() for slot in self._computing if slot.name in plan.cells}
        self._fixed: dict[str, Array] = {}  # rate once: [R, ...]
        self._by_call: dict[str, Array] = {}  # rate once×timestep: [N, R, ...]
        self._tables = {name: table[plan.positions] for name, table in program.tables.items()}  # [N, ...]
        self._prepare()

    def evaluate(self, k: int) -> tuple[Array, Array | None]:
        """Outputs of evaluation k: the conditional [B, ...] and the unconditional [B, ...] or None.

        The history keeps them as the updates weigh them, behind the forms of the loop.
        """
        rows = self._rows_at(k)
        values = self._step_values(k, rows)
        for slot in self._computing:
            self._fill(slot, k, values, rows)
        prediction = values[self._program.outputs[0]]
        result = (prediction[: self.batch], prediction[self.batch :] if rows > self.batch else None)
        self._keep_outputs(k, *result)
        return result

    def _keep_outputs(self, k: int, conditional: Array, unconditional: Array | None) -> None:
        scale, guidance, bounded = float(self._plan.scales[k]), self._loop.guidance, self._plan.prediction
        if unconditional is not None and guidance is not None and guidance.rescale is not None:
            conditional, unconditional = rescaled_branches(conditional, unconditional, scale, guidance.rescale)
        self.history[k] = conditional, unconditional
        if bounded is not None:
            self.predictions[k] = bounded.at(k, self.latent, guided(conditional, unconditional, scale))

    def computed(self, name: str, k: int) -> Sequence[Array]:
        """The outputs [rows, ...] that the original of a slot computes at evaluation k; the run stays where it is."""
        twin, rows = self.fork(), self._rows_at(k)
        values = twin._step_values(k, rows)
        for slot in self._computing:
            if slot.name == name:
                return slot.variants[0].call(_pick(slot.variants[0].inputs, values))
            twin._fill(slot, k, values, rows)
        raise KeyError(name)

    def outputs(self, name: str) -> Mapping[int, Sequence[Array]]:
        """The outputs of a slot that are still kept: evaluation -> [rows, ...] for each output."""
        return self._slots[name].kept

    def follow(self, plan: Plan) -> None:
        """Go on along a plan of the same evaluations whose cells differ at those to come."""
        self._plan = plan

    def update(self, k: int, weights: Update) -> None:
        """x <- state x + sum_j conditional_j c_j + unconditional_j u_j + predicted_j f_j over what is still in the history.

        The noise that the plan adds after evaluation k is added too.
        """
        latent, added = self.latent * np.float32(weights.state), self.added(k)
        if added is not None:
            latent += added
        for j, (c, u) in self.history.items():
            if weights.conditional[j]:
                latent += np.float32(weights.conditional[j]) * c
            if u is not None and weights.unconditional[j]:
                latent += np.float32(weights.unconditional[j]) * u
            if weights.predicted is not None and weights.predicted[j]:
                latent += np.float32(weights.predicted[j]) * self.predictions[j]
        self.latent = latent

    def added(self, k: int) -> Array | None:
        """The noise [B, *latent] that the plan adds after evaluation k, if any."""
        weights = self._plan.noise[k]
        if not weights.any():
            return None
        return np.tensordot(self._draws, weights.astype(np.float32), axes=([1], [0]))

    def forget(self, j: int) -> None:
        """Drop the outputs of evaluation j from the ring."""
        self.history.pop(j, None)
        self.predictions.pop(j, None)

    def advance(self, k: int, plan: Plan) -> None:
        """Apply row k of a plan and drop the outputs that no later row reads."""
        self.update(k, plan.update(k))
        for j in list(self.history):
            if plan.last_reader(j) <= k:
                self.forget(j)

    def stand_where(self, other: LoopRun) -> None:
        """Take latent and history of a run of the same request."""
        twin = other.fork()
        self.latent, self.history, self.predictions = twin.latent, twin.history, twin.predictions
        self._slots = twin._slots

    def fork(self) -> LoopRun:
        """A run that stands where this one does and continues independently."""
        twin = copy(self)
        twin.history = dict(self.history)  # arrays are replaced, never written, so they may be shared
        twin.predictions = dict(self.predictions)
        twin._slots = {name: _History(dict(slot.kept)) for name, slot in self._slots.items()}
        return twin

    def _filled(self, slot: BoundSlot, k: int, values: Mapping[str, Array], rows: int) -> Sequence[Array]:
        """The outputs [rows, ...] of a computing slot at evaluation k, computed or reused."""
        cell = self._plan.cells.get(slot.name)
        if cell is None:
            stage = slot.at(int(self._plan.positions[k]))
            return stage.call(_pick(stage.inputs, values))
        history, number = self._slots[slot.name], int(cell.variant[k])
        if number == REUSED:
            outputs = history.weighted(cell.weights[k], rows)
        else:
            stage = slot.variants[number]
            outputs = stage.call(_pick(stage.inputs, values))
            history.kept[k] = outputs
        newest = self._newest(history)
        history.keep(lambda j: cell.last_reader(j) > k or j in newest)
        return outputs

    def _newest(self, history: _History) -> set[int]:
        """The newest evaluations of a slot that are kept for a fit: those with guidance, and those without."""
        if not self._keep:
            return set()
        guided = [j for j in history.kept if self._plan.guided[j]]
        others = [j for j in history.kept if not self._plan.guided[j]]
        return {*guided[-self._keep :], *others[-self._keep :]}

    def _fill(self, slot: BoundSlot, k: int, values: dict[str, Array], rows: int) -> None:
        """Add the outputs of a computing slot at evaluation k to the values."""
        outputs = self._filled(slot, k, values, rows)
        values.update(zip((port.name for port in slot.outputs), outputs, strict=True))

    def _rows_at(self, k: int) -> int:
        return self.batch * (2 if self._plan.guided[k] else 1)

    def _step_values(self, k: int, rows: int) -> dict[str, Array]:
        select = self._inverse[:rows]
        scaled = self.latent * np.float32(self._plan.input_scale[k])
        values = {name: value[:rows] for name, value in self._conditions.items()}
        values |= {name: value[select] for name, value in self._fixed.items()}
        values |= {name: value[k].take(select, axis=0) for name, value in self._by_call.items()}
        values |= {name: repeat_row(table[k], rows) for name, table in self._tables.items()}
        values[self._loop.state] = scaled if rows == self.batch else np.concatenate([scaled, scaled])
        values[self._loop.timestep] = np.full(rows, self._times[k])
        return values

    def _prepare(self) -> None:
        """Run the stages of rate once, timestep and once×timestep."""
        for slot in self._program.slots:
            if slot.rate is Rate.STEP:
                continue
            stage = slot.variants[0]
            names = [port.name for port in stage.outputs]
            if stage.rate is Rate.ONCE:
                known = self._rows | self._fixed
                self._fixed.update(zip(names, stage.call(_pick(stage.inputs, known)), strict=True))
            elif stage.rate is Rate.TIMESTEP:
                known = {self._loop.timestep: self._times} | self._tables
                self._tables.update(zip(names, stage.call(_pick(stage.inputs, known)), strict=True))
            else:
                self._by_call.update(zip(names, self._for_every_call(stage), strict=True))

    def _for_every_call(self, stage: BoundStage) -> list[Array]:
        """The outputs [N, R, ...] of a once×timestep stage, in batches of a bounded size."""
        N, R = self._plan.evaluations, len(next(iter(self._rows.values()), [0]))
        pieces = []
        for rows in _batches(N * R, stage):
            call, row = np.divmod(rows, R)  # row r of evaluation k is k R + r
            known = {name: (value, row) for name, value in (self._rows | self._fixed).items()}
            known |= {name: (table, call) for name, table in self._tables.items()}
            known |= {name: (value.reshape(N * R, *value.shape[2:]), rows) for name, value in self._by_call.items()}
            known[self._loop.timestep] = (self._times, call)
            pieces.append(stage.call({port.name: np.take(*known[port.name], axis=0) for port in stage.inputs}))
        outputs = [np.concatenate(values) for values in zip(*pieces, strict=True)]
        return [value.reshape(N, R, *value.shape[1:]) for value in outputs]

    def _timestep_dtype(self) -> str:
        return next(port.port.dtype for port in self._program.inputs if port.role == "timestep")


def run_loop(
    program: BoundProgram, loop: LoopSpec, request: Request, plan: Plan, on_step: OnStep | None = None
) -> Array:
    """Noise in, samples out: [B, *latent] float32.

    Args:
        program: the callables.
        loop: names of the inputs by role.
        request: noise and conditions of B samples.
        plan: evaluations and updates.
        on_step: called with (evaluations done, evaluations in all).
    """
    run = LoopRun(program, loop, request, plan)
    for k in range(plan.evaluations):
        run.evaluate(k)
        run.advance(k, plan)
        if on_step is not None:
            on_step(k + 1, plan.evaluations)
    return run.latent


def _distinct_rows(conditions: Mapping[str, Array]) -> tuple[dict[str, Array], Array]:
    """The R distinct rows of the conditions, and for each of the original rows which of them it is."""
    if not conditions:
        return {}, np.zeros(0, np.int64)
    rows = len(next(iter(conditions.values())))
    seen: dict[bytes, int] = {}
    inverse = np.empty(rows, np.int64)
    for i in range(rows):
        key = b"".join(np.ascontiguousarray(value[i]).tobytes() for value in conditions.values())
        inverse[i] = seen.setdefault(key, len(seen))
    first = [int(np.argmax(inverse == r)) for r in range(len(seen))]
    return {name: value[first] for name, value in conditions.items()}, inverse


def _batches(rows: int, stage: BoundStage) -> list[Array]:
    """The rows of a stage in as few batches as keep what one of them reads and writes below `PREPARED_BYTES`."""
    ports = (*stage.inputs, *stage.outputs)
    bytes_of_row = sum(np.dtype(port.dtype).itemsize * prod(size or 1 for size in port.shape) for port in ports)
    most = max(1, PREPARED_BYTES // max(1, bytes_of_row))
    return np.array_split(np.arange(rows), -(-rows // most))


def _pick(ports: Sequence[Port], known: Mapping[str, Array]) -> dict[str, Array]:
    return {port.name: known[port.name] for port in ports}
