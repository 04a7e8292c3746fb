"""What a diffusers scheduler bounds in its steps: the sample that it predicts, clipped or thresholded.

Such a step is linear in the latent, the output and *what the bound answers*. So probing gives it an answer of its own,
a basis vector, and looks at what it was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..loop.forms import Bound

THRESHOLD = "_threshold_sample"
"""The method of diffusers schedulers for dynamic thresholding."""

CLAMPS = (torch.clamp, torch.Tensor.clamp, torch.clip, torch.Tensor.clip)
Bounding = Callable[[torch.Tensor, Bound], torch.Tensor]
"""Answers for a bound on a latent."""


@contextmanager
def bounding(scheduler: Any, answer: Bounding | None) -> Iterator[None]:
    """Answer for the bounds that a scheduler puts on whole latents as long as the block lasts.

    Args:
        scheduler: scheduler of diffusers.
        answer: answer; None leaves the scheduler alone.
    """
    if answer is None:
        yield
        return
    before = vars(scheduler).get(THRESHOLD)
    if scheduler.config.get("thresholding") and hasattr(scheduler, THRESHOLD):
        bound = Bound(float(scheduler.config.sample_max_value), float(scheduler.config.dynamic_thresholding_ratio))
        object.__setattr__(scheduler, THRESHOLD, lambda sample: answer(sample, bound))
    try:
        with _Clamps(answer):
            yield
    finally:
        if before is None:
            vars(scheduler).pop(THRESHOLD, None)


class _Clamps(TorchFunctionMode):
    """Answers for `clamp` to a range around 0 on tensors of more than one axis, as latents are."""

    def __init__(self, answer: Bounding):
        super().__init__()
        self._answer = answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in CLAMPS or args[0].ndim < 2:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("min", "max"), args[1:], strict=False)) | (kwargs or {})
        low, high = (given.get(key) for key in ("min", "max"))
        if isinstance(low, int | float) and isinstance(high, int | float) and low == -high:
            return self._answer(args[0], Bound(float(high)))
        return func(*args, **(kwargs or {}))  # no range around 0, which the replay finds out where it matters
