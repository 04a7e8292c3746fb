"""Find the recurrence of a diffusers scheduler by probing it, and prove it by replay.

A sampler is linear in the noise that it starts with, in the denoiser outputs, in the noise that it draws in its steps and
in the predictions that it bounds. So one run with basis vectors, the start e_0, then the outputs, the draws and the
bounded predictions, shows every coefficient of x[i] = A_i x[0] + sum_j B_ij v_j + sum_d E_id n_d + sum_j F_ij f_j at once,
and what each bound was asked for. What is not linear otherwise, or random by other means, is found out by replaying random
runs, some of them far above the usual magnitude. What a scheduler does counts, not what its configuration is called: a key
that clips in one class has no effect in another.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ..loop.errors import UsageError, nearest
from ..loop.forms import Bound, Prediction
from ..loop.recurrence import Array, Recurrence
from ..loop.spec import SamplerSpec
from .bounds import bounding
from .draws import Drawing, drawing, giving, noting
from .remedies import DETERMINISTIC, STOCHASTIC, UNBOUNDED, about_variance
from .schedulers import SCHEDULER_ERRORS, build

logger = logging.getLogger(__name__)

REPLAY_TOLERANCE = 1e-6  # relative L2 error of a replayed latent
ROUNDING = 16 * np.finfo(np.float64).eps
NEGLIGIBLE = 1e-9  # against the largest coefficient of the same update; float32 resolves 6e-8
TINY = np.finfo(np.float64).tiny
REQUIRED = ("model_output", "timestep", "sample")  # arguments of a step
REPLAY_WIDTH = 64  # values in the latent of a replay
ROUNDED_CALLS = 500  # beyond, the float32 rounding of the scheduler itself reaches the tolerance and grows as a root
REPLAY_SCALES = (1.0, 1.0, 10.0, 1000.0)  # magnitudes; clipping may not show at 1
Run = Callable[..., tuple[Array, Array]]
"""A scheduler that answers (start, outputs, draws, bounds, seed) with latents and input scales, see `_run`."""


@dataclass(frozen=True, eq=False)
class Probed:
    """What probing a scheduler found.

    Attributes:
        recurrence: recurrence, with the draws that have a weight.
        kept: [D] which of all draws that the scheduler makes those are.
    """

    recurrence: Recurrence
    kept: Array


def probe(sampler: SamplerSpec) -> Recurrence:
    """The recurrence of a diffusers scheduler over its whole grid, see `probed`."""
    return probed(sampler).recurrence


def probed(sampler: SamplerSpec) -> Probed:
    """Find the recurrence of a diffusers scheduler over its whole grid.

    Args:
        sampler: scheduler class, configuration, steps and arguments of `set_timesteps`.

    Returns:
        the recurrence over the S denoiser calls in `scheduler.timesteps` (a two-evaluation solver makes about two
        calls a step; a last timestep that the scheduler cannot step from is the end of the grid and no call); it replays
        the scheduler to 1e-6.

    Raises:
        UsageError: the scheduler is unknown, is configured wrongly, or is no linear recurrence.
    """
    scheduler = build(sampler)
    name = sampler.scheduler
    _refuse_signature(name, scheduler)
    run = partial(_run, name, scheduler, _step_arguments(scheduler, sampler), _takes_each(scheduler))
    survey = _survey(name, run, len(scheduler.timesteps))
    found = _solve(name, _basis_run(run, survey), _grid(scheduler, sampler, survey.calls), survey)
    _check_replay(name, run, found)
    kept = np.nonzero(found.noise.any(axis=0))[0]
    logger.info("%s: %d steps fold into %d calls, %d outputs deep", name, sampler.steps, found.calls, found.depth)
    return Probed(_of_guided(replace(found, noise=found.noise[:, kept]), sampler.output_scale), kept)


def _of_guided(recurrence: Recurrence, scale: float) -> Recurrence:
    """The recurrence in guided outputs, of which the scheduler receives so many times."""
    bounded = recurrence.prediction
    prediction = None if bounded is None else replace(bounded, output=scale * bounded.output)
    return replace(recurrence, outputs=scale * recurrence.outputs, prediction=prediction)


def refuse_partial_grid(begin_index: int | None, steps: int) -> None:
    """Refuse a loop that starts in the middle of its grid, as image-to-image pipelines do (`set_begin_index`).

    Args:
        begin_index: the call the pipeline starts at; None or 0 is the whole grid.
        steps: calls of the whole grid.

    Raises:
        UsageError: the loop starts later than at the first call.
    """
    if begin_index:
        raise UsageError(
            f"the pipeline starts at call {begin_index} of {steps} (set_begin_index): the fold holds the whole grid "
            "only, from noise to sample. An image-to-image or inpainting call cannot be folded: use the text-to-image "
            "pipeline, or call it with strength 1.0."
        )


@dataclass(frozen=True, eq=False)
class _Survey:
    """What a scheduler does: in how many calls, how often it draws noise, and what it bounds at which call."""

    calls: int
    draws: int
    bounds: Mapping[int, Bound]


class _EndOfGrid(Exception):
    """The scheduler steps from all timesteps of its grid but the last."""


@dataclass(frozen=True, eq=False)
class _Basis:
    """A run on basis vectors, its rows in terms of (x[0], v_0, ..., n_0, ..., f_0, ...).

    Attributes:
        latents: [S+1, W] coefficients of each latent.
        scales: [S] input scales.
        asked: call -> [W] coefficients of what it bounds.
    """

    latents: Array
    scales: Array
    asked: Mapping[int, Array]


class _BoundsByCall:
    """Bounds that a scheduler puts on latents, by call: let through, or answered by the rows of a basis."""

    def __init__(self, name: str, answers: Array | None = None):
        self._name, self._answers = name, answers
        self.call = 0
        self.bounds: dict[int, Bound] = {}
        self.asked: dict[int, Array] = {}

    def __call__(self, sample: Any, bound: Bound) -> Any:
        import torch

        if self.call in self.bounds:
            raise UsageError(
                f"{self._name}: it bounds the latent twice at call {self.call}; the fold holds one bounded prediction for "
                f"each. {UNBOUNDED}"
            )
        self.bounds[self.call], self.asked[self.call] = bound, sample.flatten().double().numpy()
        answer = bound(self.asked[self.call][None])[0] if self._answers is None else self._answers[self.call]
        return torch.from_numpy(answer).reshape(sample.shape).to(sample.dtype)


def _basis_run(run: Run, survey: _Survey) -> _Basis:
    """Run a scheduler on basis vectors.

    Many schedulers round the latent to float32 on the way; that rounding would stand where an exact zero belongs, so
    here, and only here, they are kept in float64.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class KeepDouble(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            rounds = func in (torch.Tensor.to, torch.Tensor.float) and args[0].dtype == torch.float64
            return args[0] if rounds and result.dtype.is_floating_point else result

    calls = survey.calls
    bounded = calls if survey.bounds else 0
    basis = np.eye(1 + calls + survey.draws + bounded)
    outputs, draws, answers = np.split(basis[1:], [calls, calls + survey.draws])
    noted = _BoundsByCall("", answers) if bounded else None
    with KeepDouble():
        latents, scales = run(basis[0], outputs, giving(draws), noted)
    return _Basis(latents, scales, noted.asked if noted is not None else {})


def _grid(scheduler: Any, sampler: SamplerSpec, calls: int) -> tuple[Array, float]:
    """Timesteps [S] as the denoiser receives them, and the scale of the initial noise."""
    timesteps = sampler.timestep_scale * np.asarray([float(t) for t in scheduler.timesteps[:calls]])
    return timesteps + sampler.timestep_offset, float(getattr(scheduler, "init_noise_sigma", 1.0))


def _step_arguments(scheduler: Any, sampler: SamplerSpec) -> dict[str, Any]:
    """The arguments of each step that the sampler gives besides output, timestep and sample.

    Raises:
        UsageError: the step takes no such argument.
    """
    parameters = inspect.signature(scheduler.step).parameters
    valid = [name for name in parameters if name not in (*REQUIRED, "generator", "return_dict", "kwargs")]
    for key in sampler.step:
        if key not in valid:
            hint = nearest(key, valid) if valid else "it takes no argument of this kind."
            raise UsageError(f"sampler.step: a step of {sampler.scheduler} does not take {key!r}; {hint}")
    return dict(sampler.step)


def _run(
    name: str,
    scheduler: Any,
    given: Mapping[str, Any],
    each: bool,
    start: Array,
    outputs: Array,
    draws: Drawing,
    bounds: _BoundsByCall | None = None,
    seed: int = 0,
) -> tuple[Array, Array]:
    """Run a copy of a scheduler with given denoiser outputs and draws of noise.

    Args:
        name: name of the scheduler, for messages.
        scheduler: its grid is set and no step was taken; it is left so.
        given: further arguments of every step, such as `eta`.
        each: flag of a step that takes a timestep for each sample instead of one for all.
        start: [D] the first latent, already scaled.
        outputs: [S, D] what the denoiser answers at each call.
        draws: how the scheduler draws noise.
        bounds: answers for its bounds; None leaves them as they are.
        seed: seed of every random generator that the scheduler may use.

    Returns:
        latents [S+1, D] and input scales [S].

    Raises:
        UsageError: a step fails, the grid changes on the way, or the input scaling is not one factor.
        _EndOfGrid: the step of the last timestep fails, for want of a next one.
    """
    import torch

    scheduler = copy.deepcopy(scheduler)
    grid = list(scheduler.timesteps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else equal neighbours at the start are taken for a start in the middle
    extra = dict(given)
    if "generator" in inspect.signature(scheduler.step).parameters:
        extra["generator"] = torch.Generator().manual_seed(seed)
    latent = torch.from_numpy(start).reshape(1, -1, 1, 1)
    latents, scales = [start], []
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        drawing(scheduler, draws),
        bounding(scheduler, bounds),
    ):
        torch.manual_seed(seed)
        for i, t in enumerate(grid[: len(outputs)]):
            if bounds is not None:
                bounds.call = i
            output = torch.from_numpy(outputs[i]).reshape(1, -1, 1, 1)
            try:
                scales.append(_input_scale(name, scheduler, latent, t))
                time = torch.as_tensor(t).reshape(1) if each else t
                latent = scheduler.step(output, time, latent, return_dict=False, **extra)[0]
            except SCHEDULER_ERRORS as error:
                if isinstance(error, IndexError) and 0 < i == len(grid) - 1:
                    raise _EndOfGrid from None
                raise UsageError(
                    f"{name}: its step failed at call {i} of {len(outputs)}: {type(error).__name__}: {error}. "
                    + about_variance(scheduler)
                    + f"It cannot be folded; {DETERMINISTIC}"
                ) from None
            if latent.shape != output.shape or len(scheduler.timesteps) != len(grid):
                raise UsageError(
                    f"{name}: call {i} changed the latent to {tuple(latent.shape)} and the grid to "
                    f"{len(scheduler.timesteps)} calls; expected {tuple(output.shape)} and {len(grid)}. An adaptive "
                    f"loop cannot be folded; {DETERMINISTIC}"
                )
            latents.append(latent.flatten().double().numpy())
    return np.stack(latents), np.asarray(scales)


def _takes_each(scheduler: Any) -> bool:
    """Whether a step fails with one timestep for all samples, and works with one for each."""
    import torch

    time, latent = torch.as_tensor(scheduler.timesteps[0]), torch.ones(1, REPLAY_WIDTH, 1, 1)
    worked = []
    for form in (time, time.reshape(1)):
        with torch.random.fork_rng(devices=[]):
            try:
                copy.deepcopy(scheduler).step(latent, form, latent, return_dict=False)
                worked.append(True)
            except SCHEDULER_ERRORS:
                worked.append(False)
    return worked == [False, True]


def _input_scale(name: str, scheduler: Any, latent: Any, t: Any) -> float:
    """The factor of `scale_model_input`; 1 for a scheduler without one."""
    if not hasattr(scheduler, "scale_model_input"):
        return 1.0
    before = latent.flatten().double().numpy()
    after = scheduler.scale_model_input(latent, t).flatten().double().numpy()
    with np.errstate(invalid="ignore"):  # a latent that is not finite is reported with its cause later
        scale = float(before @ after / (before @ before))
    if np.linalg.norm(after - scale * before) > REPLAY_TOLERANCE * np.linalg.norm(after):
        raise UsageError(f"{name}: scale_model_input does more than multiply by a number; {DETERMINISTIC}")
    return scale


def _solve(name: str, basis: _Basis, grid: tuple[Array, float], survey: _Survey) -> Recurrence:
    """Turn the rows x[i] = (A_i, B_i0, ..., E_i0, ..., F_i0, ...) into a_i = A_{i+1} / A_i, b, e and w."""
    latents, S = basis.latents, len(basis.scales)
    if not np.isfinite(latents).all():
        call = int(np.nonzero(~np.isfinite(latents).all(axis=1))[0][0]) - 1
        raise UsageError(
            f"{name}: call {call} of {S} divides by zero: a coefficient of its step is not finite (two equal "
            f"timesteps in a row or a first sigma of infinity do that). Take fewer steps, or {DETERMINISTIC}"
        )
    state, weights = np.zeros(S), np.zeros((S, latents.shape[1] - 1))
    for i in range(S):
        before, after = latents[i], latents[i + 1]
        if abs(before[0]) > ROUNDING * np.abs(before).max():
            state[i] = after[0] / before[0]
        elif abs(after[0]) > ROUNDING * np.abs(after).max():
            raise UsageError(
                f"{name}: call {i + 1} reads the initial noise again after call {i} has forgotten it, so no "
                f"recurrence of the latent exists; {DETERMINISTIC}"
            )
        weights[i] = _without_rounding(state[i] * before[1:], after[1:])
    outputs, noise, predicted = np.split(weights, [S, S + survey.draws], axis=1)
    prediction = _prediction(name, basis, survey, predicted) if survey.bounds else None
    timesteps, initial_scale = grid
    return Recurrence(timesteps, basis.scales, state, outputs, initial_scale, noise, prediction)


def _prediction(name: str, basis: _Basis, survey: _Survey, weights: Array) -> Prediction:
    """The bounded predictions: what is bounded at call i is p_i x[i] + q_i v_i.

    Raises:
        UsageError: it is something else, or its range changes from call to call.
    """
    ranges = set(survey.bounds.values())
    if len(ranges) > 1:
        raise UsageError(f"{name}: the range of its bound changes from call to call; the fold holds one. {UNBOUNDED}")
    p, q = np.zeros(len(basis.scales)), np.zeros(len(basis.scales))
    for call, asked in basis.asked.items():
        latent, own = basis.latents[call], 1 + call
        others = np.delete(np.stack([latent, asked]), own, axis=1)
        p[call] = others[0] @ others[1] / (others[0] @ others[0])
        q[call] = asked[own] - p[call] * latent[own]
        if np.linalg.norm(others[1] - p[call] * others[0]) > REPLAY_TOLERANCE * np.linalg.norm(asked):
            raise UsageError(
                f"{name}: at call {call} it bounds something else than what the latent and the output of that call "
                f"predict, which the fold does not hold. {UNBOUNDED}"
            )
    return Prediction(p, q, weights, ranges.pop())


def _without_rounding(carried: Array, after: Array) -> Array:
    """Compute after - carried, with exact zeros for differences that are rounding, or too small for float32 latents.

    Each coefficient that is not zero keeps an output in the driver's ring: solvers in predicted-sample form (DPM++,
    UniPC) have a tail that decays over all earlier outputs.
    """
    difference = after - carried
    noise = ROUNDING * (np.abs(carried) + np.abs(after))
    difference[np.abs(difference) <= np.maximum(noise, NEGLIGIBLE * np.abs(difference).max())] = 0.0
    return difference


def _check_replay(name: str, run: Run, recurrence: Recurrence) -> None:
    """Replay random runs of a scheduler by the recurrence.

    Raises:
        UsageError: they differ, so the scheduler is not linear.
    """
    generator = np.random.default_rng(0)
    tolerance = REPLAY_TOLERANCE * max(1.0, np.sqrt(recurrence.calls / ROUNDED_CALLS))
    for scale in REPLAY_SCALES:
        start = scale * recurrence.initial_scale * generator.standard_normal(REPLAY_WIDTH)
        outputs = scale * generator.standard_normal((recurrence.calls, REPLAY_WIDTH))
        draws = scale * generator.standard_normal((recurrence.draws, REPLAY_WIDTH))
        wanted, scales = run(start, outputs, giving(draws))
        latent, predictions = start, np.zeros_like(outputs)
        bounded = recurrence.prediction
        added = recurrence.outputs @ outputs + recurrence.noise @ draws  # row by row it is most of a long grid's time
        for i in range(recurrence.calls):
            if bounded is not None:
                predictions[i] = bounded.at(i, latent[None], outputs[i : i + 1])[0]
                added[i] += bounded.weights[i] @ predictions
            latent = recurrence.state[i] * latent + added[i]
            error = np.linalg.norm(latent - wanted[i + 1]) / max(np.linalg.norm(wanted[i + 1]), TINY)
            if not error <= tolerance:
                raise UsageError(
                    f"{name}: not a linear recurrence: a random run at magnitude {scale:g} differs from "
                    f"the probed coefficients by {error:.1e} (relative) at call {i} "
                    f"of {recurrence.calls}; expected at most {tolerance:g}. C{DETERMINISTIC[1:]}"
                )
        if not np.allclose(scales, recurrence.input_scale, rtol=REPLAY_TOLERANCE, atol=0.0):
            raise UsageError(f"{name}: its input scale depends on the latent; {DETERMINISTIC}")


def _refuse_signature(name: str, scheduler: Any) -> None:
    """A step that asks for more than output, timestep and sample belongs to a loop of its own."""
    parameters = inspect.signature(scheduler.step).parameters.values() if hasattr(scheduler, "step") else None
    if parameters is None:
        raise UsageError(f"{name}: it has no method `step`, so it does not drive a loop; {DETERMINISTIC}")
    names = [p.name for p in parameters]
    required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if required != [*REQUIRED] or "return_dict" not in names:
        raise UsageError(
            f"{name}: its step asks for {', '.join(required)}; expected model_output, timestep, sample. Its loop "
            f"cannot be folded; {DETERMINISTIC}"
        )


def _survey(name: str, run: Run, timesteps: int) -> _Survey:
    """In how many calls a scheduler goes through its timesteps, how often it draws noise, and what it bounds.

    Raises:
        UsageError: it is random by other means: two runs with the same draws, and another seed, must agree.
    """
    generator = np.random.default_rng(0)
    start = generator.standard_normal(REPLAY_WIDTH)
    outputs = generator.standard_normal((timesteps, REPLAY_WIDTH))
    try:
        drawn, bounds = _drawn_and_bounded(name, run, start, outputs)
    except _EndOfGrid:
        outputs = outputs[:-1]
        drawn, bounds = _drawn_and_bounded(name, run, start, outputs)
    if any(one.numel() != REPLAY_WIDTH for one in drawn):
        raise UsageError(f"{name}: {STOCHASTIC}")
    given = generator.standard_normal((len(drawn), REPLAY_WIDTH))
    runs = [run(start, outputs, giving(given), None, seed)[0] for seed in (1, 2)]
    if not np.array_equal(*runs, equal_nan=True):
        raise UsageError(f"{name}: {STOCHASTIC}")
    return _Survey(len(outputs), len(drawn), bounds)


def _drawn_and_bounded(name: str, run: Run, start: Array, outputs: Array) -> tuple[list[Any], Mapping[int, Bound]]:
    """What a scheduler draws, and what it bounds, in one run."""
    drawn, bounds = list[Any](), _BoundsByCall(name)
    run(start, outputs, noting(drawn), bounds, 1)
    return drawn, bounds.bounds
