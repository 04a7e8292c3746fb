"""What a diffusers pipeline is called with, where its own defaults are not wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError

from .errors import UsageError, nearest
from .spec import Strict, describe
from .values import Plain, Scale

Pixels = Annotated[int, Field(gt=0, le=1 << 20, strict=True)]

PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "steps": ("num_inference_steps",),
    "guidance": ("guidance_scale", "true_cfg_scale"),
    "height": ("height",),
    "width": ("width",),
    "frames": ("num_frames", "video_length"),
    "negative_prompt": ("negative_prompt",),
}
"""The parameters of pipelines that a field stands for; the first that a pipeline has is meant."""
GIVEN_BY_STEPFOLD = (
    "prompt",
    "class_labels",
    "batch_size",
    "latents",
    "generator",
    "output_type",
    "return_dict",
    "num_images_per_prompt",
)


class PipelineCall(Strict):
    """Arguments of a pipeline's call; None leaves one to the pipeline.

    Attributes:
        steps: number of inference steps.
        guidance: guidance scale; at most 1 is one branch.
        height: height of the images, in pixels.
        width: width of the images, in pixels.
        frames: number of frames of a video.
        negative_prompt: negative prompt of the unconditional branch while the pipeline is watched.
        arguments: further arguments by the name that the pipeline has for them.
    """

    steps: int | None = Field(default=None, gt=0, le=10_000, strict=True)
    guidance: Scale | None = None
    height: Pixels | None = None
    width: Pixels | None = None
    frames: Pixels | None = None
    negative_prompt: str | None = None
    arguments: dict[str, Plain] = Field(default_factory=dict)

    @property
    def given(self) -> dict[str, Any]:
        """What was asked for, by the name of the option; empty where everything is left to the pipeline."""
        options = {name: getattr(self, name) for name in PARAMETERS}
        return {name: value for name, value in options.items() if value is not None} | dict(self.arguments)

    def for_pipeline(self, pipeline: str, defaults: Mapping[str, Any], prompts: int) -> dict[str, Any]:
        """The arguments of a pipeline's call.

        Args:
            pipeline: its class, for messages.
            defaults: the parameters of its call with their defaults.
            prompts: how many prompts it is called with; each gets the negative prompt.

        Raises:
            UsageError: the pipeline has no such parameter, or stepfold gives that argument itself.
        """
        found: dict[str, Any] = {}
        for option in PARAMETERS:
            value = getattr(self, option)
            if value is not None:
                found[_parameter(option, pipeline, defaults)] = value
        for name, value in self.arguments.items():
            if name in GIVEN_BY_STEPFOLD:
                raise UsageError(f"--call {name}: stepfold gives this argument itself; leave it out.")
            if name not in defaults:
                raise UsageError(f"--call {name}: {pipeline} takes no such argument; {nearest(name, list(defaults))}")
            if name in found:
                raise UsageError(
                    f"--call {name}: there is an option for it, and it was given too; leave one of them out."
                )
            found[name] = value
        return {n: [v] * prompts if "prompt" in n and isinstance(v, str) else v for n, v in found.items()}


def _parameter(option: str, pipeline: str, defaults: Mapping[str, Any]) -> str:
    """The parameter that an option stands for.

    A pipeline whose distilled scale is None by default is guided by its true scale (QwenImage).
    """
    names = [name for name in PARAMETERS[option] if name in defaults]
    if not names:
        raise UsageError(
            f"--{option.replace('_', '-')}: {pipeline} takes no {PARAMETERS[option][0]}; its call has "
            f"{', '.join(defaults)}."
        )
    return names[-1] if defaults[names[0]] is None and option == "guidance" else names[0]


def pipeline_call(**options: Any) -> PipelineCall:
    """A call of these options; raises UsageError where one is out of its range or of another type."""
    try:
        return PipelineCall(**options)
    except ValidationError as error:
        raise UsageError(f"the pipeline's call: {describe(error)}") from None
