"""Roles and loop of a denoiser, inferred from how a pipeline called it.

The latent is the argument that follows the scheduler's sample, the timestep the one that follows its timestep; what
does not change from step to step is a condition when it has a row for each sample, else a constant. Guidance shows in
a doubled batch or in two calls a step, and its scale in what the scheduler was given.
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
from .calling import dotted, flatten, prediction
from .recorder import Call, Recording, Step
from .sampler import probe, refuse_partial_grid
from .schedulers import own_config

TOLERANCE = 1e-4  # relative; pipelines compute in float32
IGNORED_ARGUMENTS = ("num_inference_steps", "device", "self")


@dataclass(frozen=True)
class Branch:
    """The arguments of one guidance branch, cut to one row for each sample, and the prediction for them."""

    arguments: dict[str, Any]
    output: torch.Tensor


@dataclass(frozen=True)
class Inferred:
    """What a recording says.

    Attributes:
        loop: roles, sampler and guidance.
        kwargs: one example call of the conditional branch.
        unconditional: conditions of the other branch in that call, where the caller supplies them.
    """

    loop: LoopSpec
    kwargs: dict[str, Any]
    unconditional: dict[str, torch.Tensor]


def infer(recorded: Recording, scheduler: Any, batch: int, steps: int) -> Inferred:
    """Describe the loop a pipeline runs.

    Args:
        recorded: its first two steps.
        scheduler: the pipeline's.
        batch: how many samples the pipeline was asked for.
        steps: the pipeline's default number of steps.

    Raises:
        UsageError: the pipeline does something the fold cannot hold; the message says what.
    """
    refuse_partial_grid(recorded.begin_index, steps)
    if len(recorded.steps) < 2 or not recorded.steps[1].calls:
        raise UsageError("the pipeline ended before its second step: expected a loop of scheduler steps.")
    first, second = recorded.steps
    latent = _latent(first, batch)
    conditional, unconditional, scale = _branches(first, latent, batch)
    later, _, _ = _branches(second, _latent(second, batch), batch)
    state = _state(conditional, latent)
    timestep, timestep_scale = _timestep(conditional, later, first.timestep, second.timestep)
    inputs = _inputs(conditional, later, state, timestep, batch)
    kwargs = _example(conditional.arguments, latent, state, timestep, batch)
    loop = LoopSpec(
        inputs=inputs,
        sampler=_sampler(recorded, scheduler, steps, timestep_scale),
        guidance=_guidance(conditional, unconditional, inputs, scale),
        latent=LatentSpec(shape=tuple(latent.shape[1:])),
        constants=_plain_constants(kwargs),
    )
    _replay(loop, first, second, batch, (conditional, state))
    return Inferred(loop, kwargs, _unconditional(loop, unconditional))


def _unconditional(loop: LoopSpec, branch: Branch | None) -> dict[str, torch.Tensor]:
    if branch is None or loop.guidance is None or loop.guidance.unconditional != "input":
        return {}
    tensors, _ = flatten(branch.arguments)
    return {name: tensors[name] for name, spec in loop.inputs.items() if spec.role == "condition" and name in tensors}


def _latent(step: Step, batch: int) -> torch.Tensor:
    """The latent of each sample; a pipeline may carry it twice, once for each branch."""
    return _one_of_two(step.sample, batch)


def _one_of_two(value: torch.Tensor, batch: int) -> torch.Tensor:
    return value[:batch] if len(value) == 2 * batch and torch.equal(value[:batch], value[batch:]) else value


def _branches(step: Step, latent: torch.Tensor, batch: int) -> tuple[Branch, Branch | None, float]:
    """Conditional branch, unconditional branch or None, and the guidance scale."""
    shape = tuple(latent.shape[1:])
    if len(step.calls) == 1 and len(step.calls[0].output) == batch:
        return Branch(step.calls[0].arguments, prediction(step.calls[0].output, shape)), None, 1.0
    if len(step.calls) == 1 and len(step.calls[0].output) == 2 * batch:
        one, two = (_half(step.calls[0], part, batch, shape) for part in (0, 1))
    elif len(step.calls) == 2 and all(len(call.output) == batch for call in step.calls):
        one, two = (Branch(call.arguments, prediction(call.output, shape)) for call in step.calls)
    else:
        rows = [len(call.output) for call in step.calls]
        raise UsageError(
            f"the pipeline calls its denoiser {len(rows)} times a step, with {rows} rows for {batch} samples; the fold "
            "holds one call, one with a doubled batch, or two. Write a loop.yaml for the denoiser alone."
        )
    guided = prediction(_one_of_two(step.guided, batch), shape)
    scale = _scale(guided, two.output, one.output)
    if scale >= 0.5:  # one + (1 - s) (two - one) says the same with the branches exchanged; scales are at least 1
        return two, one, scale
    return one, two, 1 - scale


def _half(call: Call, part: int, batch: int, shape: tuple[int, ...]) -> Branch:
    def cut(leaf: Any) -> Any:
        doubled = isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and len(leaf) == 2 * batch
        return leaf[part * batch : (part + 1) * batch] if doubled else leaf

    arguments = pytree.tree_map(cut, call.arguments)
    return Branch(arguments, prediction(cut(call.output), shape))


def _scale(guided: torch.Tensor, conditional: torch.Tensor, unconditional: torch.Tensor) -> float:
    """The s in `guided = unconditional + s (conditional - unconditional)`."""
    direction = (conditional - unconditional).double().flatten()
    offset = (guided - unconditional).double().flatten()
    scale = float(direction @ offset / (direction @ direction))
    if torch.linalg.norm(offset - scale * direction) > TOLERANCE * torch.linalg.norm(offset):
        raise UsageError(
            "the pipeline's guidance is not `unconditional + scale (conditional - unconditional)` (a rescaled or "
            "perturbed form), which does not fold. Turn that option off, or write a loop.yaml for the denoiser alone."
        )
    return round(scale, 4)


def _state(branch: Branch, latent: torch.Tensor) -> str:
    tensors, _ = flatten(branch.arguments)
    for name, value in tensors.items():
        if value.shape == latent.shape and _is_multiple(value, latent):
            return name
    raise UsageError(
        f"no denoiser input follows the latent {list(latent.shape)}: the pipeline adds to it or concatenates something "
        f"(inputs: {', '.join(f'{n} {list(v.shape)}' for n, v in tensors.items())}), which does not fold."
    )


def _is_multiple(value: torch.Tensor, of: torch.Tensor) -> bool:
    factor = float((value * of).sum() / (of * of).sum())
    return factor > 0 and bool(torch.linalg.norm(value - factor * of) <= TOLERANCE * torch.linalg.norm(value))


def _timestep(first: Branch, second: Branch, t: float, t_later: float) -> tuple[str, float]:
    """The input that is a fixed multiple of the scheduler's timestep, and that multiple."""
    for name, value in _numbers(first.arguments).items():
        later = _numbers(second.arguments).get(name)
        if later is None or value == later or not t:
            continue
        scale = value / t
        if scale > 0 and abs(later - scale * t_later) <= TOLERANCE * abs(value):
            return name, float(f"{scale:.6g}")
    raise UsageError(
        f"no denoiser input follows the scheduler's timestep ({t:g}, then {t_later:g}) by a fixed factor, which the fold "
        "expects. Write a loop.yaml for the denoiser alone."
    )


