"""Loops written by hand, with stages that count how often and on how many rows they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from stepfold.loop.driver import Request
from stepfold.loop.noise import noise
from stepfold.loop.ports import BoundProgram, BoundStage, InputPort, Port, Rate, bound_slots
from stepfold.loop.recurrence import Recurrence
from stepfold.loop.spec import LoopSpec

Array = np.ndarray
S, SCALE, LATENT = 6, 2.5, (2, 3)
LOOP = LoopSpec.model_validate(
    {
        "inputs": {"x": "state", "t": "timestep", "c": "condition"},
        "sampler": {"scheduler": "FlowMatchEulerDiscreteScheduler", "steps": S},
        "guidance": {"scale": SCALE, "unconditional": {"c": 10}},
        "latent": {"shape": list(LATENT)},
    }
)
TOLERANCE = 1e-5  # float32 over S updates


@dataclass
class Counter:
    """Wraps the functions of stages; `rows[name]` lists the number of rows of each call."""

    rows: dict[str, list[int]] = field(default_factory=dict)

    def stage(
        self, name: str, rate: Rate, inputs: Sequence[Port], outputs: Sequence[Port], f: Callable[..., Array]
    ) -> BoundStage:
        def call(values: Mapping[str, Array]) -> list[Array]:
            assert set(values) == {port.name for port in inputs}
            assert {port.name: values[port.name].dtype.name for port in inputs} == {p.name: p.dtype for p in inputs}
            sizes = {len(value) for value in values.values()}
            assert len(sizes) == 1, f"{name} got mixed batches"
            self.rows.setdefault(name, []).append(sizes.pop())
            return [f(*(values[port.name] for port in inputs))]

        return BoundStage(name, rate, tuple(inputs), tuple(outputs), call)


def port(name: str, *shape: int, dtype: str = "float32") -> Port:
    return Port(name, (None, *shape), dtype)


X, V = port("x", *LATENT), port("v", *LATENT)
T, C = port("t"), port("c", dtype="int64")
INPUTS = (InputPort(X, "state"), InputPort(T, "timestep"), InputPort(C, "condition"))


def column(values: Array) -> Array:
    """[B] -> [B, 1, 1] float32, to stand beside a latent."""
    return values.astype("float32")[:, None, None]


def denoiser(x: Array, t: Array, c: Array) -> Array:
    """Linear in x, with its own slope and offset for each timestep and condition."""
    return column(np.cos(t / 400)) * x * (1 + column(c) / 20) + column(np.sin(t / 300) + c / 10)


def plain(counter: Counter | None = None, timestep: Port = T) -> BoundProgram:
    """Everything in the step stage."""
    stage = (counter or Counter()).stage("step", Rate.STEP, (X, timestep, C), (V,), denoiser)
    inputs = (INPUTS[0], InputPort(timestep, "timestep"), INPUTS[2])
    return BoundProgram(inputs, ("v",), bound_slots(stage), {})


def hoisted(counter: Counter) -> BoundProgram:
    """The same denoiser cut by rate: once, timestep, once×timestep and step."""
    once, slope, both = port("once"), port("slope"), port("both")
    stages = (
        counter.stage("once", Rate.ONCE, (C,), (once,), lambda c: (c / 20).astype("float32")),
        counter.stage("timestep", Rate.TIMESTEP, (T,), (slope,), lambda t: np.cos(t / 400).astype("float32")),
        counter.stage(
            "both",
            Rate.ONCE_TIMESTEP,
            (T, C, once),
            (both,),
            lambda t, c, once: (np.sin(t / 300) + 2 * once).astype("float32"),
        ),
        counter.stage(
            "step",
            Rate.STEP,
            (X, slope, once, both),
            (V,),
            lambda x, slope, once, both: column(slope) * x * (1 + column(once)) + column(both),
        ),
    )
    return BoundProgram(INPUTS, ("v",), bound_slots(*stages), {})


def recurrence(depth: int = 1) -> Recurrence:
    generator = np.random.default_rng(0)
    outputs = np.diag(np.full(S, -1 / S))
    for offset in range(1, depth):
        outputs += np.diag(generator.uniform(0.05, 0.1, S - offset), -offset)
    return Recurrence(
        np.linspace(1000.0, 100.0, S), np.linspace(0.5, 1.0, S), np.linspace(0.8, 1.0, S), outputs, initial_scale=3.0
    )


def request(batch: int, guided: bool = True, seed: int = 1) -> Request:
    conditions = {"c": np.arange(batch) % 3}
    return Request(noise(seed, (batch, *LATENT)), conditions, {"c": np.full(batch, 10)} if guided else None)


def assert_close(received: Array, expected: Array) -> None:
    assert received.dtype == np.float32 and received.shape == expected.shape
    np.testing.assert_allclose(received, expected, rtol=TOLERANCE, atol=TOLERANCE * np.abs(expected).max())
