"""What a calibration run will do: samples, buckets, shards, and the values it looks at."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.program import Program
from ..loop.errors import UsageError
from ..loop.plan import Plan, fold
from .document import CONDITIONAL, UNCONDITIONAL
from .sampling import Draws, draw_rows
from .sites import Watched, watched_values
from .statistics import Statistics

SAMPLES = 32
BUCKETS = 8
SHARD_SAMPLES = 8
"""Samples of one shard, which run as one batch: few enough for large models, enough to be efficient."""
GRAM_WIDTH = 2048
"""Widest value that gets a Gram matrix: 32 MiB in float64."""


@dataclass(frozen=True)
class Settings:
    """How to calibrate.

    Attributes:
        samples: calibration samples; None takes the default. A component runs on its example.
        seed: seed of the noise and of every choice of rows.
        buckets: equal parts of the calls of the loop; None takes the default, or one for each call of a shorter loop.
        gram_width: widest value that gets a Gram matrix; 0 keeps none.
    """

    samples: int | None = None
    seed: int = 0
    buckets: int | None = None
    gram_width: int = GRAM_WIDTH


@dataclass(frozen=True, eq=False)
class CalibrationPlan:
    """A calibration run of one program.

    Attributes:
        program: program that runs.
        seed: see `Settings`.
        samples: B of all shards together.
        buckets: equal parts of the calls.
        gram_width: see `Settings`.
        whole: every call of the loop, or None for a component.
        watched: the values that statistics are taken of.
        shards: first and last (exclusive) sample of each.
        draws: which raw rows are kept.
    """

    program: Program
    seed: int
    samples: int
    buckets: int
    gram_width: int
    whole: Plan | None
    watched: tuple[Watched, ...]
    shards: tuple[tuple[int, int], ...]
    draws: Draws

    @property
    def branches(self) -> tuple[str, ...]:
        """The guidance branches that run."""
        return _branches(self.whole)

    @property
    def evaluations(self) -> int:
        """Evaluations of one shard."""
        return self.whole.evaluations if self.whole is not None else 1

    @property
    def timesteps(self) -> tuple[float, ...]:
        """What the denoiser receives at each call; empty for a component."""
        return tuple(float(t) for t in self.whole.timesteps) if self.whole is not None else ()

    def empty(self, watched: Watched, shard: int) -> Statistics:
        """Accumulators of a value over one shard, nothing seen yet."""
        entry, room = watched.entry, self.draws.count(*self.shards[shard])
        return Statistics.empty(self.buckets, len(self.branches), entry.width, gram=entry.gram, capacity=room)


def make_plan(program: Program, settings: Settings) -> CalibrationPlan:
    """Decide on samples, buckets, shards and values.

    Raises:
        UsageError: the settings do not fit the program, or it has no linear layer.
    """
    whole = _whole_loop(program)
    samples = _samples(program, settings)
    watched = watched_values(program, settings.gram_width)
    if not watched:
        raise UsageError("calibrate: expected a model with linear layers; received one without any. Nothing to do.")
    size = SHARD_SAMPLES if whole is not None else samples
    evaluations = whole.evaluations if whole is not None else 1
    return CalibrationPlan(
        program=program,
        seed=settings.seed,
        samples=samples,
        buckets=_buckets(settings, evaluations),
        gram_width=settings.gram_width,
        whole=whole,
        watched=watched,
        shards=tuple((start, min(start + size, samples)) for start in range(0, samples, size)),
        draws=draw_rows(settings.seed, samples, evaluations, len(_branches(whole))),
    )


def _whole_loop(program: Program) -> Plan | None:
    """Every call of the loop at the default guidance scale."""
    if program.loop is None or program.recurrence is None:
        return None
    return fold(program.recurrence, program.loop.guidance.scales[0] if program.loop.guidance else None)


def _branches(whole: Plan | None) -> tuple[str, ...]:
    guided = whole is not None and bool(whole.guided.any())
    return (CONDITIONAL, UNCONDITIONAL) if guided else (CONDITIONAL,)


def _samples(program: Program, settings: Settings) -> int:
    if program.loop is not None:
        samples = SAMPLES if settings.samples is None else settings.samples
        if samples < 1:
            raise UsageError(f"calibrate: expected at least one sample; received {samples}.")
        return samples
    batch = next(iter(program.example.values())).shape[0]
    if settings.samples not in (None, batch):
        raise UsageError(
            f"calibrate: a network without a loop runs on its example of {batch}; received {settings.samples} samples. "
            "Leave --samples out."
        )
    return batch


def _buckets(settings: Settings, calls: int) -> int:
    if settings.buckets is None:
        return min(BUCKETS, calls)
    if not 1 <= settings.buckets <= calls:
        raise UsageError(
            f"calibrate: expected between 1 and {calls} buckets, the calls of the loop; received {settings.buckets}."
        )
    return settings.buckets
