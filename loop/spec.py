"""LoopSpec: what the loop around a denoiser looks like, as written in `loop.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import UsageError
from .reading import Expected
from .values import DTYPES, LARGEST_FACTOR, TIMESTEP_DTYPES, ArrayLike, Factor, Plain, Scale, Shape
from .yaml_files import read_yaml

LOOP_FILE = Expected("a loop file, YAML")
MOST_STEPS = 2_000
"""Of a sampler: the fold holds a weight for each pair of calls, and schedules are trained on 1,000 timesteps."""
Role = Literal["state", "timestep", "condition", "constant"]


class Strict(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class InputSpec(Strict):
    """One denoiser input: its role and, where the checkpoint does not tell, its shape without the batch."""

    role: Role
    shape: Shape | None = None
    dtype: str | None = None

    @model_validator(mode="after")
    def _known_dtype(self) -> InputSpec:
        valid = TIMESTEP_DTYPES if self.role == "timestep" else DTYPES
        if self.dtype is not None and self.dtype not in valid:
            raise ValueError(f"unknown dtype {self.dtype!r:.40} of a {self.role}; expected one of {', '.join(valid)}")
        return self


class SamplerSpec(Strict):
    """A diffusers scheduler class, its configuration, and the arguments of its `set_timesteps` and its `step`.

    The denoiser receives `timestep_scale` times the timestep of the scheduler, plus `timestep_offset`: the pipelines of
    FLUX and QwenImage pass a thousandth of it, that of Lumina 2 one less a thousandth. The scheduler receives
    `output_scale` times the guided output: some pipelines negate it.
    """

    scheduler: str
    config: dict[str, Plain] = Field(default_factory=dict)
    steps: int = Field(gt=0, le=MOST_STEPS, strict=True)
    set_timesteps: dict[str, Plain] = Field(default_factory=dict)
    step: dict[str, Plain] = Field(default_factory=dict)
    timestep_scale: Factor = 1.0
    timestep_offset: Scale = 0.0
    output_scale: Factor = 1.0

    @model_validator(mode="after")
    def _times_above_zero(self) -> SamplerSpec:
        if self.timestep_scale < 0 and self.timestep_offset <= 0:
            raise ValueError("expected a timestep_offset above 0 beside a negative timestep_scale")
        return self


class GuidanceValues(Strict):
    """Several guidance scales, one fitted table for each; `strict` refuses any other scale at run time."""

    values: tuple[Scale, ...] = Field(min_length=1)

    @field_validator("values")
    @classmethod
    def _different(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(values)) < len(values):
            raise ValueError("expected scales that differ")
        return values


class RescaleSpec(Strict):
    """The guided output v times a number that brings its size near that of the conditional output c.

    Attributes:
        over: part of a latent that has a number of its own: a `sample`, or a `row` of the last axis (a token of a packed
            latent).
        measure: size that is compared, the Euclidean `norm` or the standard `deviation`.
        share: part of the rescaled output in the result; the rest is v as it was (`guidance_rescale` of arXiv 2305.08891,
            section 3.4).
        limit: largest size of the result in sizes of c, which makes nothing larger; None makes the sizes equal.
    """

    over: Literal["sample", "row"] = "sample"
    measure: Literal["norm", "deviation"] = "norm"
    share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    limit: Annotated[float, Field(gt=0, le=LARGEST_FACTOR, allow_inf_nan=False)] | None = None


Strength = Annotated[float, Field(ge=0, le=LARGEST_FACTOR, allow_inf_nan=False)]


class GuidanceSpec(Strict):
    """Classifier-free guidance `v = u + scale (c - u)` between the conditional c and the unconditional u.

    Attributes:
        scale: scale, or several of them.
        unconditional: value of each condition in the unconditional branch, or `input` where the caller supplies them (a
            negative prompt).
        strict: whether any other scale is refused at run time.
        strength: share of the guidance that each call has, in loops that guide some calls only, or with other scales. The
            scale of a call is `1 + strength (scale - 1)`, so that 0 is the conditional branch alone; None is 1 for all.
        rescale: rule for the size of v; None leaves it.
    """

    scale: Scale | GuidanceValues
    unconditional: dict[str, ArrayLike] | Literal["input"]
    strict: bool = False
    strength: tuple[Strength, ...] | None = Field(default=None, max_length=2 * MOST_STEPS)
    rescale: RescaleSpec | None = None

    @property
    def scales(self) -> tuple[float, ...]:
        """The scales that get a fitted table, the default first."""
        return self.scale.values if isinstance(self.scale, GuidanceValues) else (self.scale,)


Values = Literal["pixels", "latents"]
IMAGE_CHANNELS = (1, 3)
"""Of images in gray and in color."""


class LatentSpec(Strict):
    """Shape of one latent, without the batch: `[C, H, W]` or the model's own, and what its values are.

    Attributes:
        shape: sizes.
        values: `pixels` of an image in [-1, 1], or `latents`, which have no range of their own; by default pixels where the
            shape is that of an image of 1 or 3 channels.
    """

    shape: Shape = Field(min_length=1)
    values: Values | None = None

    @property
    def kind(self) -> Values:
        """What the values are, whether or not `values` says it."""
        if self.values is not None:
            return self.values
        return "pixels" if len(self.shape) == 3 and self.shape[0] in IMAGE_CHANNELS else "latents"


class ComponentSpec(Strict):
    """A network without a loop: the method of the model to capture."""

    method: str = "forward"


class LoopSpec(Strict):
    """Sampler, guidance, latent and the role of each denoiser input.

    `draws` is how often the sampler draws noise on its way. It follows from the sampler and is found at capture, so a
    `loop.yaml` need not have it.
    """

    inputs: dict[str, InputSpec]
    sampler: SamplerSpec
    guidance: GuidanceSpec | None = None
    latent: LatentSpec
    constants: dict[str, Plain] = Field(default_factory=dict)
    draws: int = Field(default=0, ge=0, le=2 * MOST_STEPS)

    @field_validator("inputs", mode="before")
    @classmethod
    def _short_roles(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: {"role": spec} if isinstance(spec, str) else spec for name, spec in value.items()}
        return value

    @model_validator(mode="after")
    def _one_state_one_timestep(self) -> LoopSpec:
        for role in ("state", "timestep"):
            names = self.names(role)
            if len(names) != 1:
                raise ValueError(f"exactly one input must have the role {role!r}; received {names}")
        values = [name for name in self.constants if name in self.inputs and self.inputs[name].role != "constant"]
        if values:
            raise ValueError(f"constants names {values}, which are inputs of another role")
        if self.guidance is not None and isinstance(self.guidance.unconditional, dict):
            unknown = sorted(set(self.guidance.unconditional) - set(self.conditions))
            if unknown:
                raise ValueError(f"guidance.unconditional names {unknown}, which are not condition inputs")
        return self

    def names(self, role: Role) -> list[str]:
        """The names of the inputs with this role, in order."""
        return [name for name, spec in self.inputs.items() if spec.role == role]

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise of one sample: that of a latent, with the start and all draws in front of it if there are any."""
        return (1 + self.draws, *self.latent.shape) if self.draws else tuple(self.latent.shape)

    @property
    def state(self) -> str:
        """The name of the input that carries the latent."""
        return self.names("state")[0]

    @property
    def timestep(self) -> str:
        """The name of the input that carries the timestep."""
        return self.names("timestep")[0]

    @property
    def conditions(self) -> list[str]:
        """The names of the inputs that are fixed for one request."""
        return self.names("condition")


