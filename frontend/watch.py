"""Every step of a pipeline, held to the loop that its first two steps say.

What happens later is as much a part of the loop: a second network that takes over, a latent that is changed between the
steps. Whatever the fold cannot say is refused, by its name and with its step. The scale of guidance may change from step to
step, or guidance stop; the rule by which guided outputs are rescaled is found from all steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..loop.errors import UsageError
from ..loop.spec import LoopSpec
from .arrangement import arranged
from .branches import TOLERANCE, Branch, Guided, clipped, fit, guided, of_samples, one_of_two
from .calling import flatten
from .guidance import BY_HAND, Guidance, in_all_steps
from .recorder import Recording, Step
from .roles import Inferred, Seen, infer, numbers
from .sampler import probed, refuse_partial_grid

NORMAL = 6.0  # deviations by which the noise of a pipeline may miss the standard normal


class GuidedLater(Exception):
    """The first steps of a loop have one branch, and this later one has two: watch it again with both in mind."""

    def __init__(self, guided: Guided):
        super().__init__("guidance begins later")
        self.guided = guided


class Watch:
    """Infers a loop from the first two steps that it is shown, and compares all of them with it.

    In memory are the arguments of the first steps and the outputs that a later update reads.
    """

    def __init__(self, scheduler: Any, batch: int, steps: int, guided: Guided | None = None):
        """Before the first step.

        Args:
            scheduler: the pipeline's.
            batch: how many samples the pipeline was asked for.
            steps: how many steps.
            guided: branches of a later step, where the first has one.
        """
        self._scheduler, self._batch, self._steps, self._guided = scheduler, batch, steps, guided
        self._first: Seen | None = None
        self._followed: _Followed | None = None

    def __call__(self, recorded: Recording, step: Step) -> None:
        """Judge the next step.

        Raises:
            GuidedLater: the first step with two branches comes behind others.
            UsageError: the pipeline does something that the fold cannot hold.
        """
        number = recorded.taken
        where = f"step {number + 1} of {len(self._scheduler.timesteps)}"
        _refuse_networks(step, where)
        step = arranged(step, self._batch)
        seen = Seen(step, guided(step, self._batch, where), one_of_two(step.sample, self._batch))
        if self._first is None:
            refuse_partial_grid(recorded.begin_index, self._steps)
            self._first = seen
            return
        if self._followed is None:
            self._follow(recorded, self._first, seen)
        assert self._followed is not None
        self._followed.check(number, seen)

    def finish(self, recorded: Recording) -> Inferred:
        """The loop, after the last step.

        Raises:
            UsageError: the pipeline made no step, or its loop does not end where that of its scheduler does.
        """
        if self._first is None:
            raise UsageError("the pipeline ended before its first step: expected a loop of scheduler steps.")
        if self._followed is None:
            self._follow(recorded, self._first, None)
        assert self._followed is not None
        calls = self._followed.recurrence.calls
        if recorded.rest:
            raise UsageError(
                f"behind step {recorded.taken}: the pipeline calls its denoiser {recorded.rest} more times after the "
                f"last step of its scheduler, which the fold does not hold. {BY_HAND}"
            )
        if recorded.taken != calls:
            raise UsageError(
                f"step {recorded.taken}: the pipeline ends its loop here; its scheduler has a grid of {calls}, and the "
                f"fold holds the whole of it. {BY_HAND}"
            )
        return self._followed.whole()

    def _follow(self, recorded: Recording, first: Seen, second: Seen | None) -> None:
        both = self._guided or first.guided
        inferred = infer(recorded, first, second, both, self._scheduler, self._batch, self._steps)
        self._followed = _Followed(inferred, first, both, self._batch)
        self._followed.check(0, first)


class _Followed:
    """An inferred loop, and where it stands after the steps that were compared with it."""

    def __init__(self, inferred: Inferred, first: Seen, both: Guided, batch: int):
        self._probed = probed(inferred.loop.sampler)
        self._inferred, self.recurrence = inferred, self._probed.recurrence
        self._both, self._guidance = both, Guidance()
        self._networks: list[int] = []  # which one each step called
        self._drawn: list[torch.Tensor] = []  # by the scheduler, those without a weight too
        self._loop: LoopSpec = inferred.loop
        self._first, self._batch = first, batch
        self._expected = first.latent  # where the next step begins
        self._outputs: dict[int, torch.Tensor] = {}  # that a later update reads
        self._predicted: dict[int, torch.Tensor] = {}  # and bounds

    def whole(self) -> Inferred:
        """The loop, what only all steps say of its guidance included.

        Raises:
            UsageError: the guided outputs are rescaled in a way that the fold does not hold.
        """
        loop, inferred = self._loop, self._inferred
        if any(self._networks):
            inferred = replace(inferred, networks=tuple(self._networks))
        if loop.guidance is None:
            return inferred
        guidance, factor = in_all_steps(loop.guidance, self._guidance), self._guidance.factor() or 1.0
        sampler = loop.sampler.model_copy(update={"output_scale": loop.sampler.output_scale * factor})
        return replace(inferred, loop=loop.model_copy(update={"guidance": guidance, "sampler": sampler}))

    def check(self, number: int, seen: Seen) -> None:
        """Raise UsageError where a step is not that of the loop."""
        calls = self.recurrence.calls
        where = f"step {number + 1} of {calls}"
        if number >= calls:
            raise UsageError(
                f"step {number + 1}: the pipeline makes one step more than the grid of its scheduler has ({calls}). "
                f"{BY_HAND}"
            )
        if number == 0:
            _require_noise(seen.latent / self.recurrence.initial_scale)
        else:
            _require_same_guidance(self._first.guided, self._both, seen.guided, where)
            _require_untouched(self._expected, seen.latent, where)
        if seen.step.arguments != self._first.step.arguments:
            raise UsageError(_other_arguments(self._first.step.arguments, seen.step.arguments, where))
        for branch in filter(None, (seen.guided.conditional, seen.guided.unconditional)):
            self._require_arguments(number, branch, seen.latent, where)
        self._require_same_call(seen.guided, where)
        self._advance(number, seen, where)
        self._networks.append(seen.step.calls[0].network)
        here, other = seen.guided, seen.guided.unconditional
        self._guidance.add(here.scale, here.output, here.conditional.output, other.output if other else None)

    def _require_arguments(self, number: int, branch: Branch, latent: torch.Tensor, where: str) -> None:
        """The latent and the timestep are those of the grid."""
        state, expected = self._loop.state, self.recurrence.timesteps[number]
        value = numbers(branch.arguments).get(self._loop.timestep)
        span = np.abs(self.recurrence.timesteps).max()
        if value is None or not abs(value - expected) <= TOLERANCE * span:
            raise UsageError(
                f"{where}: the pipeline's loop is not that of its scheduler: the denoiser is given the timestep "
                f"{'none' if value is None else f'{value:g}'}, and the grid of the scheduler says {expected:g}. It starts "
                f"in the middle of the grid, or sets other timesteps than it asks for. {BY_HAND}"
            )
        scaled = flatten(branch.arguments)[0].get(state)
        wanted = float(self.recurrence.input_scale[number]) * latent
        if scaled is None or scaled.shape != wanted.shape or not close(scaled, wanted):
            raise UsageError(
                f"{where}: the pipeline's loop is not that of its scheduler: the scale of the latent in {state!r} differs, "
                f"or something is added to it. {BY_HAND}"
            )

    def _require_same_call(self, here: Guided, where: str) -> None:
        """Nothing else changes from step to step, or from branch to branch where it is no condition."""
        first, both = self._first.guided, self._both.unconditional
        moving = {self._loop.state, self._loop.timestep}
        conditions = set(self._loop.conditions)
        pairs = [(first.conditional, here.conditional, moving, "step to step")]
        if both is not None and here.unconditional is not None:
            pairs.append((both, here.unconditional, moving, "step to step"))
            pairs.append((here.conditional, here.unconditional, moving | conditions, "branch to branch"))
        for one, other, aside, between in pairs:
            name = difference(one.arguments, other.arguments, aside)
            if name is not None:
                raise UsageError(
                    f"{where}: denoiser input {name!r} changes from {between}, and is neither the latent nor the "
                    f"timestep{'' if between == 'step to step' else ' nor a condition'}; such a loop does not fold. "
                    f"{BY_HAND}"
                )
        _require_same_shapes(here, conditions, where)

    def _advance(self, number: int, seen: Seen, where: str) -> None:
        """Replay the update of the scheduler."""
        weights, bounded = self.recurrence.outputs, self.recurrence.prediction
        self._outputs[number] = seen.guided.output
        self._expected = float(self.recurrence.state[number]) * seen.latent
        for j, output in self._outputs.items():
            if weights[number, j]:
                self._expected = self._expected + float(weights[number, j]) * output
        if bounded is not None:
            at = (value.double().numpy() for value in (seen.latent, seen.guided.output))
            self._predicted[number] = torch.from_numpy(bounded.at(number, *at)).to(seen.latent.dtype)
            for j, predicted in self._predicted.items():
                if bounded.weights[number, j]:
                    self._expected = self._expected + float(bounded.weights[number, j]) * predicted
            self._predicted = {j: kept for j, kept in self._predicted.items() if bounded.weights[number + 1 :, j].any()}
        self._outputs = {j: kept for j, kept in self._outputs.items() if weights[number + 1 :, j].any()}
        self._drawn += seen.step.draws
        for weight, draw in zip(self.recurrence.noise[number], self._probed.kept, strict=True):
            if weight and draw < len(self._drawn):
                self._expected = self._expected + float(weight) * of_samples(self._drawn[draw], self._batch)
        result = of_samples(seen.step.result, self._batch)
        if result.shape != self._expected.shape or not close(result, self._expected):
            raise UsageError(
                f"{where}: the scheduler answers another latent than its grid says "
                f"({_change(result, self._expected)}): the pipeline gives its step other arguments"
                f"{_named(seen.step.arguments)} or sets its grid by hand. {BY_HAND}"
            )


def close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two tensors of a shape are equal but for the rounding of float32."""
    return bool(torch.linalg.norm(got - wanted) <= TOLERANCE * torch.linalg.norm(wanted))