def _numbers(arguments: Mapping[str, Any]) -> dict[str, float]:
    """Arguments that are one number, alone or repeated."""
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


def _guidance(
    conditional: Branch, unconditional: Branch | None, inputs: Mapping[str, InputSpec], scale: float
) -> GuidanceSpec | None:
    """Class numbers of the unconditional branch are written down; embeddings are left to the caller."""
    if unconditional is None:
        return None
    here, there = flatten(conditional.arguments)[0], flatten(unconditional.arguments)[0]
    names = [name for name, spec in inputs.items() if spec.role == "condition" and name in there]
    differing = [name for name in names if not torch.equal(here[name], there[name])]
    values = {n: int(there[n][0]) for n in differing if there[n].ndim == 1 and not there[n].is_floating_point()}
    return GuidanceSpec(scale=scale, unconditional=values if values and len(values) == len(differing) else "input")


def _example(
    arguments: Mapping[str, Any], latent: torch.Tensor, state: str, timestep: str, batch: int
) -> dict[str, Any]:
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


def _sampler(recorded: Recording, scheduler: Any, steps: int, timestep_scale: float) -> SamplerSpec:
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
        step=_step_arguments(recorded, scheduler),
        timestep_scale=timestep_scale,
    )


def _step_arguments(recorded: Recording, scheduler: Any) -> dict[str, Any]:
    """Arguments of the scheduler's step, such as `eta`, where they are not the defaults of its class."""
    defaults = inspect.signature(type(scheduler).step).parameters
    return {
        name: value
        for name, value in recorded.steps[0].arguments.items()
        if isinstance(value, int | float | str) and value != defaults[name].default
    }


def _plain_grid(name: str, value: Any, steps: int) -> Any:
    if isinstance(value, torch.Tensor | np.ndarray | list | tuple):
        values = np.asarray(value, dtype=np.float64).reshape(-1)
        if name == "sigmas" and len(values) == steps and np.allclose(values, np.linspace(1, 1 / steps, steps)):
            return "linspace"
        return [float(entry) for entry in values]
    return float(value) if isinstance(value, np.floating) else value


def _replay(loop: LoopSpec, first: Step, second: Step, batch: int, called: tuple[Branch, str]) -> None:
    """Check the inferred loop against what was recorded: timesteps, input scale and the first update."""
    recurrence = probe(loop.sampler)
    branch, state = called
    latent, scaled = _latent(first, batch), flatten(branch.arguments)[0][state]
    guided = prediction(_one_of_two(first.guided, batch), loop.latent.shape)
    wanted = float(recurrence.state[0]) * latent + float(recurrence.outputs[0, 0]) * guided
    timesteps = np.array([first.timestep, second.timestep]) * loop.sampler.timestep_scale
    checks = {
        "the timesteps of the first two calls": np.allclose(recurrence.timesteps[:2], timesteps, rtol=TOLERANCE),
        "the scale of the latent": _close(scaled, float(recurrence.input_scale[0]) * latent),
        "the first update of the latent": _close(_latent(second, batch), wanted),
    }
    for what, holds in checks.items():
        if not holds:
            raise UsageError(
                f"the pipeline's loop is not that of its scheduler: {what} differs. It starts in the middle of the grid "
                "or changes the latent between steps; such a loop does not fold."
            )


def _close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool(torch.linalg.norm(got - wanted) <= TOLERANCE * torch.linalg.norm(wanted))
