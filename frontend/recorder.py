"""A recorder on the denoiser and the scheduler of a diffusers pipeline: how they are really called."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

NOT_ITS_OWN = ("model_output", "timestep", "sample", "generator", "return_dict", "kwargs")
"""Arguments of a scheduler's step that every loop gives."""
STEPS = 2  # enough to tell what changes from step to step


@dataclass(frozen=True)
class Call:
    """One denoiser call: its arguments by name, and what the recorder answered."""

    arguments: dict[str, Any]
    output: torch.Tensor


@dataclass
class Step:
    """The denoiser calls before one scheduler step, and the step.

    Attributes:
        calls: in order.
        timestep: what the scheduler was given.
        guided: the output the scheduler was given, guidance applied.
        sample: the latent it was given.
        arguments: the others it was given, such as `eta`.
    """

    calls: list[Call] = field(default_factory=list)
    timestep: float = 0.0
    guided: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    sample: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class Recording:
    """What a pipeline did in its first steps."""

    steps: list[Step] = field(default_factory=list)
    set_timesteps: dict[str, Any] = field(default_factory=dict)
    begin_index: int | None = None


class Recorded(BaseException):
    """Enough was recorded; ends the pipeline's call."""


@contextmanager
def recording(denoiser: torch.nn.Module, scheduler: Any) -> Iterator[Recording]:
    """Record a pipeline's first two steps, then end its call.

    The first denoiser call runs, to learn the shape of its output. Every call is answered with noise of that shape:
    the two branches of guidance then differ clearly, whatever the weights.
    """
    found = Recording(steps=[Step()])
    patches: list[tuple[Any, str, Any]] = [
        (denoiser, "forward", _denoise(denoiser, found)),
        (scheduler, "set_timesteps", _set_timesteps(scheduler, found)),
        (scheduler, "step", _step(scheduler, found)),
    ]
    if hasattr(scheduler, "set_begin_index"):
        patches.append((scheduler, "set_begin_index", _set_begin_index(scheduler, found)))
    for owner, name, patched in patches:
        object.__setattr__(owner, name, patched)
    try:
        yield found
    except Recorded:
        pass
    finally:
        for owner, name, _ in patches:
            object.__delattr__(owner, name)
        found.steps = found.steps[:STEPS]


def _denoise(denoiser: torch.nn.Module, found: Recording) -> Callable[..., Any]:
    original = denoiser.forward
    signature = inspect.signature(original)
    answers: list[Any] = []
    generator = torch.Generator().manual_seed(0)

    def noise(leaf: Any) -> Any:
        return torch.randn(leaf.shape, generator=generator) if isinstance(leaf, torch.Tensor) else leaf

    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments = _cloned(dict(signature.bind(*args, **kwargs).arguments))
        arguments |= arguments.pop("kwargs", {}) if isinstance(arguments.get("kwargs"), dict) else {}
        if not answers:
            with torch.no_grad():
                answers.append(original(*args, **kwargs))
        answer = pytree.tree_map(noise, answers[0])
        first = next(leaf for leaf in pytree.tree_leaves(answer) if isinstance(leaf, torch.Tensor))
        found.steps[-1].calls.append(Call(arguments, first.clone()))
        return answer

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def _step(scheduler: Any, found: Recording) -> Callable[..., Any]:
    original = scheduler.step
    signature = inspect.signature(original)

    def step(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        current = found.steps[-1]
        current.timestep = float(given["timestep"])
        current.guided, current.sample = given["model_output"].clone(), given["sample"].clone()
        current.arguments = {name: value for name, value in given.items() if name not in NOT_ITS_OWN}
        if len(found.steps) == STEPS:
            raise Recorded
        found.steps.append(Step())
        return original(*args, **kwargs)

    step.__signature__ = signature  # type: ignore[attr-defined]
    return step


def _set_timesteps(scheduler: Any, found: Recording) -> Callable[..., Any]:
    original = scheduler.set_timesteps
    signature = inspect.signature(original)

    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        found.set_timesteps = copy.deepcopy(dict(signature.bind(*args, **kwargs).arguments))
        return original(*args, **kwargs)

    set_timesteps.__signature__ = signature  # type: ignore[attr-defined]
    return set_timesteps


def _set_begin_index(scheduler: Any, found: Recording) -> Callable[..., Any]:
    original = scheduler.set_begin_index

    def set_begin_index(begin_index: int = 0) -> Any:
        found.begin_index = begin_index
        return original(begin_index)

    return set_begin_index


def _cloned(values: dict[str, Any]) -> dict[str, Any]:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, values)
