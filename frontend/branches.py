"""The guidance branches of a step, and how the scheduler's output is made of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..loop.errors import UsageError
from .calling import prediction
from .guidance import BY_HAND, OVER, row_weights
from .recorder import Call, Step

MASK = "mask"  # at the end of the name of an argument
TOLERANCE = 1e-4  # relative; pipelines compute in float32


@dataclass(frozen=True)
class Branch:
    """The arguments of one guidance branch, cut to one row for each sample, and the prediction for them."""

    arguments: dict[str, Any]
    output: torch.Tensor


@dataclass(frozen=True)
class Guided:
    """`output_scale (unconditional + scale (conditional - unconditional))`, which the scheduler was given.

    The sum may be rescaled by rows, see `guidance`; `output` is what it became.

    Attributes:
        conditional: branch.
        unconditional: branch, None without guidance.
        scale: scale of the guidance, 1 without.
        output_scale: what the guided output is multiplied by; -1 in pipelines that negate it. With two branches only the
            sign is told here.
        rows: rows of each denoiser call.
        output: what the scheduler was given, less the scale.
    """

    conditional: Branch
    unconditional: Branch | None
    scale: float
    output_scale: float
    rows: tuple[int, ...]
    output: torch.Tensor


def one_of_two(value: torch.Tensor, batch: int) -> torch.Tensor:
    """A row for each sample of what a pipeline may carry twice, once for each branch."""
    return value[:batch] if len(value) == 2 * batch and torch.equal(value[:batch], value[batch:]) else value


def of_samples(value: torch.Tensor, batch: int) -> torch.Tensor:
    """A row for each sample of what a scheduler made or drew for a latent that was given to it twice.

    Of two halves that differ, pipelines go on from the first one; the watch of the next step sees whether they do.
    """
    return value[:batch] if len(value) == 2 * batch else value


def guided(step: Step, batch: int, where: str) -> Guided:
    """The branches of a step.

    Args:
        step: step as it was recorded.
        batch: how many samples the pipeline draws.
        where: the step in words, for messages.

    Raises:
        UsageError: the calls are not those of one or two branches, or the scheduler was not given a weighted sum of
            their outputs.
    """
    latent = one_of_two(step.sample, batch)
    shape = tuple(latent.shape[1:])
    rows = tuple(len(call.output) for call in step.calls)
    if rows == (batch,):
        one, two = Branch(step.calls[0].arguments, prediction(step.calls[0].output, shape)), None
    elif rows == (2 * batch,):
        one, two = (_half(step.calls[0], part, batch, shape) for part in (0, 1))
    elif rows == (batch, batch):
        calls = _with_masks(*(call.arguments for call in step.calls))
        one, two = (
            Branch(given, prediction(call.output, shape)) for given, call in zip(calls, step.calls, strict=True)
        )
    else:
        raise UsageError(f"{where}: {_other_calls(step, rows, batch)}")
    received = prediction(one_of_two(step.guided, batch), shape)
    branches = (one,) if two is None else (one, two)
    _require_shape(received, branches, latent, where)
    if two is None:
        scale = round(sum(_weights(received, branches, latent, where)), 6)
        return Guided(one, None, 1.0, scale, rows, received / scale)
    outputs = one.output, two.output
    apart = next((found for over in OVER if (found := row_weights(received, *outputs, over, TOLERANCE))), None)
    if apart is None:
        _weights(received, branches, latent, where)  # says what the output is instead
        raise UsageError(f"{where}: {_other_output(received, outputs, latent)}")
    sign = 1.0 if apart.factor.sum() > 0 else -1.0
    if apart.share >= 0.5:  # one + (1 - s) (two - one) says the same with the branches exchanged; s is at least 1
        return Guided(two, one, round(apart.share, 4), sign, rows, received / sign)
    return Guided(one, two, round(1.0 - apart.share, 4), sign, rows, received / sign)


def _with_masks(*calls: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of calls, with a mask of ones where one leaves out a mask that another gives.

    Pipelines leave out a mask that masks nothing (QwenImage). The proof shows whether this one does.
    """
    masks = {
        name: torch.ones_like(value)
        for given in calls
        for name, value in given.items()
        if name.endswith(MASK) and isinstance(value, torch.Tensor)
    }
    return [given | {name: mask for name, mask in masks.items() if given.get(name) is None} for given in calls]


def _half(call: Call, part: int, batch: int, shape: tuple[int, ...]) -> Branch:
    def cut(leaf: Any) -> Any:
        doubled = isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and len(leaf) == 2 * batch
        return leaf[part * batch : (part + 1) * batch] if doubled else leaf

    arguments = pytree.tree_map(cut, call.arguments)
    return Branch(arguments, prediction(cut(call.output), shape))


