"""Run the real loop over one shard of samples and take statistics of what linear layers read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ..ir.program import Program
from ..loop.driver import LoopRun
from ..loop.errors import StepfoldError
from ..loop.noise import SampleSet
from ..loop.plan import Plan
from ..loop.ports import BoundProgram
from .conditions import sample_request
from .document import bucket_of
from .observe import watched_program
from .plan import CalibrationPlan
from .sampling import gram_tokens
from .statistics import NotFiniteError
from .trajectories import part

Array = np.ndarray
OnEvaluation = Callable[[int, int], None]
"""Called with (evaluations done, evaluations of the shard)."""


@dataclass(frozen=True)
class Moment:
    """Where in the loop values are observed.

    Attributes:
        call: call of the grid.
        timestep: what the denoiser receives, None for a component.
        first: index of the first sample of the batch.
        batch: B samples; each branch has a row for each of them.
    """

    call: int
    timestep: float | None
    first: int
    batch: int


class Collector:
    """Statistics of every watched value over one shard."""

    def __init__(self, plan: CalibrationPlan, shard: int):
        self._plan = plan
        self._statistics = [plan.empty(item, shard) for item in plan.watched]
        self._seen = np.zeros((plan.buckets, len(plan.branches)), np.int64)
        self._moment = Moment(0, None, 0, 0)

    def start(self, moment: Moment) -> None:
        """Say where in the loop the next values are from."""
        self._moment = moment
        self._seen[self._bucket] += moment.batch

    def program(self) -> BoundProgram:
        """The program with its computing slots watched."""
        watched = {item.node: partial(self._take, i) for i, item in enumerate(self._plan.watched)}
        return watched_program(self._plan.program, watched)

    def arrays(self) -> dict[str, Array]:
        """Everything by name: `seen` [buckets, branches] (samples times calls) and `<site>.<accumulator>`."""
        found = {"seen": self._seen}
        for i, statistics in enumerate(self._statistics):
            found |= {tensor_name(i, name): array for name, array in statistics.arrays().items()}
        return found

    @property
    def _bucket(self) -> int:
        return bucket_of(self._moment.call, self._plan.evaluations, self._plan.buckets)

    def _take(self, index: int, value: torch.Tensor) -> None:
        item, branches = self._plan.watched[index], len(self._plan.branches)
        rows = item.by_row(value, self._moment.batch * branches)
        if len(rows) != self._moment.batch * branches:  # the same for all samples: seen once, in the first branch
            rows, branches = rows[:1], 1
        for branch, values in enumerate(rows.chunk(branches)):
            self._take_branch(index, branch, values)

    def _take_branch(self, index: int, branch: int, values: torch.Tensor) -> None:
        """Rows [B, T, M] of one branch."""
        statistics, flat = self._statistics[index], values.reshape(-1, values.shape[-1])
        try:
            statistics.observe(flat, self._bucket, branch)
        except NotFiniteError as error:
            raise self._not_finite(index, branch, str(error)) from None
        moment = self._moment
        if statistics.gram is not None:
            statistics.observe_gram(gram_tokens(values, self._plan.seed, (index, branch, moment.call, moment.first)))
        kept = self._plan.draws.rows(values, moment.call, branch, moment.first)
        if len(kept):
            statistics.keep(kept, self._bucket, branch)

    def _not_finite(self, index: int, branch: int, what: str) -> StepfoldError:
        moment, site = self._moment, self._plan.watched[index].entry
        last = moment.first + moment.batch - 1
        where = "" if moment.timestep is None else f" at call {moment.call} (timestep {moment.timestep:g})"
        return StepfoldError(
            f"site {site.name}: expected finite activations; received {what}{where}, {self._plan.branches[branch]} "
            f"branch, samples {moment.first} to {last}. Check that the unoptimized model makes finite samples: "
            "its weights, the sampler and the guidance scale."
        )


def collect_shard(plan: CalibrationPlan, index: int, on_evaluation: OnEvaluation) -> dict[str, Array]:
    """Statistics of one shard of samples, the same bytes wherever it runs.

    Args:
        plan: the run.
        index: number of the shard.
        on_evaluation: progress.

    Returns:
        Arrays by name, see `Collector.arrays`.

    Raises:
        StepfoldError: an activation is NaN or infinite; the message names site, timestep and branch.
    """
    collector = Collector(plan, index)
    with one_thread():
        if plan.whole is None:
            _run_component(plan, collector)
            on_evaluation(1, 1)
        else:
            _run_loop(plan, plan.whole, collector, plan.shards[index], on_evaluation)
    return collector.arrays()


def tensor_name(site: int, accumulator: str) -> str:
    """The name of an accumulator in a file."""
    return f"{site:04d}.{accumulator}"


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums depend on how many threads share them: with one, every process computes the same bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run_component(plan: CalibrationPlan, collector: Collector) -> None:
    collector.start(Moment(0, None, 0, plan.samples))
    collector.program().evaluate({name: value.numpy() for name, value in plan.program.example.items()})


def _run_loop(
    plan: CalibrationPlan, whole: Plan, collector: Collector, samples: Sequence[int], on_evaluation: OnEvaluation
) -> None:
    program: Program = plan.program
    assert program.loop is not None
    first, stop = samples
    request = part(sample_request(program, SampleSet("calibration", plan.seed, plan.samples)), first, stop)
    run = LoopRun(collector.program(), program.loop, request, whole)
    for k in range(whole.evaluations):
        collector.start(Moment(int(whole.positions[k]), float(whole.timesteps[k]), first, stop - first))
        run.evaluate(k)
        run.advance(k, whole)
        on_evaluation(k + 1, whole.evaluations)