def difference(one: Mapping[str, Any], other: Mapping[str, Any], aside: set[str]) -> str | None:
    """The first argument that differs between two calls; those that are None or absent are the same."""
    here, there = ({**tensors, **plain} for tensors, plain in (flatten(one), flatten(other)))
    for name in [*here, *(name for name in there if name not in here)]:
        if name not in aside and not _equal(here.get(name), there.get(name)):
            return name
    return None


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return False
    plain = all(value is None or isinstance(value, str | int | float | bool) for value in (one, other))
    return one == other if plain else True  # an object that the pipeline hands on, such as a cache


def _refuse_networks(step: Step, where: str) -> None:
    if step.networks:
        names = " and ".join(f"{name} ({kind})" for name, kind in step.networks.items())
        raise UsageError(
            f"{where}: the pipeline calls {names} within its loop, "
            f"{'besides' if step.calls else 'in the place of'} the denoiser that is compiled; the fold holds one network "
            "for a step (an expert of the same class may take its place, a ControlNet or adapter stands beside it). Use a "
            "pipeline without it."
        )
    if len({call.network for call in step.calls}) > 1:
        raise UsageError(
            f"{where}: the pipeline calls two networks of one class in one step; the fold holds one network for a step. "
            f"{BY_HAND}"
        )