def _other_calls(step: Step, rows: tuple[int, ...], batch: int) -> str:
    """What a pipeline does instead of calling its denoiser for one or two branches."""
    if not rows:
        others = " and ".join(f"{name} ({kind})" for name, kind in step.networks.items())
        instead = f"calls {others} in its place" if others else "takes its output from elsewhere"
        return f"the pipeline does not call the denoiser that is compiled, and {instead}; the fold holds one network."
    if sum(rows) == 3 * batch:
        return (
            f"the guidance of the pipeline has three branches (denoiser calls of {list(rows)} rows for {batch} samples); "
            f"the fold holds two, `unconditional + scale (conditional - unconditional)`. {BY_HAND}"
        )
    lists = [name for call in step.calls for name, value in call.arguments.items() if isinstance(value, list)]
    if lists:
        return (
            f"the denoiser takes its samples as a list ({lists[0]!r}) with a tensor for each, and counts them in Python; "
            "the fold holds one tensor with a row for each sample."
        )
    return (
        f"the pipeline calls its denoiser {len(rows)} times, with {list(rows)} rows for {batch} samples; the fold holds "
        f"one call, one with a doubled batch, or two. {BY_HAND}"
    )


def _require_shape(received: torch.Tensor, branches: Sequence[Branch], latent: torch.Tensor, where: str) -> None:
    output = branches[0].output
    if received.shape != output.shape or latent.shape != output.shape:
        raise UsageError(
            f"{where}: expected an output of the latent's shape {list(latent.shape)} for the scheduler; the denoiser "
            f"gives {list(output.shape)} and the scheduler is given {list(received.shape)}. {BY_HAND}"
        )


def _weights(received: torch.Tensor, branches: Sequence[Branch], latent: torch.Tensor, where: str) -> list[float]:
    """The weight of each branch in what the scheduler received.

    Raises:
        UsageError: it is no weighted sum of them.
    """
    outputs = [branch.output for branch in branches]
    weights, error = fit(received, outputs)
    if error > TOLERANCE:
        raise UsageError(f"{where}: {_other_output(received, outputs, latent)}")
    if abs(sum(weights)) < TOLERANCE:
        raise UsageError(
            f"{where}: the scheduler is given {'zeros' if len(weights) == 1 else 'the difference of the two branches'} "
            f"instead of the denoiser's output, which the fold does not hold. {BY_HAND}"
        )
    return weights


def fit(target: torch.Tensor, columns: Sequence[torch.Tensor]) -> tuple[list[float], float]:
    """Weights of the least-squares sum of columns, and the relative error that remains."""
    A = torch.stack([column.double().flatten() for column in columns], dim=1)
    b = target.double().flatten()
    weights = torch.linalg.lstsq(A.T @ A, (A.T @ b)[:, None]).solution[:, 0]
    rest, size = float(torch.linalg.norm(b - A @ weights)), float(torch.linalg.norm(b))
    return weights.tolist(), rest / size if size else 0.0


def _other_output(received: torch.Tensor, outputs: Sequence[torch.Tensor], latent: torch.Tensor) -> str:
    """What a pipeline makes of its denoiser's outputs, when it is no weighted sum of them."""
    by_sample = zip(received, *outputs, strict=True)
    if len(outputs) == 1 and all(fit(row, columns)[1] <= TOLERANCE for row, *columns in by_sample):
        return (
            "the pipeline has an output that is rescaled: each sample has a factor of its own, which does not fold. "
            f"{BY_HAND}"
        )
    if fit(received, [*outputs, latent])[1] <= TOLERANCE:
        return (
            "the pipeline has an output transform of its own: it adds a multiple of the latent to the denoiser's output "
            f"before the scheduler gets it, which the fold does not hold. {BY_HAND}"
        )
    if len(outputs) == 1 and clipped(received, outputs[0]):
        return f"the pipeline clips the denoiser's output before the scheduler gets it, which is not linear. {BY_HAND}"
    if len(outputs) > 1:
        return (
            "the pipeline's guidance is not `unconditional + scale (conditional - unconditional)` (a projected, "
            f"perturbed, clipped or other form), which does not fold. {BY_HAND}"
        )
    return (
        "the pipeline has an output transform of its own: the scheduler is not given a multiple of the denoiser's "
        f"output, which does not fold. {BY_HAND}"
    )


def clipped(received: torch.Tensor, original: torch.Tensor) -> bool:
    """Whether a tensor is another one cut to a range."""
    bounded = original.clamp(float(received.min()), float(received.max()))
    return bool(torch.linalg.norm(bounded - received) <= TOLERANCE * torch.linalg.norm(received))
