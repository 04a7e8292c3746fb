"""Every scheduler that folds replays in a loop written here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from stepfold.frontend.sampler import probe
from stepfold.frontend.schedulers import build
from stepfold.loop.plan import Plan, fold
from stepfold.loop.spec import LoopSpec, SamplerSpec, read_loop

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::DeprecationWarning:numpy")
ROOT = Path(__file__).resolve().parents[2]
REPLAY = 1e-6  # relative L2, the promise of the fold
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@dataclass(frozen=True)
class Case:
    """A scheduler as a user writes it, and the `set_timesteps` call it stands for."""

    scheduler: str
    config: dict[str, Any] = field(default_factory=dict)
    steps: int = 12
    arguments: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] | None = None
    calls: int | None = None
    step: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = [f"{k}={v}" for k, v in (self.config | self.arguments | self.step).items()]
        return "-".join([self.scheduler.removesuffix("Scheduler"), *options])

    def spec(self) -> SamplerSpec:
        return SamplerSpec(
            scheduler=self.scheduler,
            config=self.config,
            steps=self.steps,
            set_timesteps=self.arguments,
            step=self.step,
        )

    def scheduler_ready(self) -> Any:
        scheduler = getattr(diffusers, self.scheduler)(**self.config)
        scheduler.set_timesteps(**({"num_inference_steps": self.steps} if self.call is None else self.call))
        return scheduler


CASES = [
    Case("FlowMatchEulerDiscreteScheduler"),
    Case("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    Case(
        "FlowMatchEulerDiscreteScheduler",
        arguments={"sigmas": "linspace"},
        call={"sigmas": np.linspace(1.0, 1 / 12, 12)},
    ),
    Case(
        "FlowMatchEulerDiscreteScheduler",
        {"use_dynamic_shifting": True},
        arguments={"sigmas": "linspace", "mu": 1.15},
        call={"sigmas": np.linspace(1.0, 1 / 12, 12), "mu": 1.15},
    ),
    Case(
        "FlowMatchEulerDiscreteScheduler",
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.1},
        arguments={"mu": 0.8},
        call={"num_inference_steps": 12, "mu": 0.8},
    ),
    Case(
        "FlowMatchEulerDiscreteScheduler",
        steps=4,
        arguments={"sigmas": [1.0, 0.9, 0.6, 0.2]},
        call={"sigmas": [1.0, 0.9, 0.6, 0.2]},
    ),
    Case("FlowMatchHeunDiscreteScheduler", {"shift": 2.0}, calls=23),
    Case("DDIMScheduler", {"clip_sample": False}),
    Case("DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    Case("DDIMScheduler", {"clip_sample": False, "prediction_type": "sample"}),
    Case("EulerDiscreteScheduler"),
    Case("EulerDiscreteScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    Case(
        "EulerDiscreteScheduler", steps=3, arguments={"timesteps": [900, 500, 100]}, call={"timesteps": [900, 500, 100]}
    ),
    Case("DPMSolverMultistepScheduler"),
    Case("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    Case("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction", "solver_order": 3}),
    Case("DPMSolverMultistepScheduler", FLOW),
    Case("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    Case("UniPCMultistepScheduler"),
    Case("UniPCMultistepScheduler", {"solver_order": 3, "prediction_type": "v_prediction"}),
    Case(
        "UniPCMultistepScheduler",
        FLOW,
        arguments={"sigmas": "linspace"},
        call={"sigmas": np.linspace(1.0, 1 / 12, 12)},
    ),
    Case("HeunDiscreteScheduler", calls=23),
    Case("HeunDiscreteScheduler", {"prediction_type": "v_prediction"}, calls=23),
    Case("PNDMScheduler", {"skip_prk_steps": True}, calls=13),
    Case("PNDMScheduler", {"skip_prk_steps": False}, calls=21),
    Case("LMSDiscreteScheduler"),
    Case("LMSDiscreteScheduler", {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
    Case("KDPM2DiscreteScheduler", calls=23),
    Case("DEISMultistepScheduler"),
    Case("EDMEulerScheduler"),
    Case("IPNDMScheduler"),
    Case("IPNDMScheduler", steps=1),  # lands on zeros
    Case("TCDScheduler", step={"eta": 0.0}),  # adds noise by default
    Case("CogVideoXDDIMScheduler"),  # never clips, whatever its `clip_sample` says
]
Denoiser = Callable[[np.ndarray, float, int], np.ndarray]


def pipeline_loop(case: Case, noise: np.ndarray, denoiser: Denoiser) -> np.ndarray:
    """The loop of a diffusers pipeline: latents [S+1, D] with what `denoiser(scaled latent, timestep, call)` says."""
    scheduler = case.scheduler_ready()
    x = torch.from_numpy(noise * float(getattr(scheduler, "init_noise_sigma", 1.0)))[None, :, None, None]
    latents = [x]
    for call, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        v = denoiser(scaled.flatten().double().numpy(), float(t), call)
        x = scheduler.step(torch.from_numpy(v)[None, :, None, None], t, x, **case.step).prev_sample
        latents.append(x)
    return np.stack([x.flatten().double().numpy() for x in latents])


def table_loop(table: Plan, noise: np.ndarray, denoisers: tuple[Denoiser, Denoiser]) -> np.ndarray:
    """The definition of a table, in float64."""
    x, outputs = noise * table.initial_scale, []
    for k in range(table.evaluations):
        scaled, t = table.input_scale[k] * x, float(table.timesteps[k])
        outputs.append([f(scaled, t, int(table.positions[k])) for f in denoisers])
        x = table.state[k] * x
        for j, (c, u) in enumerate(outputs):
            x = x + table.conditional[k, j] * c + table.unconditional[k, j] * u
    return x


def distance(received: np.ndarray, expected: np.ndarray) -> float:
    size = np.linalg.norm(expected)
    return float(np.linalg.norm(received - expected) / (size or 1.0))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_recurrence_replays_the_scheduler(case: Case) -> None:
    recurrence = probe(case.spec())
    assert recurrence.calls == (case.calls or case.steps)
    generator = np.random.default_rng(7)
    for magnitude in (1.0, 10.0):
        noise = magnitude * generator.standard_normal(32)
        outputs = magnitude * generator.standard_normal((recurrence.calls, 32))
        expected = pipeline_loop(case, noise, lambda x, t, i, v=outputs: v[i])
        x = recurrence.initial_scale * noise
        for i in range(recurrence.calls):
            x = recurrence.state[i] * x + sum(recurrence.outputs[i, j] * outputs[j] for j in range(i + 1))
            assert distance(x, expected[i + 1]) < REPLAY, f"call {i}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_denoiser_sees_the_scaled_latent_and_the_timestep(case: Case) -> None:
    recurrence = probe(case.spec())
    generator = np.random.default_rng(8)
    noise, outputs = generator.standard_normal(16), generator.standard_normal((recurrence.calls, 16))
    seen = []

    def watch(x: np.ndarray, t: float, call: int) -> np.ndarray:
        seen.append((x, t))
        return outputs[call]

    latents = pipeline_loop(case, noise, watch)
    for i, (x, t) in enumerate(seen):
        assert t == recurrence.timesteps[i]
        assert distance(recurrence.input_scale[i] * latents[i], x) < REPLAY


@pytest.mark.parametrize("scale", [None, 1.0, 3.0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fold_of_all_calls_is_the_guided_pipeline(case: Case, scale: float | None) -> None:
    """Both branches answer from the latent, so an error would feed back."""
    table = fold(probe(case.spec()), scale)

    def conditional(x: np.ndarray, t: float, call: int) -> np.ndarray:
        return np.tanh(x) * np.cos(t / 300.0) + 0.3

    def unconditional(x: np.ndarray, t: float, call: int) -> np.ndarray:
        return np.sin(x + t / 500.0)

    def guided(x: np.ndarray, t: float, call: int) -> np.ndarray:
        c = conditional(x, t, call)
        if scale is None:
            return c
        u = unconditional(x, t, call)
        return u + scale * (c - u)

    noise = np.random.default_rng(9).standard_normal(32)
    expected = pipeline_loop(case, noise, guided)[-1]
    assert distance(table_loop(table, noise, (conditional, unconditional)), expected) < REPLAY


def test_reference_loop_is_fifty_equal_euler_steps() -> None:
    loop = read_loop(ROOT / "examples" / "mnist_dit" / "loop.yaml")
    assert isinstance(loop, LoopSpec)
    recurrence = probe(loop.sampler)
    np.testing.assert_allclose(recurrence.state, np.ones(50), atol=1e-12)
    np.testing.assert_allclose(recurrence.outputs, np.diag(np.full(50, -1 / 50)), atol=1e-7)
    np.testing.assert_allclose(recurrence.timesteps, np.arange(1000, 0, -20), rtol=1e-7)
    np.testing.assert_array_equal(recurrence.input_scale, np.ones(50))
    assert recurrence.initial_scale == 1.0 and recurrence.depth == 1


def test_timestep_scale_changes_what_the_denoiser_receives_only() -> None:
    """FLUX pipelines divide the timestep by 1000 before the call."""
    spec = SamplerSpec(scheduler="FlowMatchEulerDiscreteScheduler", steps=5)
    whole, scaled = probe(spec), probe(spec.model_copy(update={"timestep_scale": 0.001}))
    np.testing.assert_allclose(scaled.timesteps, whole.timesteps / 1000)
    np.testing.assert_array_equal(scaled.outputs, whole.outputs)


def test_timestep_offset_and_output_scale() -> None:
    """Lumina 2 counts from 0 to 1 and negates its output."""
    spec = SamplerSpec(scheduler="FlowMatchEulerDiscreteScheduler", steps=5)
    whole = probe(spec)
    other = probe(spec.model_copy(update={"timestep_scale": -0.001, "timestep_offset": 1.0, "output_scale": -1.0}))
    np.testing.assert_allclose(other.timesteps, 1 - whole.timesteps / 1000)
    np.testing.assert_array_equal(other.outputs, -whole.outputs)
    np.testing.assert_array_equal(other.state, whole.state)


@pytest.mark.parametrize(
    ("case", "depth"),
    [
        (Case("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}), 1),
        (Case("DDIMScheduler", {"clip_sample": False}), 1),
        (Case("HeunDiscreteScheduler"), 2),
        (Case("LMSDiscreteScheduler"), 4),
        (Case("DPMSolverMultistepScheduler", {"prediction_type": "sample"}), 2),
    ],
    ids=str,
)
def test_rounding_of_the_scheduler_is_not_taken_for_memory(case: Case, depth: int) -> None:
    """The driver keeps as many outputs as the recurrence is deep."""
    assert probe(case.spec()).depth == depth


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_shortest_loops(name: str, steps: int) -> None:
    assert probe(SamplerSpec(scheduler=name, steps=steps)).calls == steps


def test_equal_neighbours_at_the_start_are_no_start_in_the_middle() -> None:
    """diffusers takes a repeated first timestep for an image-to-image start, unless told the first index."""
    spec = SamplerSpec(scheduler="FlowMatchEulerDiscreteScheduler", steps=3, set_timesteps={"sigmas": [1.0, 1.0, 0.5]})
    np.testing.assert_allclose(probe(spec).outputs, np.diag([0.0, -0.5, -0.5]))


def test_a_thousand_calls_stay_within_the_tolerance() -> None:
    assert probe(SamplerSpec(scheduler="FlowMatchEulerDiscreteScheduler", steps=1000)).calls == 1000


def test_probing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    probe(SamplerSpec(scheduler="EulerDiscreteScheduler", steps=5))
    probe(SamplerSpec(scheduler="EulerAncestralDiscreteScheduler", steps=5))
    assert torch.equal(torch.randn(4), expected)


def test_bookkeeping_keys_of_a_saved_scheduler_are_ignored() -> None:
    config = {"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.42.1", "num_train_timesteps": 500}
    scheduler = build(SamplerSpec(scheduler="EulerDiscreteScheduler", config=config, steps=5))
    assert scheduler.config.num_train_timesteps == 500 and len(scheduler.timesteps) == 5
