"""A diffusers pipeline folder: denoiser and scheduler by role, the loop by running two steps."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..loop.errors import UsageError, nearest
from ..loop.reading import Expected, read_json
from .examples import BATCH, read_tensors
from .identity import weights_hash
from .load import (
    CONFIG_FILE,
    INPUTS_FILE,
    LARGEST_CONFIG_BYTES,
    LOOP_FILE,
    PIPELINE_FILE,
    Around,
    Checkpoint,
    class_of,
    load_checkpoint,
    loop_lines,
    read_config,
)
from .recorder import Recording, recording
from .roles import infer
from .surroundings import SURROUNDINGS
from .weights import LOADING_ERRORS, PICKLES, find_weights, read_model

logger = logging.getLogger(__name__)

DENOISERS = ("transformer", "unet")
LIBRARIES = ("diffusers", "transformers")
PROMPTS = ["a photo of a cat", "a drawing of a tree"]
CHOOSES_CODE = re.compile("Auto[A-Z]")
"""Classes of transformers and diffusers that take the class to load, and its code, from the folder (`AutoTokenizer`)."""
KNOWN_ARGUMENTS: Mapping[str, Any] = {"prompt": PROMPTS, "class_labels": [0, 1]}


def load_pipeline(path: Path, *, loop: Path | None = None, inputs: Path | None = None) -> Checkpoint:
    """Load the denoiser of a pipeline, with the loop the pipeline runs around it.

    With a loop file the denoiser is loaded by itself. Otherwise the pipeline is run for two steps with a recorder on
    the denoiser; steps and guidance are the defaults of its `__call__`.

    Args:
        path: a folder with `model_index.json`.
        loop: a loop file for the denoiser.
        inputs: example tensors: arguments of the pipeline's call (such as `prompt_embeds`, when the folder holds no
            tokenizer), or with a loop file those of the denoiser.

    Raises:
        UsageError: the folder is no pipeline with one denoiser, it cannot be run, or its loop does not fold.
    """
    name, components = _index(path)
    role = next((name for name in DENOISERS if components.get(name)), None)
    if role is None or not components.get("scheduler"):
        raise UsageError(
            f"{path / PIPELINE_FILE}: expected a pipeline with a scheduler and a {' or a '.join(DENOISERS)}; it has "
            f"{', '.join(name for name, value in components.items() if value) or 'none'}."
        )
    file = loop or path / LOOP_FILE
    if loop is not None or file.is_file():
        return load_checkpoint(path / role, loop=file, inputs=inputs)
    _refuse_pickles(path, components)
    for name, class_name in components.items():
        if class_name and (path / name / CONFIG_FILE).is_file():
            read_config(path / name)  # refuses what asks for code
    config = read_config(path / role)
    class_name, library = class_of(path / role, config)
    denoiser = read_model(path / role, class_name, library, find_weights(path / role))
    pipeline = _pipeline(path, name, components, role, denoiser)
    given = read_tensors(inputs or path / INPUTS_FILE) if inputs or (path / INPUTS_FILE).is_file() else {}
    arguments = _arguments(path, pipeline, given)
    recorded = _record(path, pipeline, denoiser, arguments)
    steps = _default(pipeline, "num_inference_steps", 50)
    inferred = infer(recorded, pipeline.scheduler, BATCH, steps)
    return Checkpoint(
        path=path,
        class_name=class_name,
        model=denoiser,
        loop=inferred.loop,
        component=None,
        kwargs=inferred.kwargs,
        weights_sha256=weights_hash(denoiser),
        config=config,
        unconditional=inferred.unconditional,
        around=_around(pipeline, arguments),
    )


def _around(pipeline: Any, arguments: Mapping[str, Any]) -> Around | None:
    """What surrounds the loop, where stepfold knows pipelines of this class."""
    name = type(pipeline).__name__
    if name not in SURROUNDINGS:
        logger.info("%s: prompts and images of this pipeline are not compiled, only its denoiser", name)
        return None
    return Around(SURROUNDINGS[name](pipeline), arguments.get("prompt"))


def _index(path: Path) -> tuple[str, dict[str, str | None]]:
    """The pipeline class of `model_index.json` and its components by name; one that is left out is None."""
    file = path / PIPELINE_FILE
    index = read_json(file, Expected("the JSON of a diffusers pipeline"), LARGEST_CONFIG_BYTES, strict=False)
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise UsageError(f"{file}: expected a JSON object with `_class_name`, a pipeline of diffusers.")
    found = {}
    for name, value in index.items():
        if name.startswith("_") or not (isinstance(value, list) and len(value) == 2):
            continue
        library, class_name = value
        if not all(entry is None or isinstance(entry, str) for entry in value):
            raise UsageError(f"{file}: component {name!r}: expected a library and a class; received {value!r:.80}.")
        foreign = library not in LIBRARIES and not _is_pipeline_module(library)
        if class_name is not None and (foreign or CHOOSES_CODE.match(str(class_name))):
            raise UsageError(
                f"{file}: component {name!r} is {library}.{class_name}; only classes of diffusers and transformers are "
                "loaded, no code from a checkpoint is run."
            )
        found[name] = class_name
    return index["_class_name"], found


def _is_pipeline_module(library: str) -> bool:
    """Whether diffusers itself has a pipeline module of this name (safety checkers live there)."""
    import diffusers.pipelines

    return isinstance(library, str) and library.isidentifier() and hasattr(diffusers.pipelines, library)


def _refuse_pickles(path: Path, components: Mapping[str, Any]) -> None:
    for name, value in components.items():
        folder = path / name
        if value and folder.is_dir() and any(file.suffix in PICKLES for file in folder.iterdir()):
            find_weights(folder)


def _pipeline(path: Path, name: str, components: Mapping[str, Any], role: str, denoiser: torch.nn.Module) -> Any:
    """The pipeline around an already loaded denoiser; components the folder leaves out are None."""
    import diffusers

    cls = getattr(diffusers, name, None) if name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
        known = [entry for entry in dir(diffusers) if entry.endswith("Pipeline")]
        raise UsageError(f"{path / PIPELINE_FILE}: diffusers has no pipeline {name!r}; {nearest(name, known)}")
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "torch_dtype": torch.float32}
    expected = {entry for entry in inspect.signature(cls.__init__).parameters if entry not in ("self", "kwargs")}
    parts = {entry: None for entry in expected if entry in components and not components[entry]} | {role: denoiser}
    try:
        pipeline = cls.from_pretrained(str(path), **parts, **options)
    except (*LOADING_ERRORS, ImportError) as error:
        raise _cannot_run(path, name, denoiser, error) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _arguments(path: Path, pipeline: Any, given: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Arguments of one call for two samples."""
    parameters = inspect.signature(pipeline.__call__).parameters
    unknown = [name for name in given if name not in parameters]
    if unknown:
        raise UsageError(
            f"example inputs: {unknown[0]!r} is no argument of {type(pipeline).__name__}; "
            f"{nearest(unknown[0], list(parameters))}"
        )
    if "strength" in parameters:
        raise UsageError(
            f"{path}: {type(pipeline).__name__} starts in the middle of its grid, where its `strength` says; the fold "
            "holds the whole grid only, from noise to sample. Save the folder as the text-to-image pipeline."
        )
    arguments = {name: value for name, value in KNOWN_ARGUMENTS.items() if name in parameters}
    if "prompt_embeds" in given:
        arguments |= {name: None for name in ("prompt", "negative_prompt") if name in parameters}
    arguments |= given
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in arguments]
    if missing and parameters[missing[0]].kind is not inspect.Parameter.VAR_KEYWORD:
        raise UsageError(
            f"{path}: {type(pipeline).__name__} needs {', '.join(missing)} to be called; the fold holds text-to-image "
            "and class-to-image pipelines. Write a loop.yaml for the denoiser alone."
        )
    if "output_type" in parameters:
        arguments["output_type"] = "latent"
    if "generator" in parameters:
        arguments["generator"] = torch.Generator().manual_seed(0)
    return arguments


def _record(path: Path, pipeline: Any, denoiser: torch.nn.Module, arguments: dict[str, Any]) -> Recording:
    try:
        with recording(denoiser, pipeline.scheduler) as recorded, torch.no_grad():
            pipeline(**arguments)
    except (*LOADING_ERRORS, ImportError) as error:
        raise _cannot_run(path, type(pipeline).__name__, denoiser, error) from error
    return recorded


def _cannot_run(path: Path, name: str, denoiser: torch.nn.Module, error: Exception) -> UsageError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return UsageError(
        f"{path}: {name} cannot be run for two steps: {type(error).__name__}: {lines[0] if lines else 'no message'} "
        f"Give what is missing with --inputs FILE.safetensors (arguments of its call, such as prompt_embeds), or a "
        f"{LOOP_FILE} for the {type(denoiser).__name__}. {loop_lines(type(denoiser))}"
    )


def _default(pipeline: Any, name: str, otherwise: int) -> int:
    parameter = inspect.signature(pipeline.__call__).parameters.get(name)
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else otherwise
