"""A checkpoint folder as a model, the loop around it, and one example call."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..ir.program import ModelIdentity, Program
from ..loop.errors import UsageError
from ..loop.pipeline_call import PipelineCall
from ..loop.reading import read_json
from ..loop.spec import ComponentFile, LoopSpec, read_loop
from .calling import flatten
from .capture import capture
from .dense import dense
from .examples import TEXT_ENCODERS, example_kwargs, read_tensors, unknown_inputs
from .experts import Experts
from .foreign import require_method, require_own_code, require_plain
from .identity import weights_hash
from .proof import PipelineRun
from .surroundings import Surroundings
from .surroundings.ends import CapturedEnds, Seen, capture_ends
from .weights import CONFIG, LARGEST_CONFIG_BYTES, find_weights, model_class, read_model

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
LOOP_FILE = "loop.yaml"
INPUTS_FILE = "inputs.safetensors"
IMAGE_DIMENSIONS = 2  # height and width
PIPELINE_FILE = "model_index.json"


@dataclass(frozen=True)
class Around:
    """What a pipeline does around its loop.

    Attributes:
        surroundings: surroundings of its family.
        prompts: prompts that it was run with; None where it got embeddings.
        negative: prompts of the other branch; None where it got embeddings, or no negative prompt means zeros.
        drawn: latents and the images that it makes of them.
    """

    surroundings: Surroundings
    prompts: Sequence[str] | None
    negative: Sequence[str] | None
    drawn: Callable[[], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        path: the folder.
        class_name: class of the model.
        model: model in evaluation mode and float32.
        loop: the loop around it, or None for a component.
        component: how a component is called, when `loop.yaml` says so.
        kwargs: one example call: a row for each row of the example inputs, two where none were given.
        weights_sha256: hash of the weights (in float32).
        config: the content of `config.json`.
        unconditional: conditions [B, ...] of the other branch in that call, where a pipeline gave them.
        around: what a pipeline does before and behind the loop, where stepfold knows it.
        run: the pipeline's call that the loop was recorded from; None where no pipeline was run.
        experts: networks that take the model's place at some calls; None where it runs at all of them.
    """

    path: Path
    class_name: str
    model: torch.nn.Module
    loop: LoopSpec | None
    component: ComponentFile | None
    kwargs: dict[str, Any]
    weights_sha256: str
    config: dict[str, Any]
    unconditional: Mapping[str, torch.Tensor] = field(default_factory=dict)
    around: Around | None = None
    run: PipelineRun | None = None
    experts: Experts | None = None

    @property
    def method(self) -> str:
        """The method of the model that is captured."""
        return self.component.component.method if self.component else "forward"

    def capture(self) -> Program:
        """Capture the model as its loop, or its caller, calls it."""
        identity = ModelIdentity(self.class_name, self.weights_sha256)
        program = capture(self.model, self.kwargs, self.loop, method=self.method, identity=identity)
        if self.experts is not None:
            program = self.experts.beside(program, self.kwargs)
        return replace(program, unconditional=self.unconditional)

    def capture_ends(self) -> CapturedEnds | None:
        """Capture what surrounds the loop in a pipeline, None where nothing is known about it; raises as it does."""
        if self.around is None or self.loop is None:
            return None
        tensors, _ = flatten(self.kwargs)
        conditions = {name: tensors[name] for name, spec in self.loop.inputs.items() if spec.role == "condition"}
        seen = Seen(self.around.prompts, conditions, self.around.negative, self.unconditional, self.around.drawn)
        return capture_ends(self.around.surroundings, seen, self.loop.latent.shape)


def load_checkpoint(
    path: Path, *, loop: Path | None = None, inputs: Path | None = None, call: PipelineCall | None = None
) -> Checkpoint:
    """Load a diffusers or transformers folder, or a diffusers pipeline folder.

    Args:
        path: a folder with `config.json` and safetensors, or with `model_index.json`.
        loop: a loop file to use instead of `loop.yaml` in the folder.
        inputs: a safetensors file of example inputs to use instead of `inputs.safetensors` in the folder.
        call: arguments of a pipeline's call that replace its defaults.

    Raises:
        UsageError: the folder, its configuration, weights or loop cannot be used; the message says what to do.
    """
    if not os.path.isdir(path):
        raise UsageError(f"{path}: no such checkpoint folder; expected one with {CONFIG_FILE} and safetensors weights.")
    if os.path.lexists(path / PIPELINE_FILE) and not os.path.lexists(path / CONFIG_FILE):
        from .pipeline import load_pipeline

        return load_pipeline(path, loop=loop, inputs=inputs, call=call)
    refuse_call(call, f"{path} is no pipeline folder; its loop file says them")
    return load_network(path, loop=loop, inputs=inputs)


