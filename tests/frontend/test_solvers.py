"""Other solvers and step counts sample the same model, or say why they cannot."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest

from stepfold.frontend.sampler import probe
from stepfold.frontend.solvers import solver_recurrence, solver_spec
from stepfold.loop.errors import UsageError
from stepfold.loop.recurrence import Recurrence
from stepfold.loop.solvers import adams_bashforth2
from stepfold.loop.spec import SamplerSpec

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::DeprecationWarning:numpy")

FLOW = SamplerSpec(
    scheduler="FlowMatchEulerDiscreteScheduler",
    config={"num_train_timesteps": 1000, "shift": 2.0},
    steps=50,
    set_timesteps={"sigmas": "linspace"},
)
SHIFTED = SamplerSpec(
    scheduler="FlowMatchEulerDiscreteScheduler",
    config={"use_dynamic_shifting": True},
    steps=50,
    set_timesteps={"sigmas": "linspace", "mu": 0.9},
)
NOISE = SamplerSpec(
    scheduler="DDIMScheduler",
    config={"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False},
    steps=50,
)
SPREAD = 0.5  # standard deviation of the data the denoisers below know exactly


def run(recurrence: Recurrence, denoiser) -> float:
    """What becomes of noise 1.0."""
    x, outputs = recurrence.initial_scale, np.zeros(recurrence.calls)
    for i in range(recurrence.calls):
        outputs[i] = denoiser(recurrence.input_scale[i] * x, recurrence.timesteps[i])
        x = recurrence.state[i] * x + recurrence.outputs[i] @ outputs
    return x


def flow_denoiser(z: float, t: float) -> float:
    """noise - data expected at z = (1 - s) data + s noise, for data of standard deviation SPREAD."""
    s = t / 1000.0
    return z * (s - (1 - s) * SPREAD**2) / ((1 - s) ** 2 * SPREAD**2 + s**2)


def noise_denoiser(z: float, t: float) -> float:
    """Noise expected at z = sqrt(a) data + sqrt(1 - a) noise."""
    known = diffusers.DDIMScheduler(**NOISE.config).alphas_cumprod.double().numpy()
    a = float(np.interp(t, np.arange(1000), known))
    return z * np.sqrt(1 - a) / (a * SPREAD**2 + 1 - a)


@pytest.mark.parametrize(
    "name",
    [
        "FlowMatchHeunDiscreteScheduler",
        "UniPCMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "ab2",
    ],
)
def test_flow_solvers_sample_the_same_model(name: str) -> None:
    """The flow carries noise of deviation 1 to data of deviation SPREAD; the noise 1.0 must become SPREAD."""
    assert abs(run(solver_recurrence(FLOW, name, 60), flow_denoiser) - SPREAD) < 0.02 * SPREAD


@pytest.mark.parametrize(
    "name",
    [
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "PNDMScheduler",
        "LMSDiscreteScheduler",
        "DEISMultistepScheduler",
    ],
)
def test_noise_solvers_sample_the_same_model(name: str) -> None:
    """At many steps all agree with DDIM; without the betas of the base they would be tens of per cent off."""
    expected = run(probe(NOISE.model_copy(update={"steps": 500})), noise_denoiser)
    assert abs(run(solver_recurrence(NOISE, name, 100), noise_denoiser) - expected) < 0.03 * expected


def test_fewer_steps_keep_everything_else() -> None:
    spec = solver_spec(FLOW, None, 13)
    assert spec == FLOW.model_copy(update={"steps": 13}) == solver_spec(FLOW, FLOW.scheduler, 13)
    assert probe(spec).timesteps[0] == 1000.0 and probe(spec).calls == 13


def test_ab2_is_the_euler_grid_with_other_weights() -> None:
    euler = probe(solver_spec(FLOW, "ab2", 9))
    received = solver_recurrence(FLOW, "ab2", 9)
    np.testing.assert_array_equal(received.timesteps, euler.timesteps)
    np.testing.assert_array_equal(received.outputs, adams_bashforth2(euler).outputs)
    assert not np.array_equal(received.outputs, euler.outputs)


def test_ab2_needs_an_euler_base() -> None:
    with pytest.raises(UsageError, match="'ab2' replaces an Euler step"):
        solver_recurrence(NOISE, "ab2", 10)


def test_flow_keys_are_translated() -> None:
    spec = solver_spec(FLOW, "UniPCMultistepScheduler", 10)
    assert spec.config["flow_shift"] == 2.0 and "shift" not in spec.config
    assert spec.config["use_flow_sigmas"] and spec.config["prediction_type"] == "flow_prediction"
    assert spec.set_timesteps == {"sigmas": "linspace"}
    assert solver_spec(FLOW, "DPMSolverMultistepScheduler", 10).set_timesteps == {}  # it takes no sigmas


def test_flow_keys_are_translated_back() -> None:
    base = SamplerSpec(
        scheduler="UniPCMultistepScheduler",
        config={"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
        steps=20,
    )
    spec = solver_spec(base, "FlowMatchEulerDiscreteScheduler", 10)
    assert spec.config["shift"] == 3.0 and "prediction_type" not in spec.config


def test_dynamic_shift_is_carried_over() -> None:
    spec = solver_spec(SHIFTED, "UniPCMultistepScheduler", 10)
    assert spec.config["use_dynamic_shifting"] and spec.config["time_shift_type"] == "exponential"
    assert spec.set_timesteps["mu"] == 0.9
    expected = probe(solver_spec(SHIFTED, None, 10)).timesteps
    np.testing.assert_allclose(probe(spec).timesteps, expected, atol=1.0)  # UniPC cuts its timesteps to integers


def test_only_written_grid_keys_are_carried_over() -> None:
    """DDIM's own default `leading` is no choice of the user; `trailing` written out is."""
    assert "timestep_spacing" not in solver_spec(NOISE, "DPMSolverMultistepScheduler", 10).config
    trailing = NOISE.model_copy(update={"config": NOISE.config | {"timestep_spacing": "trailing"}})
    assert solver_spec(trailing, "DPMSolverMultistepScheduler", 10).config["timestep_spacing"] == "trailing"


