"""A cheap denoiser in closed form, in NumPy, with a loop around it: for tests of fits and searches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepfold.ir.program import ModelIdentity, Program
from stepfold.loop.ports import BoundProgram, BoundStage, InputPort, Port, Rate, bound_slots
from stepfold.loop.recurrence import Recurrence
from stepfold.loop.spec import LoopSpec
from stepfold.passes.base import Context

Array = np.ndarray
LATENT = (6,)
CLASSES = 4
STATE, TIME, LABEL = (
    Port("x", (None, *LATENT), "float32"),
    Port("t", (None,), "float32"),
    Port("c", (None,), "int64"),
)
CENTERS = np.linspace(-0.6, 0.6, (CLASSES + 1) * LATENT[0]).reshape(CLASSES + 1, -1).astype(np.float32)


def velocity(x: Array, t: Array, c: Array) -> Array:
    """A smooth field, stiff near the end of the path: [B, 6] from x [B, 6], t [B] and classes c [B]."""
    s = (t / np.float32(1000.0))[:, None]
    return (0.6 * np.sin(5 * x) + s * x - 0.3 * CENTERS[c] / (s + np.float32(0.1))).astype(np.float32)


def euler(steps: int, stretch: float = 1.0) -> Recurrence:
    """x <- x - stretch v / steps, with timesteps from 1000 down."""
    times, ones = np.linspace(1000, 1000 / steps, steps), np.ones(steps)
    return Recurrence(times, ones, ones, -stretch * np.eye(steps) / steps, 1.0)


def adams_bashforth(steps: int) -> Recurrence:
    """The two-step method: x <- x - (3 v_i - v_{i-1}) / (2 steps)."""
    first, outputs = euler(steps), -(1.5 * np.eye(steps) - 0.5 * np.eye(steps, k=-1)) / steps
    outputs[0, 0] = -1 / steps
    return replace(first, outputs=outputs)


def loop(scale: Any = 2.0, steps: int = 12) -> LoopSpec:
    """Guided by a fifth row of classes; a scale of None leaves guidance out."""
    document: dict[str, Any] = {
        "inputs": {"x": "state", "t": "timestep", "c": "condition"},
        "sampler": {"scheduler": "FlowMatchEulerDiscreteScheduler", "steps": steps},
        "latent": {"shape": list(LATENT), "values": "pixels"},
    }
    if scale is not None:
        document["guidance"] = {"scale": scale, "unconditional": {"c": CLASSES}}
    return LoopSpec.model_validate(document)


class Counter:
    """The field as a stage that counts its rows; `gain` is an error of the engine, 1 when it has none."""

    def __init__(self, gain: float = 1.0):
        self.rows = self.calls = 0
        self.gain = gain

    def __call__(self, inputs: Mapping[str, Array]) -> list[Array]:
        self.calls += 1
        self.rows += len(inputs["x"])
        return [np.float32(self.gain) * velocity(inputs["x"], inputs["t"], inputs["c"])]

    def bound(self) -> BoundProgram:
        """The stage as a program."""
        stage = BoundStage("step", Rate.STEP, (STATE, TIME, LABEL), (Port("y", STATE.shape, "float32"),), self)
        return BoundProgram(inputs(), ("y",), bound_slots(stage), {})


def inputs() -> tuple[InputPort, ...]:
    """x, t and a class of four, with an unconditional row."""
    return (InputPort(STATE, "state"), InputPort(TIME, "timestep"), InputPort(LABEL, "condition", CLASSES + 1))


def analytic_program(recurrence: Recurrence, spec: LoopSpec) -> Program:
    """What the search reads of a program; it has no stages, the engine is given to it."""
    example = {"x": torch.zeros(2, *LATENT), "t": torch.zeros(2), "c": torch.zeros(2, dtype=torch.int64)}
    return Program((), inputs(), ("y",), example, ModelIdentity("Analytic", "0" * 64), spec, recurrence)


def analytic_context(program: Program, cache: Path, engine: Counter | None = None, **changes: Any) -> Context:
    """The exact field makes the reference trajectories, `engine` is what is fitted."""
    fitted = (engine or Counter()).bound()
    return replace(Context(program, lambda _: fitted, lambda: Counter().bound(), "analytic", 0, cache), **changes)
