"""`manifest.json`: what a bundle holds and where it came from."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, JsonValue, field_validator, model_validator

from ..loop.classes import check_unconditional
from ..loop.errors import UsageError
from ..loop.pipeline_call import PipelineCall
from ..loop.ports import InputPort, Port, Rate
from ..loop.spec import LoopSpec, Role, Strict, Values
from ..loop.values import DTYPES, MOST_DIMENSIONS, ArrayLike, Size
from .prompts import Cleaning

FORMAT_VERSION = 2
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Seed = Annotated[int, Field(ge=0, strict=True)]
MOST_CALLS = 1 << 20  # of a loop
MOST_INDICES = 1 << 24  # of an embedding; a list of them fits memory
Unprompted = Literal["empty", "zeros"]
Compared = Values | Literal["images"]
"""What a PSNR compares."""


class PortEntry(Strict):
    """A tensor of a stage: sizes with null for the batch, NumPy dtype name."""

    name: str
    shape: Annotated[tuple[Size | None, ...], Field(max_length=MOST_DIMENSIONS)]
    dtype: str

    @field_validator("dtype")
    @classmethod
    def _known_to_numpy(cls, value: str) -> str:
        if value not in DTYPES:
            raise ValueError(f"expected one of {', '.join(DTYPES)}; received {value!r:.40}")
        return value

    @classmethod
    def of(cls, port: Port) -> PortEntry:
        """The entry of a port."""
        return cls(name=port.name, shape=port.shape, dtype=port.dtype)

    def port(self) -> Port:
        """The port of this entry."""
        return Port(self.name, self.shape, self.dtype)


class InputEntry(PortEntry):
    """An input of the program; `cardinality` is how many values of an index are valid."""

    role: Role
    cardinality: int | None = Field(default=None, gt=0, le=MOST_INDICES)

    @classmethod
    def of_input(cls, port: InputPort) -> InputEntry:
        """The entry of a program input."""
        return cls(
            name=port.name, shape=port.port.shape, dtype=port.port.dtype, role=port.role, cardinality=port.cardinality
        )

    def input_port(self) -> InputPort:
        """The program input of this entry."""
        return InputPort(self.port(), self.role, self.cardinality)


class StageEntry(Strict):
    """One engine file, run at one rate: a variant of a slot.

    Attributes:
        exact_forms: layers whose 8-bit codes saturate on processors without VNNI, and the form that each has instead.
        float_without_vnni: whether such processors compute it in float, and others in integers.
    """

    name: str
    rate: Rate
    file: str
    inputs: tuple[PortEntry, ...]
    outputs: tuple[PortEntry, ...] = Field(min_length=1)
    exact_forms: dict[str, str] = Field(default_factory=dict)
    float_without_vnni: bool = False

    def input_ports(self) -> tuple[Port, ...]:
        """What the stage reads."""
        return tuple(entry.port() for entry in self.inputs)

    def output_ports(self) -> tuple[Port, ...]:
        """What the stage computes, in order."""
        return tuple(entry.port() for entry in self.outputs)


class SlotEntry(Strict):
    """A place of the program, and the stages that may fill it.

    Attributes:
        variants: names of stages of one rate and with the same outputs, the original first.
        by_call: number of the variant at each grid call; None fills the slot with the original at every call.
    """

    name: str
    variants: tuple[str, ...] = Field(min_length=1)
    by_call: Annotated[tuple[Count, ...], Field(max_length=MOST_CALLS)] | None = None


class ModelEntry(Strict):
    """The network: its class and the hash of its weights."""

    class_name: str = Field(validation_alias=AliasChoices("class", "class_name"), serialization_alias="class")
    weights_sha256: str


class BackendEntry(Strict):
    """The engine the stages were built for, and the options it was given.

    Attributes:
        instructions: sets of instructions of the processor that it was built and measured on, as far as they decide how
            8-bit numbers are multiplied.
    """

    name: str
    version: str
    device: str
    instructions: tuple[str, ...] = ()
    options: dict[str, JsonValue] = Field(default_factory=dict)


class RefusalEntry(Strict):
    """A site a pass left alone, and why."""

    site: str
    reason: str


class PassEntry(Strict):
    """What one pass did; drifts are relative L2 errors, PSNR that of whole samples, null where nothing was run."""

    name: str
    outcome: Literal["changed", "identity", "not_applicable"]
    changed: Count
    refused: tuple[RefusalEntry, ...] = ()
    drift: float | None
    total_drift: float | None
    psnr_db: float | None = None
    parameters_before: Count
    parameters_after: Count
    flops_before: Count
    flops_after: Count
    seconds: float
    details: dict[str, JsonValue] = Field(default_factory=dict)


class ScheduleEntry(Strict):
    """The table of the default guidance scale, counted."""

    grid_steps: Count
    evaluations: Count
    guided_evaluations: Count
    fitted_on: Literal["engine", "reference"]


class PsnrEntry(Strict):
    """PSNR in dB over samples.

    Attributes:
        mean: mean of the samples.
        min: worst sample.
        low: lower 95 % confidence bound of the mean.
        p05: 5th percentile of the samples; None in bundles that were written before it was told.
    """

    mean: float
    min: float
    low: float
    p05: float | None = None


class QualityEntry(Strict):
    """How close the bundle's samples are to those of the full loop.

    Attributes:
        psnr_db: figures; their peak is 2 of pixels and images, the range of the reference of latents.
        samples: number of samples.
        set: set of the samples.
        of: what was compared: samples, or the images that the decoder of a pipeline makes of them.
        latent_psnr_db: figures of the latents behind images; None where samples themselves were compared.
    """

    psnr_db: PsnrEntry
    samples: Count
    set: str
    of: Compared = "pixels"
    latent_psnr_db: PsnrEntry | None = None


class ProofEntry(Strict):
    """How close the unoptimized program is to the pipeline it was captured from.

    Attributes:
        latent_db: PSNR of the worst sample's latents, its peak the range of the pipeline's.
        image_db: agreement of the images; None where the bundle has no decoder.
        samples: number of samples that were compared.
    """

    latent_db: float
    image_db: float | None
    samples: Count


class SkippedProofEntry(Strict):
    """Why a bundle of a pipeline was not compared with it."""

    skipped: str


class FrozenDimensionEntry(Strict):
    """A dimension that the capture specialized to one size."""

    input: str
    dimension: Count
    value: int
    source: str


class TokenizerEntry(Strict):
    """A tokenizer, as its `tokenizer.json`: padding and truncation included.

    Attributes:
        input: input of `text` that gets the token numbers.
        file: the `tokenizer.json`.
        mask: input of `text` that tells tokens from padding; None where there is none.
        cleaning: what is done to a prompt before, in order.
    """

    input: str
    file: str
    mask: str | None = None
    cleaning: tuple[Cleaning, ...] = ()


class PipelineEntry(Strict):
    """What a diffusers pipeline does around the loop.

    Attributes:
        tokenizers: one for each input of `text`: the token numbers [B, T] of a prompt.
        text: folder of a bundle within this one, from token numbers to conditions; None where there are no prompts.
        decoder: folder of a bundle within this one, from latents to images in [-1, 1]; None where latents are images.
        given: conditions that the pipeline sets itself, name -> the value of one sample.
        unprompted: conditions of the other branch where there is no negative prompt: those of an empty one, or zeros.
    """

    class_name: str = Field(validation_alias=AliasChoices("class", "class_name"), serialization_alias="class")
    tokenizers: tuple[TokenizerEntry, ...] = ()
    text: str | None = None
    decoder: str | None = None
    given: dict[str, ArrayLike] = Field(default_factory=dict)
    unprompted: Unprompted = "empty"

    @property
    def folders(self) -> tuple[str, ...]:
        """The bundles within this one."""
        return tuple(folder for folder in (self.text, self.decoder) if folder is not None)


class SharedEntry(Strict):
    """Weights that several stages read from one file.

    Attributes:
        file: it is named here for people; the engine files refer to it.
        stages: stages that read it.
        saved_bytes: bytes of weights that would otherwise be stored again.
    """

    file: str
    stages: tuple[str, ...] = Field(min_length=2)
    saved_bytes: Count


class FileEntry(Strict):
    """Digest and size of a file."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: Count


