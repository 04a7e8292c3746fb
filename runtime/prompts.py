"""From prompts to images: what surrounds the loop, and the loop. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..loop.driver import OnStep
from ..loop.errors import UsageError
from ..loop.ports import BoundProgram
from ..loop.spec import LoopSpec
from .ends import Ends

Array = np.ndarray
DISTILLED = "guidance"
"""The condition by which a denoiser is told a guidance scale that was distilled into it."""


class Sampler(Protocol):
    """What samples a loop: an engine, or a checkpoint as it is."""

    @property
    def program(self) -> BoundProgram:
        """The denoiser."""
        ...

    def sample(
        self,
        noise: Any,
        guidance: float | None = None,
        on_step: OnStep | None = None,
        *,
        unconditional: Mapping[str, Any] | None = None,
        conditions: Mapping[str, Any] | None = None,
    ) -> Array:
        """Run the loop."""
        ...


def draw(
    sampler: Sampler,
    loop: LoopSpec,
    ends: Ends,
    noise: Array,
    prompts: Sequence[str],
    negative_prompt: str | None = None,
    guidance: float | None = None,
    on_step: OnStep | None = None,
) -> Array:
    """Images of prompts.

    Args:
        sampler: runs the loop.
        loop: around the denoiser.
        ends: ends of the pipeline.
        noise: float32 [B, *latent], standard normal.
        prompts: cycled to B.
        negative_prompt: what to keep away from; None is what the pipeline takes for none.
        guidance: scale; None takes that of the pipeline.
        on_step: called with (evaluations done, evaluations in all).

    Returns:
        float32 [B, C, H, W] in [-1, 1]; latents where the pipeline has no decoder.

    Raises:
        UsageError: the model takes no prompts or no negative prompt, or the request does not fit it.
    """
    count = len(noise)
    told = ends.conditions([prompts[i % len(prompts)] for i in range(count)])
    dtypes = {port.name: port.port.dtype for port in sampler.program.inputs}
    conditions = told | ends.set_by_pipeline(dtypes, count)
    if loop.guidance is None and guidance is not None and DISTILLED in ends.given:
        conditions[DISTILLED] = np.full_like(conditions[DISTILLED], guidance)
        guidance = None
    unconditional = None
    if loop.guidance is not None and loop.guidance.unconditional == "input":
        unconditional = ends.unconditional(negative_prompt, told)
    elif negative_prompt is not None:
        raise UsageError("negative prompt: expected none, because this loop has no branch that is given one.")
    latents = sampler.sample(noise, guidance, on_step, unconditional=unconditional, conditions=conditions)
    return ends.images(latents)
