"""From prompts to images: what surrounds the loop, and the loop. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..loop.driver import OnStep
from ..loop.errors import UsageError
from ..loop.ports import BoundProgram
from ..loop.spec import LoopSpec
from .arrays import to_array
from .ends import Ends

Array = np.ndarray
OTHER = "unconditional/"
"""Before the names of conditions of the other branch, as in the probe of a bundle."""
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


def draw_given(
    sampler: Sampler,
    ends: Ends,
    noise: Array,
    conditions: Mapping[str, Any],
    guidance: float | None = None,
    on_step: OnStep | None = None,
) -> Array:
    """Images of conditions that are given as arrays, such as embeddings of prompts.

    Args:
        sampler: runs the loop.
        ends: ends of the pipeline.
        noise: float32 [B, *latent], standard normal.
        conditions: name -> [N, ...], a row for each sample or fewer, which are taken in turn; those of the other branch
            as `unconditional/name`. What the pipeline sets itself may be left out.
        guidance: scale; None takes that of the pipeline.
        on_step: called with (evaluations done, evaluations in all).

    Returns:
        float32 [B, C, H, W], of a video [B, C, F, H, W], in [-1, 1]; latents where the pipeline has no decoder.

    Raises:
        UsageError: the request does not fit the model.
    """
    ports = {port.name: port for port in sampler.program.inputs}
    rows = {name: _in_turn(name, value, len(noise)) for name, value in conditions.items()}
    other = {name.removeprefix(OTHER): value for name, value in rows.items() if name.startswith(OTHER)}
    told = {name: value for name, value in rows.items() if not name.startswith(OTHER)}
    told = ends.set_by_pipeline({name: port.port.dtype for name, port in ports.items()}, len(noise)) | told
    return ends.images(sampler.sample(noise, guidance, on_step, unconditional=other or None, conditions=told))


def _in_turn(name: str, value: Any, count: int) -> Array:
    """A row for each of `count` samples."""
    array = to_array(name, value)
    if array.ndim == 0 or len(array) == 0:
        raise UsageError(f"{name}: expected rows, one for each sample; received shape {list(array.shape)}.")
    return array[np.arange(count) % len(array)]


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
        float32 [B, C, H, W], of a video [B, C, F, H, W], in [-1, 1]; latents where the pipeline has no decoder.

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
