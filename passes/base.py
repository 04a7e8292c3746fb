"""The contract of a pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np

from ..calibration.read import Calibration
from ..ir.program import Program, Refusal
from ..loop.budget import QualityBudget
from ..loop.options import Options
from ..loop.ports import BoundProgram

OptionsT = TypeVar("OptionsT", bound=Options)
Progress = Callable[[str, int, int], None]
Array = np.ndarray


def silent(task: str, done: int, total: int) -> None:
    """Report progress to nobody."""


class Phase(IntEnum):
    """When a pass runs: a recipe goes through the phases in this order, and no pass undoes what a later one built on.

    Weights are cut before they are rounded, layers are rounded for what sparse attention leaves them, and a schedule is fitted
    on what the engine will run.
    """

    HOIST = 1
    PRUNE = 2
    CUT = 3
    ATTEND = 4
    QUANTIZE = 5
    FUSE = 6
    SCHEDULE = 7

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Context:
    """What a pass may use beside the program.

    Attributes:
        original: the captured program, before any pass: the reference of quality.
        engine: lowers a program and opens it: the callables that will be deployed.
        reference: opens the original program, the loop that reference trajectories are made with.
        engine_name: the backend, and what its artifacts depend on.
        activations: form of 8-bit activations that the engine is fastest with; None where it has none for quantized layers.
        seed: seed of the three sets of samples.
        cache: where reference trajectories and statistics are kept between runs.
        min_psnr: a quality budget given by the user, which wins over the recipe's.
        calibration: statistics of a store that the user gave; a pass asks it whether they are those of its program.
        decoded: PSNR in dB [B] of the images of a program's latents [B, *latent] against those of the full loop's; None
            where nothing decodes latents, so that budgets are about the samples themselves.
        quality: mean PSNR in dB of a program's samples, for the record of a lossy pass; None measures nothing.
        progress: called with (task, done, total) during long work.
        fitted_on: what `engine` gives: the engine, or the PyTorch reference where it cannot run on this machine.
    """

    original: Program
    engine: Callable[[Program], BoundProgram]
    reference: Callable[[], BoundProgram]
    engine_name: str
    seed: int
    cache: Path
    min_psnr: QualityBudget | None = None
    calibration: Calibration | None = None
    decoded: Callable[[Array, Array], Array] | None = None
    quality: Callable[[Program], float] | None = None
    progress: Progress = silent
    fitted_on: Literal["engine", "reference"] = "engine"
    activations: Literal["dynamic", "symmetric"] | None = "dynamic"


@dataclass(frozen=True)
class PassResult:
    """What a pass returns.

    Attributes:
        program: the new program.
        changed: how many sites it changed, counted where they are changed.
        refused: sites it looked at and left alone.
        identity: the options ask for no change.
        details: figures for the record.
    """

    program: Program
    changed: int
    refused: tuple[Refusal, ...] = ()
    identity: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)


class Pass(ABC, Generic[OptionsT]):
    """A rewrite of a program: pattern, check, rewrite.

    Class attributes name it in recipes and tables. `exact` passes must keep the outputs within the tolerance of the
    dtype; the manager checks it. Those that `keeps_activations` names also keep what every linear layer reads, so that
    a calibration store made before them may be used after them. `phase` says where in a recipe it belongs; without one
    it may stand anywhere before the schedule.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    source: ClassVar[str]
    phase: ClassVar[Phase | None] = None
    exact: ClassVar[bool] = False
    keeps_activations: ClassVar[bool] = False
    idempotent: ClassVar[bool] = True
    options_type: ClassVar[type[Options]]

    def __init__(self, options: OptionsT):
        self.options = options

    @classmethod
    def summary(cls) -> str:
        """The first line of the class's docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]

    def not_applicable(self, program: Program) -> str | None:
        """Why the program has nothing of the kind this pass acts on, or None."""
        return None

    def requires(self, program: Program) -> None:
        """Check preconditions.

        Raises:
            UsageError: one does not hold; the message names the pass to run before.
        """

    @abstractmethod
    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrite the program; never changes its argument."""