def load_network(
    path: Path, *, loop: Path | None, inputs: Path | None, listed: tuple[str, str] | None = None
) -> Checkpoint:
    """Load the folder of one network.

    Args:
        path: a folder with `config.json` and safetensors.
        loop: see `load_checkpoint`.
        inputs: see `load_checkpoint`.
        listed: class and library that the index of a pipeline names for it; its own `config.json` may name another.

    Raises:
        UsageError: as `load_checkpoint`.
    """
    config = read_config(path)
    class_name, library = listed or class_of(path, config)
    description = _description(path, loop)
    cls = model_class(class_name, library)
    if isinstance(description, LoopSpec):
        _require_size_of_config(path, config, description)
    component = description if isinstance(description, ComponentFile) else None
    method = component.component.method if component else "forward"
    require_method(cls, library, method)
    tensors = read_tensors(inputs or path / INPUTS_FILE) if inputs or (path / INPUTS_FILE).is_file() else {}
    if description is None:
        _require_component(path, cls, library, tensors)
    model = dense(read_model(path, class_name, library, find_weights(path)))
    return Checkpoint(
        path=path,
        class_name=class_name,
        model=model,
        loop=description if isinstance(description, LoopSpec) else None,
        component=component,
        kwargs=example_kwargs(model, method, description, config, tensors),
        weights_sha256=weights_hash(model),
        config=config,
    )


def refuse_call(call: PipelineCall | None, reason: str) -> None:
    """Raise UsageError where a call is asked for and no pipeline is called."""
    if call is not None and call.given:
        raise UsageError(
            f"{', '.join(call.given)}: expected a pipeline folder without a loop file, which is called with them; "
            f"{reason}. Leave them out."
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
        UsageError: it is missing, is not a JSON object, or asks for quantized weights or code from elsewhere.
    """
    path = folder / CONFIG_FILE
    config = read_json(path, CONFIG, LARGEST_CONFIG_BYTES, strict=False)
    if not isinstance(config, dict):
        raise UsageError(f"{path}: expected a JSON object; received {type(config).__name__}.")
    if config.get("quantization_config"):
        raise UsageError(f"{path}: the weights are quantized; expected fp32, fp16 or bf16 weights.")
    require_own_code(path, config)
    return config


def class_of(folder: Path, config: dict[str, Any]) -> tuple[str, str]:
    """The class a configuration names, and its library.

    Raises:
        UsageError: it names none.
    """
    name = config.get("_class_name")
    if isinstance(name, str):
        return name, "diffusers"
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        return architectures[0], "transformers"
    raise UsageError(
        f"{folder / CONFIG_FILE}: names no model class; expected `_class_name` (diffusers) or `architectures` "
        "(transformers)."
    )


def loop_lines(cls: Any) -> str:
    """The `loop.yaml` to write for a denoiser class, with the inputs its forward requires."""
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    names = [p.name for p in parameters]
    state = names[0]
    timestep = next((name for name in names if name in ("timestep", "timesteps")), "timestep")
    others = [
        n for n in (required if len(required) > 2 else names[:4]) if n not in (state, timestep) and "return" not in n
    ]
    conditions = "".join(f", {name}: {{role: condition, shape: [77, 768], dtype: float32}}" for name in others)
    return (
        f"Write one beside {CONFIG_FILE}, for example:\n"
        f"  inputs: {{{state}: state, {timestep}: timestep{conditions}}}\n"
        "  sampler: {scheduler: DDIMScheduler, config: {clip_sample: false}, steps: 50}\n"
        "  latent: {shape: [4, 64, 64]}\n"
        "or, for a network without a loop:\n"
        "  component: {method: forward}\n"
        f"  inputs: {{{state}: {{role: condition, shape: [4, 64, 64], dtype: float32}}}}"
    )


def _description(path: Path, loop: Path | None) -> LoopSpec | ComponentFile | None:
    file = loop or path / LOOP_FILE
    description = read_loop(file) if loop is not None or os.path.lexists(file) else None
    require_plain(description)
    return description


def _require_size_of_config(path: Path, config: Mapping[str, Any], loop: LoopSpec) -> None:
    """Refuse images of another size than the configuration says: many models draw something at any size.

    Raises:
        UsageError: `sample_size` is another height and width than that of the latent.
    """
    size = config.get("sample_size")
    wanted = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list) else ()
    _, *received = loop.latent.shape
    told = len(wanted) == IMAGE_DIMENSIONS and all(isinstance(size, int) and size > 0 for size in wanted)
    if told and len(received) == IMAGE_DIMENSIONS and tuple(received) != wanted:
        raise UsageError(
            f"latent.shape: expected {' x '.join(map(str, wanted))} values, the sample_size of {path / CONFIG_FILE}; "
            f"received {' x '.join(map(str, received))}. Correct the loop; or write the other size into a copy of "
            f"{CONFIG_FILE}, if the model is meant for it."
        )


def _require_component(path: Path, cls: type, library: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """A folder without a loop: expect a transformers model whose inputs are known."""
    if library != "transformers":
        raise UsageError(f"{path}: no {LOOP_FILE}, and {cls.__name__} does not tell its loop. {loop_lines(cls)}")
    if tensors:
        return
    if cls.__name__ not in TEXT_ENCODERS:
        raise UsageError(f"{path}: {unknown_inputs(cls)}")
    logger.warning(
        "%s: no example inputs, so one is made up, and calibrated scales follow it. Give real ones: --inputs "
        "FILE.safetensors, with a row for each example.",
        path,
    )