class ComponentFile(Strict):
    """The form of `loop.yaml` for a component: a method and its example inputs, no loop."""

    component: ComponentSpec
    inputs: dict[str, InputSpec] = Field(default_factory=dict)
    constants: dict[str, Plain] = Field(default_factory=dict)


def read_loop(path: Path) -> LoopSpec | ComponentFile:
    """Read a `loop.yaml`.

    Raises:
        UsageError: the file is missing, is not YAML, or does not describe a loop or a component.
    """
    data, _ = read_yaml(path, LOOP_FILE)
    if not isinstance(data, dict):
        raise UsageError(f"{path}: expected a mapping with inputs, sampler and latent; received {type(data).__name__}.")
    if isinstance(data.get("component"), dict) and isinstance(data.get("inputs"), dict):
        data["inputs"] = {k: {"role": v} if isinstance(v, str) else v for k, v in data["inputs"].items()}
    kind = ComponentFile if "component" in data else LoopSpec
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"{path}: {describe(error)}") from None


def describe(error: ValidationError) -> str:
    """One line a pydantic error: where, what was wrong, what was received."""
    return "; ".join(
        f"{'.'.join(str(part) for part in item['loc']) or 'file'}: {item['msg']} (received {item['input']!r:.80})"
        for item in error.errors()
    )
