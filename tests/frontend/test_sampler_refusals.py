"""Schedulers that do not fold are refused with their reason, whether a key tells it or only running them."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from stepfold.frontend.sampler import probe, refuse_partial_grid
from stepfold.frontend.schedulers import scheduler_names
from stepfold.loop.errors import UsageError
from stepfold.loop.spec import SamplerSpec

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::DeprecationWarning:numpy")


def refusal(name: str, steps: int = 6, config: dict[str, Any] | None = None, **arguments: Any) -> str:
    with pytest.raises(UsageError) as caught:
        probe(SamplerSpec(scheduler=name, config=config or {}, steps=steps, set_timesteps=arguments))
    assert caught.value.exit_code == 2
    return str(caught.value)


class OtherNoise(SchedulerMixin, ConfigMixin):
    """A scheduler that is random by its own means: by the global generator, or in the size of its draws."""

    order = 1

    @register_to_config
    def __init__(self, wide: bool = False):
        self.set_timesteps(1)

    def set_timesteps(self, num_inference_steps: int) -> None:
        self.timesteps = torch.linspace(1000, 1, num_inference_steps)

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        if self.config.wide:
            return (sample - model_output * randn_tensor((1,), generator=generator),)
        return (sample - model_output + torch.randn(sample.shape),)


@pytest.mark.parametrize("wide", [False, True])
def test_other_noise_is_refused(monkeypatch: pytest.MonkeyPatch, wide: bool) -> None:
    monkeypatch.setattr(diffusers, "OtherNoise", OtherNoise, raising=False)
    message = refusal("OtherNoise", config={"wide": wide})
    assert message.startswith("OtherNoise: stochastic: it adds noise of a kind that the fold does not hold")
    assert message.endswith("EulerDiscreteScheduler.")


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_learned_variance_is_refused(variance: str) -> None:
    message = refusal("DPMSolverMultistepScheduler", config={"variance_type": variance})
    assert f"variance_type {variance!r} takes half of the denoiser output" in message and "remove the key" in message


def test_unknown_class_names_the_nearest() -> None:
    message = refusal("EulerDiscretScheduler")
    assert "diffusers has no class 'EulerDiscretScheduler'" in message
    assert "did you mean 'EulerDiscreteScheduler'?" in message


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "SchedulerMixin", "DiffusionPipeline"])
def test_class_that_is_no_scheduler_is_refused(name: str) -> None:
    assert f"expected a scheduler class of diffusers; {name} is none" in refusal(name)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    placeholder = type("SdeScheduler", (), {"_backends": ["torch", "torchsde"]})
    monkeypatch.setattr(diffusers, "SdeScheduler", placeholder, raising=False)
    assert "SdeScheduler needs the packages torch, torchsde; install them." in refusal("SdeScheduler")


def test_unknown_config_key_names_the_nearest() -> None:
    message = refusal("DDIMScheduler", config={"clip_samples": False})
    assert message == "sampler.config: DDIMScheduler has no key 'clip_samples'; did you mean 'clip_sample'?"


def test_eta_is_explained() -> None:
    message = refusal("DDIMScheduler", config={"clip_sample": False, "eta": 1.0})
    assert "Write step: {eta: 1.0} beside config; eta > 0 draws noise in every step." in message


def test_an_argument_that_no_step_takes_names_the_nearest() -> None:
    spec = SamplerSpec(scheduler="DDIMScheduler", config={"clip_sample": False}, steps=4, step={"etaa": 0.0})
    with pytest.raises(
        UsageError, match=r"^sampler.step: a step of DDIMScheduler does not take 'etaa'; did you mean 'eta'"
    ):
        probe(spec)
    spec = SamplerSpec(scheduler="PNDMScheduler", steps=4, step={"eta": 0.0})
    with pytest.raises(UsageError, match="PNDMScheduler does not take 'eta'; it takes no argument of this kind"):
        probe(spec)


def test_config_value_the_class_refuses() -> None:
    message = refusal("EulerDiscreteScheduler", config={"beta_schedule": "parabolic"})
    assert message.startswith("sampler.config: EulerDiscreteScheduler does not accept") and "parabolic" in message


@pytest.mark.parametrize(
    ("name", "config", "arguments", "expected"),
    [
        ("EulerDiscreteScheduler", {}, {"sigma": [1.0]}, "does not take 'sigma'; did you mean 'sigmas'?"),
        ("DDIMScheduler", {"clip_sample": False}, {"mu": 1.0}, "it takes no argument besides the number of steps"),
        ("EulerDiscreteScheduler", {}, {"num_inference_steps": 4}, "does not take 'num_inference_steps'"),
        ("FlowMatchEulerDiscreteScheduler", {}, {"timesteps": "linspace"}, "received 'linspace'"),
        ("FlowMatchEulerDiscreteScheduler", {}, {"sigmas": "cosine"}, "sigmas may also be 'linspace'"),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, {}, "`mu` must be passed"),
        ("FlowMatchEulerDiscreteScheduler", {}, {"sigmas": [1.0, 0.5]}, "make 2 steps, sampler.steps says 6"),
    ],
)
def test_grid_arguments_are_checked(
    name: str, config: dict[str, Any], arguments: dict[str, Any], expected: str
) -> None:
    message = refusal(name, config=config, **arguments)
    assert message.startswith("sampler.set_timesteps: ") and expected in message


def test_scheduler_with_a_loop_of_its_own_is_refused() -> None:
    assert "its step asks for model_output, timestep, sample, original_image, mask" in refusal("RePaintScheduler")
    assert "it has no method `step`" in refusal("ScoreSdeVeScheduler")


def test_division_by_zero_is_told() -> None:
    message = refusal("DPMSolverMultistepScheduler", steps=1000)
    assert "divides by zero" in message and "Take fewer steps" in message


class Toy(SchedulerMixin, ConfigMixin):
    """x <- x - v / S, the base of the misbehaving ones below."""

    @register_to_config
    def __init__(self) -> None:
        self.timesteps = torch.zeros(0)

    def set_timesteps(self, num_inference_steps: int) -> None:
        self.timesteps = torch.arange(num_inference_steps, 0, -1)

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (sample - model_output / len(self.timesteps),)


class ClipsFarAway(Toy):
    """To a range that is none around zero."""

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (super().step(model_output, timestep, sample)[0].clamp(-8.0, 9.0),)


class ClipsTwice(Toy):
    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (super().step(model_output.clamp(-1.0, 1.0), timestep, sample)[0].clamp(-1.0, 1.0),)


class ClipsWider(Toy):
    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> tuple[torch.Tensor]:
        limit = 1.0 + float(timestep) / 1000
        return (super().step(model_output, timestep, sample)[0].clamp(-limit, limit),)


class ClipsWhatItRemembers(Toy):
    before: Any = 0.0

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> tuple[torch.Tensor]:
        result = super().step((model_output + self.before).clamp(-1.0, 1.0), timestep, sample)
        self.before = model_output
        return result


class Adapts(Toy):
    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> tuple[torch.Tensor]:
        result = super().step(model_output, timestep, sample)
        self.timesteps = self.timesteps[:-1]
        return result


class Normalizes(Toy):
    def scale_model_input(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        return sample / sample.norm()


class Shuffles(Toy):
    def scale_model_input(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        return sample.flip(1)


class Breaks(Toy):
    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> tuple[torch.Tensor]:
        raise RuntimeError("no fifth order here")


class Remembers(Toy):
    """Forgets the noise at the first call and reads it again at the third."""

    first: Any = None

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> tuple[torch.Tensor]:
        if self.first is None:
            self.first = sample
            return (model_output,)
        return (self.first + model_output if int(timestep) == 1 else sample + model_output,)


@pytest.mark.parametrize(
    ("toy", "reason"),
    [
        (ClipsFarAway, "not a linear recurrence: a random run at magnitude 10 differs"),
        (ClipsTwice, "it bounds the latent twice at call 0"),
        (ClipsWider, "the range of its bound changes from call to call"),
        (
            ClipsWhatItRemembers,
            "at call 1 it bounds something else than what the latent and the output of that call predict",
        ),
        (Adapts, "An adaptive loop cannot be folded"),
        (Normalizes, "its input scale depends on the latent"),
        (Shuffles, "scale_model_input does more than multiply by a number"),
        (Breaks, "its step failed at call 0 of 3: RuntimeError: no fifth order here"),
        (Remembers, "reads the initial noise again after call 2 has forgotten it"),
    ],
)
def test_what_no_key_tells_is_found_by_running(toy: type, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "ToyScheduler", toy, raising=False)
    message = refusal("ToyScheduler", steps=3)
    assert message.startswith("ToyScheduler: ") and reason in message


def test_the_base_of_the_misbehaving_ones_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "ToyScheduler", Toy, raising=False)
    recurrence = probe(SamplerSpec(scheduler="ToyScheduler", steps=4))
    np.testing.assert_allclose(recurrence.outputs, np.diag(np.full(4, -0.25)))


@pytest.mark.parametrize("name", scheduler_names())
def test_every_scheduler_folds_or_says_why_not(name: str) -> None:
    """No other error than a usage error, which names the scheduler."""
    try:
        assert probe(SamplerSpec(scheduler=name, steps=4)).calls > 0
    except UsageError as error:
        assert name in str(error)


def test_start_in_the_middle_of_the_grid_is_refused() -> None:
    refuse_partial_grid(None, 20)
    refuse_partial_grid(0, 20)
    with pytest.raises(UsageError, match=r"starts at call 6 of 20 .*the fold holds the whole grid only") as caught:
        refuse_partial_grid(6, 20)
    assert "image-to-image" in str(caught.value).lower()