def _require_noise(noise: torch.Tensor) -> None:
    """The loop starts at standard normal noise, as every caller of a bundle gives it."""
    count = noise.numel()
    mean, deviation = float(noise.double().mean()), float(noise.double().std())
    if abs(mean) * count**0.5 > NORMAL or abs(deviation - 1.0) * (2 * count) ** 0.5 > NORMAL:
        raise UsageError(
            f"step 1: the pipeline starts at a latent of mean {mean:.3g} and deviation {deviation:.3g} in units of its "
            "scheduler's noise; the fold starts at standard normal noise. It starts at an image, scales the noise in its "
            f"own way or repeats it. {BY_HAND}"
        )


def _require_same_guidance(first: Guided, both: Guided, here: Guided, where: str) -> None:
    """Guidance has one form in all steps that have it, and outputs one factor.

    Raises:
        GuidedLater: this is the first step with two branches.
        UsageError: something else changes than the scale.
    """
    if both.unconditional is None and here.unconditional is not None:
        raise GuidedLater(here)
    alike = both if here.unconditional is not None else first
    if here.unconditional is not None and alike.rows != here.rows:
        raise UsageError(
            f"{where}: the pipeline calls its denoiser with {list(here.rows)} rows, and with {list(alike.rows)} before; the "
            f"fold holds one form of call for all steps. {BY_HAND}"
        )
    one, other = first.output_scale, here.output_scale
    if abs(one - other) > 10 * TOLERANCE * max(1.0, abs(one)):
        raise UsageError(
            f"{where}: the factor of the output is {other:g}, and {one:g} before; the fold holds one for all steps. {BY_HAND}"
        )


