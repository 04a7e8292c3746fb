"""The latent as a denoiser takes it, where a pipeline gives its scheduler the same numbers in another order.

A step of a scheduler treats every number of the latent alike. So pipelines hand it what is convenient: the frames of
videos as rows (text-to-video UNets), or a latent without the axis of frames that the denoiser expects (Z-Image). The
fold holds the latent in the order of the denoiser.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from .calling import flatten
from .recorder import Step

TOLERANCE = 1e-4  # relative; pipelines compute in float32
Arrange = Callable[[torch.Tensor], torch.Tensor]


def arranged(step: Step, batch: int) -> Step:
    """A step whose scheduler's tensors have the order of the denoiser's latent.

    Args:
        step: step as it was recorded.
        batch: how many samples [B] the pipeline draws.
    """
    tensors = flatten(step.calls[0].arguments)[0].values() if step.calls else ()
    rows = [value[:batch] for value in tensors if value.ndim > 1 and len(value) in (batch, 2 * batch)]
    if any(value.shape == step.sample.shape for value in rows):
        return step
    for value in rows:
        for arrange in _orders(step.sample, value.shape):
            if is_multiple(value, arrange(step.sample)):
                given = {name: getattr(step, name) for name in ("sample", "guided", "result")}
                same = {name: tensor for name, tensor in given.items() if tensor.shape == step.sample.shape}
                draws = tuple(arrange(one) if one.shape == step.sample.shape else one for one in step.draws)
                return replace(step, **{name: arrange(tensor) for name, tensor in same.items()}, draws=draws)
    return step


def is_multiple(value: torch.Tensor, of: torch.Tensor) -> bool:
    """Whether a tensor is another of its shape times a number above 0."""
    factor = float((value * of).sum() / (of * of).sum())
    return factor > 0 and bool(torch.linalg.norm(value - factor * of) <= TOLERANCE * torch.linalg.norm(value))


def _orders(sample: torch.Tensor, shape: torch.Size) -> list[Arrange]:
    """The ways to give a latent another shape [B, ...]: by the axes of size 1, and from frames in the rows."""
    found: list[Arrange] = []
    if sample.numel() != shape.numel():
        return found
    if [size for size in sample.shape if size != 1] == [size for size in shape if size != 1]:
        found.append(lambda tensor: tensor.reshape(shape))
    if len(shape) == sample.ndim + 1 and len(sample) == shape[0] * shape[2]:
        found.append(lambda tensor: tensor.reshape(shape[0], shape[2], shape[1], *shape[3:]).transpose(1, 2))
    return found