def test_unclipped_base_gives_an_unclipped_ddim() -> None:
    base = SamplerSpec(scheduler="EulerDiscreteScheduler", steps=50)
    assert solver_spec(base, "DDIMScheduler", 10).config["clip_sample"] is False
    assert solver_recurrence(base, "DDIMScheduler", 10).calls == 10


def refusal(base: SamplerSpec, name: str | None, **update: Any) -> str:
    with pytest.raises(UsageError) as caught:
        solver_spec(base.model_copy(update=update), name, 10)
    return str(caught.value)


def test_unknown_solver_names_the_nearest() -> None:
    assert "did you mean 'UniPCMultistepScheduler'?" in refusal(FLOW, "UniPCMultistep")


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "EDMEulerScheduler"])
def test_flow_model_refuses_other_families(name: str) -> None:
    message = refusal(FLOW, name)
    assert f"solver {name} is of another family: FlowMatchEulerDiscreteScheduler samples a flow matching" in message
    assert "FlowMatchHeunDiscreteScheduler" in message


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_noise_model_refuses_other_families(name: str) -> None:
    assert f"solver {name} is of another family" in refusal(NOISE, name)


def test_solver_that_cannot_express_the_noise_levels_is_refused() -> None:
    assert "IPNDMScheduler has no key 'beta_start', but DDIMScheduler" in refusal(NOISE, "IPNDMScheduler")
    zero = {"config": NOISE.config | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}}
    assert "has no key 'rescale_betas_zero_snr'" in refusal(NOISE, "HeunDiscreteScheduler", **zero)
    assert "has no key 'use_dynamic_shifting'" in refusal(SHIFTED, "FlowMatchHeunDiscreteScheduler")


@pytest.mark.parametrize("key", ["sigmas", "timesteps"])
def test_listed_grid_cannot_change_its_length(key: str) -> None:
    message = refusal(FLOW, None, set_timesteps={key: [1.0, 0.5, 0.2]}, steps=3)
    assert f"lists 3 {key} one by one, which say nothing about 10 steps" in message
