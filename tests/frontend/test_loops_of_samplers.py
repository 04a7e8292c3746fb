"""Schedulers that draw noise in their steps, or bound what they predict, against their own loop on the same draws."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from stepfold.frontend.sampler import probed
from stepfold.loop.plan import fold
from stepfold.loop.recurrence import Recurrence
from stepfold.loop.spec import SamplerSpec

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::DeprecationWarning:numpy")
STEPS, WIDTH = 8, 32
REPLAY = 1e-6  # relative L2, the promise of the fold
SDE = {"algorithm_type": "sde-dpmsolver++"}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, int]] = {
    # scheduler, configuration, arguments of a step, draws that count, draws
    "ddim with eta": ("DDIMScheduler", {"clip_sample": False}, {"eta": 0.7}, 7, 7),
    "ddpm": ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large"}, {}, 7, 7),
    "ancestral": ("EulerAncestralDiscreteScheduler", {}, {}, 7, 7),
    "ancestral of velocities": ("EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction"}, {}, 7, 7),
    "ancestral, two calls in a step": ("KDPM2AncestralDiscreteScheduler", {}, {}, 7, 7),
    "consistency": ("LCMScheduler", {"original_inference_steps": 16}, {}, 7, 7),
    "trajectory consistency": ("TCDScheduler", {"original_inference_steps": 16}, {"eta": 0.3}, 7, 7),
    "trajectory consistency, nothing random": ("TCDScheduler", {"original_inference_steps": 16}, {"eta": 0.0}, 0, 0),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}, 7, 8),
    "sde": ("DPMSolverMultistepScheduler", SDE, {}, 7, 7),
    "sde of velocities": ("DPMSolverMultistepScheduler", {**SDE, "prediction_type": "v_prediction"}, {}, 7, 7),
    "a timestep for each sample, and a last one that is the end": ("DDPMWuerstchenScheduler", {}, {}, 7, 8),
    "stochastic Adams": ("SASolverScheduler", {}, {}, 5, 7),
}


BOUNDED: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, int]] = {
    "ddim as it is": ("DDIMScheduler", {}, {}, 0, 0),
    "ddim with eta, clipped": ("DDIMScheduler", {"clip_sample_range": 0.5}, {"eta": 0.7}, 7, 7),
    "ddim, outputs clipped too": ("DDIMScheduler", {}, {"use_clipped_model_output": True}, 0, 0),
    "ddim of velocities": ("DDIMScheduler", {"prediction_type": "v_prediction"}, {}, 0, 0),
    "ddim of samples": ("DDIMScheduler", {"prediction_type": "sample"}, {}, 0, 0),
    "ddim, thresholds": ("DDIMScheduler", {"thresholding": True, "sample_max_value": 1.5}, {}, 0, 0),
    "ddpm as it is": ("DDPMScheduler", {}, {}, 7, 7),
    "unclip": ("UnCLIPScheduler", {}, {}, 7, 7),
    "heun": ("HeunDiscreteScheduler", {"clip_sample": True}, {}, 0, 0),
    "dpm++, thresholds": ("DPMSolverMultistepScheduler", {"thresholding": True}, {}, 0, 0),
    "sde, thresholds": ("DPMSolverMultistepScheduler", {**SDE, "thresholding": True}, {}, 7, 7),
    "unipc, thresholds": ("UniPCMultistepScheduler", {"thresholding": True}, {}, 0, 0),
    "deis, thresholds": ("DEISMultistepScheduler", {"thresholding": True}, {}, 0, 0),
}

EACH = ("DDPMWuerstchenScheduler",)
"""They take a timestep for each sample, and their pipelines make no step from the last one of the grid."""

SINGLE = ("sde, thresholds", "flow", "sde", "sde of velocities")
"""They draw in float32, whatever their latent is."""


def answer(x: np.ndarray, t: float) -> np.ndarray:
    return np.tanh(x) * np.cos(t / 300.0) + 0.3


def own_loop(name: str, seed: int, held: set[int] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The scheduler's loop in its own code: the start, all that it drew, and the sample.

    What it draws is what its generator gives one after the other, so a second generator of the seed says it.
    """
    scheduler_name, config, step, _, draws = (CASES | BOUNDED)[name]
    scheduler = getattr(diffusers, scheduler_name)(**config)
    scheduler.set_timesteps(STEPS)
    start = np.random.default_rng(seed).standard_normal(WIDTH)
    x = torch.from_numpy(start)[None, :, None, None] * float(getattr(scheduler, "init_noise_sigma", 1.0))
    generator, output = torch.Generator().manual_seed(seed), np.zeros(WIDTH)
    if "generator" in inspect.signature(scheduler.step).parameters:
        step = step | {"generator": generator}
    each = scheduler_name in EACH
    for call, t in enumerate(scheduler.timesteps[:-1] if each else scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        if held is None or call in held:
            output = answer(scaled.flatten().numpy(), float(t))
        time = t.reshape(1) if each else t
        x = scheduler.step(torch.from_numpy(output)[None, :, None, None], time, x, **step).prev_sample
    twin, dtype = torch.Generator().manual_seed(seed), torch.float32 if name in SINGLE else torch.float64
    drawn = [torch.randn((1, WIDTH, 1, 1), generator=twin, dtype=dtype).flatten().numpy() for _ in range(draws)]
    return start, np.asarray(drawn, np.float64).reshape(draws, WIDTH), x.flatten().numpy()


def folded(recurrence: Recurrence, positions: list[int] | None, start: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The plan by its definition, in float64."""
    plan = fold(recurrence, None, positions)
    x, outputs, predicted = plan.initial_scale * start, [], []
    for k in range(plan.evaluations):
        outputs.append(answer(plan.input_scale[k] * x, float(plan.timesteps[k])))
        if plan.prediction is not None:
            predicted.append(plan.prediction.at(k, x[None], outputs[k][None])[0])
        x = plan.state[k] * x + plan.noise[k] @ drawn
        x = x + sum(plan.prediction.weights[k, j] * one for j, one in enumerate(predicted))
        x = x + sum(plan.conditional[k, j] * output for j, output in enumerate(outputs))
    return x


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("positions", [None, [0, 1, 4, 6]], ids=["all", "half"])
def test_the_fold_is_the_loop_on_the_same_draws(name: str, positions: list[int] | None) -> None:
    """Calls that are skipped repeat the newest output, and their noise is added all the same."""
    scheduler, config, step, counted, _ = CASES[name]
    found = probed(SamplerSpec(scheduler=scheduler, config=config, steps=STEPS, step=step))
    assert found.recurrence.draws == len(found.kept) == counted
    for seed in (1, 2):
        start, drawn, wanted = own_loop(name, seed, None if positions is None else set(positions))
        received = folded(found.recurrence, positions, start, drawn[found.kept])
        assert np.linalg.norm(received - wanted) < REPLAY * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", BOUNDED)
def test_the_fold_bounds_what_the_scheduler_bounds(name: str) -> None:
    scheduler, config, step, counted, _ = BOUNDED[name]
    found = probed(SamplerSpec(scheduler=scheduler, config=config, steps=STEPS, step=step))
    assert found.recurrence.prediction is not None and found.recurrence.draws == counted
    for seed in (1, 2):
        start, drawn, wanted = own_loop(name, seed)
        received = folded(found.recurrence, None, start, drawn[found.kept])
        assert np.linalg.norm(received - wanted) < REPLAY * np.linalg.norm(wanted)


def test_probing_leaves_the_scheduler_and_the_generator_alone() -> None:
    from diffusers.schedulers import scheduling_lcm

    before, state = scheduling_lcm.randn_tensor, torch.random.get_rng_state()
    probed(SamplerSpec(scheduler="LCMScheduler", steps=4))
    assert scheduling_lcm.randn_tensor is before and torch.equal(torch.random.get_rng_state(), state)
