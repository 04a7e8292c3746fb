"""Roles and loop of a denoiser, inferred from how a pipeline called it in its first two steps.

The latent is the argument that follows the scheduler's sample, the timestep the one that follows its timestep; what
does not change from step to step is a condition when it has a row for each sample, else a constant. Guidance shows in
a doubled batch or in two calls a step, and its scale in what the scheduler was given. `watch` holds all further steps
to what is inferred here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from ..loop.errors import UsageError
from ..loop.spec import GuidanceSpec, InputSpec, LatentSpec, LoopSpec, Role, SamplerSpec
from .arrangement import is_multiple
from .branches import TOLERANCE, Branch, Guided
from .calling import dotted, flatten
from .guidance import BY_HAND
from .recorder import Recording, Step
from .schedulers import own_config

IGNORED_ARGUMENTS = ("num_inference_steps", "device", "self")


@dataclass(frozen=True)
class Inferred:
    """What a recording says.

    Attributes:
        loop: roles, sampler and guidance.
        kwargs: one example call of the conditional branch.
        unconditional: conditions of the other branch in that call, where the caller supplies them.
        networks: [S] number of the network that each call runs; None where it is the same.
    """

    loop: LoopSpec
    kwargs: dict[str, Any]
    unconditional: dict[str, torch.Tensor]
    networks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Seen:
    """A step as it is judged.

    Attributes:
        step: step as it was recorded.
        guided: its branches.
        latent: latent of each sample.
    """

    step: Step
    guided: Guided
    latent: torch.Tensor


def infer(
    recorded: Recording, first: Seen, second: Seen | None, both: Guided, scheduler: Any, batch: int, steps: int
) -> Inferred:
    """Describe the loop a pipeline runs.

    Args:
        recorded: what it did around its steps.
        first: its first step.
        second: its second, None for a loop of one step.
        both: branches of its first step that has two, of the first step where none has.
        scheduler: the pipeline's.
        batch: how many samples the pipeline was asked for.
        steps: how many steps.

    Raises:
        UsageError: the pipeline does something the fold cannot hold; the message says what.
    """
    conditional, latent = first.guided.conditional, first.latent
    state = _state(conditional, latent)
    timestep = _timestep(first, second)
    inputs = _inputs(conditional, second.guided.conditional if second else conditional, state, timestep.name, batch)
    kwargs = _example(conditional.arguments, timestep.name, batch)
    loop = LoopSpec(
        inputs=inputs,
        sampler=_sampler(recorded, scheduler, steps, timestep, first),
        guidance=_guidance(both, inputs),
        latent=LatentSpec(shape=tuple(latent.shape[1:])),
        constants=_plain_constants(kwargs),
    )
    return Inferred(loop, kwargs, _unconditional(loop, both.unconditional))


def _unconditional(loop: LoopSpec, branch: Branch | None) -> dict[str, torch.Tensor]:
    if branch is None or loop.guidance is None or loop.guidance.unconditional != "input":
        return {}
    tensors, _ = flatten(branch.arguments)
    return {name: tensors[name] for name, spec in loop.inputs.items() if spec.role == "condition" and name in tensors}


def _state(branch: Branch, latent: torch.Tensor) -> str:
    tensors, _ = flatten(branch.arguments)
    for name, value in tensors.items():
        if value.shape == latent.shape and is_multiple(value, latent):
            return name
    raise UsageError(
        f"no denoiser input follows the latent {list(latent.shape)}: the pipeline adds to it or concatenates something "
        f"(inputs: {', '.join(f'{n} {list(v.shape)}' for n, v in tensors.items())}), which does not fold."
    )


@dataclass(frozen=True)
class _Timestep:
    """The input that is `scale` times the scheduler's timestep and `offset`."""

    name: str
    scale: float
    offset: float = 0.0


def _timestep(first: Seen, second: Seen | None) -> _Timestep:
    """The input that follows the scheduler's timestep; by a factor alone where one does."""
    t, values = first.step.timestep, numbers(first.guided.conditional.arguments)
    if second is None:
        return _only_timestep(t, values)
    t_later, later = second.step.timestep, numbers(second.guided.conditional.arguments)
    moving = [name for name, value in values.items() if name in later and value != later[name]]
    for name in moving:
        scale = values[name] / t if t else 0.0
        if scale and abs(later[name] - scale * t_later) <= TOLERANCE * abs(values[name]):
            return _Timestep(name, float(f"{scale:.6g}"))
    for name in moving if t != t_later else ():
        scale = (values[name] - later[name]) / (t - t_later)
        return _Timestep(name, float(f"{scale:.6g}"), float(f"{values[name] - scale * t:.6g}"))
    raise UsageError(
        f"no denoiser input follows the scheduler's timestep ({t:g}, then {t_later:g}), which the fold expects. {BY_HAND}"
    )


