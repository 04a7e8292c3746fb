"""Diffusers schedulers by name: find the class, check the configuration, set the grid.

Reading is defensive because the names come from a user's file: everything that diffusers would answer with a warning,
a silent default or a traceback is a `UsageError` here.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from math import inf
from typing import Any

import numpy as np

from ..loop.errors import UsageError, nearest
from ..loop.spec import MOST_STEPS, SamplerSpec
from .notes import report_ignored

logger = logging.getLogger(__name__)

# What a third-party scheduler raises when it is called in a way it does not like.
SCHEDULER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
MOST_CALLS = 2 * MOST_STEPS  # a solver of second order makes two in a step
LARGEST_GRID = 1_000_000  # timesteps of training; models are trained on 1,000
GRID_ARGUMENTS = ("sigmas", "timesteps")  # either replaces the number of steps, as diffusers pipelines do


def scheduler_names() -> list[str]:
    """The names of all scheduler classes of the installed diffusers."""
    import diffusers

    return sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))


def scheduler_class(name: str) -> type[Any]:
    """Find a diffusers scheduler class.

    Raises:
        UsageError: there is no such class, it is no scheduler, or a package it needs is missing.
    """
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    try:
        found = getattr(diffusers, name)
    except (AttributeError, ImportError):
        raise UsageError(
            f"sampler.scheduler: diffusers has no class {name!r}; {nearest(name, scheduler_names())}"
        ) from None
    packages = getattr(found, "_backends", None)  # diffusers' placeholder for a class whose package is missing
    if packages is not None:
        raise UsageError(f"sampler.scheduler: {name} needs the packages {', '.join(packages)}; install them.")
    if not (inspect.isclass(found) and issubclass(found, SchedulerMixin)) or found is SchedulerMixin:
        raise UsageError(
            f"sampler.scheduler: expected a scheduler class of diffusers; {name} is none; "
            f"{nearest(name, scheduler_names())}"
        )
    return found


def config_keys(cls: type[Any]) -> dict[str, Any]:
    """The configuration keys of a scheduler class with their defaults."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD}


def own_config(scheduler: Any) -> dict[str, Any]:
    """The configuration of a loaded scheduler as a `loop.yaml` can hold it.

    Left out are the keys that its class does not have, as diffusers leaves them unread, and infinite defaults such as
    `lambda_min_clipped`, which JSON has no word for.
    """
    defaults = config_keys(type(scheduler))
    config = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
    report_ignored("scheduler", type(scheduler).__name__, [key for key in config if key not in defaults])
    return {
        key: value
        for key, value in config.items()
        if key in defaults and not (value in (inf, -inf) and value == defaults[key])
    }


def build(sampler: SamplerSpec) -> Any:
    """Instantiate the scheduler of a sampler and set its grid.

    Keys that begin with an underscore are diffusers' own bookkeeping (`_class_name`) and are ignored.

    Returns:
        a fresh scheduler whose `timesteps` hold one entry for each denoiser call.

    Raises:
        UsageError: the class, a configuration key or an argument of `set_timesteps` is unknown or not accepted.
    """
    cls = scheduler_class(sampler.scheduler)
    config = {key: value for key, value in sampler.config.items() if not key.startswith("_")}
    valid = config_keys(cls)
    for key, value in config.items():
        if key not in valid:
            raise UsageError(_unknown_key(sampler.scheduler, key, value, list(valid)))
    _refuse_large("sampler.config", config)
    try:
        scheduler = cls(**config)
    except SCHEDULER_ERRORS as error:
        raise UsageError(
            f"sampler.config: {sampler.scheduler} does not accept {config}: {type(error).__name__}: {error}. "
            "Correct the values."
        ) from None
    _set_grid(scheduler, sampler)
    return scheduler


def _refuse_large(where: str, values: Mapping[str, Any]) -> None:
    """Schedulers make tables as long as their training grid, before they look at anything else."""
    for key, value in values.items():
        if isinstance(value, int) and abs(value) > LARGEST_GRID:
            raise UsageError(f"{where}.{key}: expected at most {LARGEST_GRID}; received {value}.")


def _require_grid(scheduler: Any, name: str) -> None:
    """Refuse a grid without a step in it, and one of more calls than a fold holds."""
    times = np.asarray(scheduler.timesteps, np.float64)
    if times.size > MOST_CALLS:
        raise UsageError(
            f"sampler.set_timesteps: expected at most {MOST_CALLS} calls of the denoiser; {name} makes {times.size}. "
            "Take fewer steps."
        )
    if times.size > 1 and (times == times[0]).all():
        raise UsageError(
            f"sampler.set_timesteps: expected a grid of {name} that goes from noise to sample; received {times.size} "
            f"times the timestep {times[0]:g}."
        )


def _unknown_key(scheduler: str, key: str, value: Any, valid: list[str]) -> str:
    if key == "eta":
        return (
            f"sampler.config: {scheduler} takes eta as an argument of a step; received eta={value!r}. Write "
            f"step: {{eta: {value!r:.20}}} beside config; eta > 0 draws noise in every step."
        )
    return f"sampler.config: {scheduler} has no key {key!r}; {nearest(key, valid)}"


def _set_grid(scheduler: Any, sampler: SamplerSpec) -> None:
    name = sampler.scheduler
    arguments = {key: _grid_value(name, key, value, sampler.steps) for key, value in sampler.set_timesteps.items()}
    if not hasattr(scheduler, "set_timesteps"):
        raise UsageError(f"sampler.scheduler: {name} has no set_timesteps; choose another scheduler.")
    valid = [key for key in inspect.signature(scheduler.set_timesteps).parameters if key not in ("device", "kwargs")]
    for key in arguments:
        if key not in valid or key == "num_inference_steps":
            choices = [choice for choice in valid if choice != "num_inference_steps"]
            hint = nearest(key, choices) if choices else "it takes no argument besides the number of steps."
            raise UsageError(f"sampler.set_timesteps: {name} does not take {key!r}; {hint}")
    explicit = any(key in arguments for key in GRID_ARGUMENTS)
    if not explicit:
        arguments["num_inference_steps"] = sampler.steps
    try:
        scheduler.set_timesteps(**arguments)
    except SCHEDULER_ERRORS as error:
        raise UsageError(
            f"sampler.set_timesteps: {name} refuses {sampler.steps} steps with {dict(sampler.set_timesteps)}: "
            f"{type(error).__name__}: {error}. "
            "Correct the arguments."
        ) from None
    _require_grid(scheduler, name)
    made = getattr(scheduler, "num_inference_steps", None)
    if explicit and made is not None and made != sampler.steps:
        raise UsageError(
            f"sampler.set_timesteps: the values given to {name} make {made} steps, sampler.steps says "
            f"{sampler.steps}; make them agree."
        )


def _grid_value(scheduler: str, key: str, value: Any, steps: int) -> Any:
    """The word `linspace` stands for the sigmas of the FLUX pipeline; anything else passes on."""
    if not isinstance(value, str):
        return value
    if key == "sigmas" and value == "linspace":
        return np.linspace(1.0, 1.0 / steps, steps)
    raise UsageError(
        f"sampler.set_timesteps: {key} of {scheduler} must be a number or a list of numbers (sigmas may also be "
        f"'linspace'); received {value!r}."
    )


def effective_config(sampler: SamplerSpec) -> Mapping[str, Any]:
    """The configuration of a sampler with the defaults of its class filled in."""
    return config_keys(scheduler_class(sampler.scheduler)) | dict(sampler.config)