def _require_untouched(expected: torch.Tensor, latent: torch.Tensor, where: str) -> None:
    """A step begins where the one before ended."""
    if latent.shape != expected.shape or not close(latent, expected):
        raise UsageError(
            f"{where}: the pipeline changes the latent between the steps of its scheduler ({_change(latent, expected)}), "
            f"which does not fold. {BY_HAND}"
        )


def _change(got: torch.Tensor, wanted: torch.Tensor) -> str:
    """What was done to a tensor, as far as its values tell."""
    if got.shape != wanted.shape:
        return f"from {list(wanted.shape)} to {list(got.shape)}"
    (factor,), error = fit(got, [wanted])
    if error <= TOLERANCE:
        return f"multiplied by {factor:.4g}"
    if clipped(got, wanted):
        return f"clipped to {float(got.min()):.3g} and {float(got.max()):.3g}"
    rest = (got - wanted).double()
    noisy = abs(float(rest.mean())) * rest.numel() ** 0.5 <= NORMAL * float(rest.std())
    kind = "noise is added" if noisy and fit(rest, [wanted])[1] > 0.9 else "changed"
    return f"{kind}, by {error:.2g} of its size"


def _other_arguments(first: Mapping[str, Any], here: Mapping[str, Any], where: str) -> str:
    names = [name for name in {**first, **here} if first.get(name) != here.get(name)]
    return (
        f"{where}: the pipeline gives its scheduler's step {names[0]}={here.get(names[0])!r:.40}, and "
        f"{first.get(names[0])!r:.40} before; the fold holds one for all steps. {BY_HAND}"
    )


def _named(arguments: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in arguments.items() if isinstance(value, str | int | float)}
    return f" ({', '.join(f'{name}={value!r}' for name, value in plain.items())})" if plain else ""


def _require_same_shapes(here: Guided, conditions: set[str], where: str) -> None:
    """The branches take conditions of the same shapes, so that one stage serves both."""
    if here.unconditional is None:
        return
    one, other = flatten(here.conditional.arguments)[0], flatten(here.unconditional.arguments)[0]
    for name in sorted(conditions):
        shapes = [list(value.shape) if value is not None else "none" for value in (one.get(name), other.get(name))]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"{where}: condition {name!r} is {shapes[0]} in the conditional branch and {shapes[1]} in the "
                "unconditional one; a bundle holds one shape. Give prompts of one length, or embeddings that are padded "
                "to it, with --inputs FILE.safetensors (prompt_embeds, negative_prompt_embeds)."
            )