def _only_timestep(t: float, values: Mapping[str, float]) -> _Timestep:
    """The timestep of a loop of one step, by its name: one value follows anything."""
    for name, value in values.items():
        if name.rpartition(".")[2] in ("timestep", "timesteps", "t", "sigma") and t and value:
            return _Timestep(name, float(f"{value / t:.6g}"))
    raise UsageError(
        f"no denoiser input is called timestep, and the pipeline makes one step, so that none can be seen to follow the "
        f"scheduler's (inputs: {', '.join(values) or 'no numbers'}). {BY_HAND}"
    )


def numbers(arguments: Mapping[str, Any]) -> dict[str, float]:
    """Arguments that are one number, alone or repeated, by name."""
    tensors, constants = flatten(arguments)
    found = {n: float(v.flatten()[0]) for n, v in tensors.items() if v.numel() and bool((v == v.flatten()[0]).all())}
    return found | {n: float(v) for n, v in constants.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _inputs(first: Branch, second: Branch, state: str, timestep: str, batch: int) -> dict[str, InputSpec]:
    tensors, later = flatten(first.arguments)[0], flatten(second.arguments)[0]
    inputs = {state: InputSpec(role="state"), timestep: InputSpec(role="timestep")}
    for name, value in tensors.items():
        if name in inputs:
            continue
        if name not in later or not torch.equal(value, later[name]):
            raise UsageError(
                f"denoiser input {name!r} changes from step to step, and is neither the latent nor a multiple of the "
                "timestep; such a loop does not fold."
            )
        per_sample = value.ndim > 0 and len(value) == batch
        shape = tuple(value.shape[1:]) if per_sample else tuple(value.shape)
        role: Role = "condition" if per_sample else "constant"
        inputs[name] = InputSpec(role=role, shape=shape, dtype=str(value.dtype).removeprefix("torch."))
    return inputs


def _guidance(both: Guided, inputs: Mapping[str, InputSpec]) -> GuidanceSpec | None:
    """Class numbers of the unconditional branch are written down; embeddings are left to the caller."""
    conditional, unconditional = both.conditional, both.unconditional
    if unconditional is None:
        return None
    here, there = flatten(conditional.arguments)[0], flatten(unconditional.arguments)[0]
    names = [name for name, spec in inputs.items() if spec.role == "condition" and name in there]
    differing = [name for name in names if not torch.equal(here[name], there[name])]
    values = {n: int(there[n][0]) for n in differing if there[n].ndim == 1 and not there[n].is_floating_point()}
    return GuidanceSpec(scale=both.scale, unconditional=values if values and len(values) == len(differing) else "input")


def _example(arguments: Mapping[str, Any], timestep: str, batch: int) -> dict[str, Any]:
    """The recorded arguments without those that are None, with one timestep for each sample."""

    def leaf(path: Any, value: Any) -> Any:
        if dotted(path) == timestep:
            return torch.as_tensor(value, dtype=torch.float32).flatten()[:1].repeat(batch)
        return value

    given = {name: value for name, value in arguments.items() if value is not None}
    return pytree.tree_map_with_path(leaf, given)


def _plain_constants(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments without tensors, as YAML can hold them."""
    plain = {}
    for name, value in kwargs.items():
        leaves = pytree.tree_leaves(value)
        if leaves and all(isinstance(leaf, str | int | float | bool) for leaf in leaves) and name != "return_dict":
            plain[name] = value
    return plain


def _sampler(recorded: Recording, scheduler: Any, steps: int, timestep: _Timestep, first: Seen) -> SamplerSpec:
    arguments: dict[str, Any] = {}
    for name, value in recorded.set_timesteps.items():
        if name in IGNORED_ARGUMENTS or value is None:
            continue
        arguments[name] = _plain_grid(name, value, steps)
    return SamplerSpec(
        scheduler=type(scheduler).__name__,
        config=own_config(scheduler),
        steps=steps,
        set_timesteps=arguments,
        step=_step_arguments(first.step, scheduler),
        timestep_scale=timestep.scale,
        timestep_offset=timestep.offset,
        output_scale=first.guided.output_scale,
    )


def _step_arguments(step: Step, scheduler: Any) -> dict[str, Any]:
    """Arguments of the scheduler's step, such as `eta`, where they are not the defaults of its class."""
    defaults = inspect.signature(type(scheduler).step).parameters
    return {
        name: value
        for name, value in step.arguments.items()
        if isinstance(value, int | float | str) and value != defaults[name].default
    }


def _plain_grid(name: str, value: Any, steps: int) -> Any:
    if isinstance(value, torch.Tensor | np.ndarray | list | tuple):
        values = np.asarray(value, dtype=np.float64).reshape(-1)
        if name == "sigmas" and len(values) == steps and np.allclose(values, np.linspace(1, 1 / steps, steps)):
            return "linspace"
        return [float(entry) for entry in values]
    return float(value) if isinstance(value, np.floating) else value