class Manifest(Strict):
    """All of `manifest.json`.

    Attributes:
        inputs: inputs of the program, by role.
        outputs: names of its outputs; for a loop the first is the prediction.
        stages: engine files, in the order of `slots`.
        slots: places of the program, in topological order.
        shared: weights that several stages read from one file.
        constants: keyword arguments baked in at capture.
        probe: the file with recorded inputs and outputs, replayed by `verify`.
        further_probes: one more for each further variant that a grid call fixes.
        pipeline: what surrounds the loop in a diffusers pipeline.
        call: arguments of the pipeline's call that replaced its defaults; None where there were none.
        proof: how close the unoptimized program is to the pipeline, or why that is not known; None for a checkpoint that
            is no pipeline.
        files: digest of every file but the manifest, by relative POSIX path.
    """

    format_version: int = FORMAT_VERSION
    stepfold_version: str
    model: ModelEntry
    recipe: JsonValue
    loop: LoopSpec | None
    backend: BackendEntry
    batch_invariant: bool
    seeds: dict[str, Seed | tuple[Seed, ...]] = Field(default_factory=dict)
    passes: tuple[PassEntry, ...] = ()
    schedule: ScheduleEntry | None = None
    quality: QualityEntry | None = None
    inputs: tuple[InputEntry, ...]
    outputs: tuple[str, ...] = Field(min_length=1)
    stages: tuple[StageEntry, ...] = Field(min_length=1)
    slots: tuple[SlotEntry, ...] = Field(min_length=1)
    shared: SharedEntry | None = None
    constants: dict[str, JsonValue] = Field(default_factory=dict)
    frozen_dimensions: tuple[FrozenDimensionEntry, ...] = ()
    probe: str | None = None
    further_probes: tuple[str, ...] = ()
    pipeline: PipelineEntry | None = None
    call: PipelineCall | None = None
    proof: ProofEntry | SkippedProofEntry | None = None
    files: dict[str, FileEntry] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _named_once(self) -> Manifest:
        _unique("stages", [stage.name for stage in self.stages])
        _unique("slots", [slot.name for slot in self.slots])
        produced = [entry.name for slot in self.slots for entry in self._filled(slot)[0].outputs]
        listed = [name for slot in self.slots for name in slot.variants]
        if listed != [stage.name for stage in self.stages]:
            raise ValueError(f"expected each stage in one slot, in the order of the slots; received {listed}")
        _unique("values", [*(entry.name for entry in self.inputs), *produced])
        if self.loop is not None:
            _require_roles(self.loop, [entry.input_port() for entry in self.inputs])
        elif any(entry.role != "condition" for entry in self.inputs):
            raise ValueError("a program without a loop has conditions only")
        for name in self.shared.stages if self.shared else ():
            if name not in [stage.name for stage in self.stages]:
                raise ValueError(f"shared: there is no stage {name!r}")
        missing = sorted(set(self.outputs) - set(produced))
        if missing:
            raise ValueError(f"outputs {missing} are computed by no stage")
        return self

    def _filled(self, slot: SlotEntry) -> list[StageEntry]:
        """The stages of a slot: they compute the same, and one of them runs at each call."""
        by_name = {stage.name: stage for stage in self.stages}
        missing = [name for name in slot.variants if name not in by_name]
        if missing:
            raise ValueError(f"slot {slot.name!r}: there is no stage {missing[0]!r}")
        variants = [by_name[name] for name in slot.variants]
        for stage in variants:
            if (stage.outputs, stage.rate) != (variants[0].outputs, variants[0].rate):
                raise ValueError(
                    f"stage {stage.name!r} shares a slot with {variants[0].name!r} and computes something else"
                )
        if variants[0].rate is not Rate.STEP and (len(variants) > 1 or slot.by_call is not None):
            raise ValueError(f"slot {slot.name!r} runs at rate {variants[0].rate}; only one of rate step has variants")
        if any(number >= len(variants) for number in slot.by_call or ()):
            raise ValueError(f"slot {slot.name!r} has {len(variants)} variants; by_call names another")
        return variants

    @property
    def probes(self) -> tuple[str, ...]:
        """The files of all probes."""
        return (*(() if self.probe is None else (self.probe,)), *self.further_probes)

    def input_ports(self) -> tuple[InputPort, ...]:
        """The inputs of the program."""
        return tuple(entry.input_port() for entry in self.inputs)


def _require_roles(loop: LoopSpec, inputs: Sequence[InputPort]) -> None:
    """The inputs are those of the loop: its latent and timestep, and values that it has for the other branch."""
    for role, name in (("state", loop.state), ("timestep", loop.timestep)):
        named = [port.name for port in inputs if port.role == role]
        if named != [name]:
            raise ValueError(f"expected the input {name!r} as the only one of role {role}; received {named}")
    for port in inputs:
        if port.port.shape[:1] != (None,):
            raise ValueError(f"input {port.name!r}: expected a batch that is free; received {port.port.shape_text}")
    latent = next(port.port.shape[1:] for port in inputs if port.role == "state")
    if latent != loop.latent.shape:
        raise ValueError(f"expected the latent {list(loop.latent.shape)} of the loop; received {list(latent)}")
    try:
        check_unconditional(inputs, loop)
    except UsageError as error:
        raise ValueError(str(error)) from None


def stepfold_version() -> str:
    """The version of the installed stepfold."""
    return importlib.metadata.version("stepfold")


def _unique(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"two {what} are called {name!r}")
        seen.add(name)
