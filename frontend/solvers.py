"""The same model under another solver or with fewer steps: the honest baselines of every schedule."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..loop.errors import UsageError
from ..loop.recurrence import Recurrence
from ..loop.solvers import AB2, adams_bashforth2
from ..loop.spec import SamplerSpec
from .sampler import probe
from .schedulers import config_keys, effective_config, scheduler_class

# What a model was trained for, by family of samplers: a solver that cannot express these would sample another model.
MODEL_KEYS: Mapping[str, tuple[str, ...]] = {
    "flow matching": ("num_train_timesteps", "shift", "use_dynamic_shifting", "shift_terminal", "invert_sigmas"),
    "EDM": ("num_train_timesteps", "sigma_data", "prediction_type"),
    "variance preserving": (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "rescale_betas_zero_snr",
    ),
}
# Where the calls stand. A default of the one class is no choice of the user, so only written keys are carried over.
GRID_KEYS = (
    "final_sigmas_type",
    "rho",
    "set_alpha_to_one",
    "sigma_max",
    "sigma_min",
    "sigma_schedule",
    "steps_offset",
    "timestep_spacing",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
)
BOUND_KEYS = ("clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value")
"""How the predicted sample is bounded, for solvers that can; one that cannot goes without, as its users do."""
WITHOUT_EFFECT = (None, False)  # values of a model key that a class without the key has too


def solver_spec(base: SamplerSpec, name: str | None, steps: int) -> SamplerSpec:
    """Describe the sampler of a model with another number of steps, and optionally another solver.

    Args:
        base: the sampler the model is shipped with.
        name: a diffusers scheduler class of the same family, `ab2`, or None for the solver of `base`. For `ab2` the
            result is the Euler sampler whose recurrence `adams_bashforth2` replaces.
        steps: number of steps.

    Raises:
        UsageError: the class is unknown, of another family, or cannot express the model's noise levels; or `base`
            lists its sigmas or timesteps one by one.
    """
    for key in ("sigmas", "timesteps"):
        if not isinstance(base.set_timesteps.get(key, "linspace"), str) and steps != base.steps:
            raise UsageError(
                f"sampler.set_timesteps lists {len(base.set_timesteps[key])} {key} one by one, which say nothing about "
                f"{steps} steps. Drop the baseline, or describe the grid by {key}: linspace or by configuration keys."
            )
    if name in (None, AB2, base.scheduler):
        return base.model_copy(update={"steps": steps})
    assert name is not None
    target = scheduler_class(name)
    family = _family(base.scheduler, base.config)
    config = _carried_config(base, name, target, family)
    return SamplerSpec(
        scheduler=name,
        config=config,
        steps=steps,
        set_timesteps=_carried_arguments(base, name, target, config),
        timestep_scale=base.timestep_scale,
        timestep_offset=base.timestep_offset,
        output_scale=base.output_scale,
    )


def solver_recurrence(base: SamplerSpec, name: str | None, steps: int) -> Recurrence:
    """Probe what `solver_spec` describes; `ab2` included.

    Raises:
        UsageError: as `solver_spec`, `probe` and `adams_bashforth2`.
    """
    recurrence = probe(solver_spec(base, name, steps))
    return adams_bashforth2(recurrence) if name == AB2 else recurrence


def _family(scheduler: str, config: Mapping[str, Any]) -> str:
    if scheduler.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return "flow matching"
    return "EDM" if scheduler.startswith("EDM") else "variance preserving"


def _carried_config(base: SamplerSpec, name: str, target: type[Any], family: str) -> dict[str, Any]:
    valid, effective = config_keys(target), dict(effective_config(base))
    config = {key: base.config[key] for key in GRID_KEYS if key in base.config and key in valid}
    if family == "flow matching":
        effective.setdefault("shift", effective.get("flow_shift", 1.0))
        if "use_flow_sigmas" in valid:
            config |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    if _family(name, config) != family:
        raise UsageError(
            f"solver {name} is of another family: {base.scheduler} samples a {family} model. Name one of the same "
            f"family, such as {_example(family)}."
        )
    for key in MODEL_KEYS[family]:
        own = "flow_shift" if key == "shift" and "flow_shift" in valid else key
        value = effective.get(key)
        if own in valid:
            config[own] = value
        elif value not in WITHOUT_EFFECT:
            raise UsageError(
                f"solver {name} has no key {key!r}, but {base.scheduler} samples this model with {key}={value!r}. "
                f"Name another solver, such as {_example(family)}."
            )
    if effective.get("use_dynamic_shifting"):
        config["time_shift_type"] = effective["time_shift_type"]
    if "clip_sample" in valid:
        config["clip_sample"] = bool(effective.get("clip_sample", False))
    return config | {key: effective[key] for key in BOUND_KEYS if key in valid and key in effective}


def _carried_arguments(base: SamplerSpec, name: str, target: type[Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `set_timesteps` the target takes too; without `sigmas` it uses the grid it is known for."""
    accepted = inspect.signature(target.set_timesteps).parameters
    if "mu" in base.set_timesteps and "mu" not in accepted:
        raise UsageError(
            f"solver {name} takes no mu, but {base.scheduler} shifts this model's grid by mu="
            f"{base.set_timesteps['mu']!r}. Name another solver, such as UniPCMultistepScheduler."
        )
    carried = {key: value for key, value in base.set_timesteps.items() if key in accepted}
    flow_only = "sigmas" in carried and _family(name, config) != "flow matching"
    return {key: value for key, value in carried.items() if not (flow_only and key == "sigmas")}


def _example(family: str) -> str:
    return {
        "flow matching": "FlowMatchHeunDiscreteScheduler or UniPCMultistepScheduler",
        "EDM": "EDMDPMSolverMultistepScheduler or EDMEulerScheduler",
        "variance preserving": "DPMSolverMultistepScheduler or UniPCMultistepScheduler",
    }[family]
