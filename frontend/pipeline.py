"""A diffusers pipeline folder: denoiser and scheduler by role, the loop by watching the pipeline run."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..loop.errors import StepfoldError, UsageError, nearest
from ..loop.pipeline_call import PipelineCall
from .components import Index, read_index, read_parts, staged
from .dense import dense
from .examples import BATCH, read_tensors
from .experts import Experts
from .guidance import BY_HAND
from .identity import weights_hash
from .load import (
    INPUTS_FILE,
    LOOP_FILE,
    PIPELINE_FILE,
    Around,
    Checkpoint,
    load_network,
    loop_lines,
    read_config,
    refuse_call,
)
from .proof import PipelineRun
from .roles import Inferred
from .schedulers import GRID_ARGUMENTS
from .surroundings import SURROUNDINGS
from .watch import GuidedLater, Watch
from .weights import first_line, without_progress_bars

logger = logging.getLogger(__name__)

DENOISERS = ("transformer", "unet", "prior", "decoder")
PROMPTS = ["a photo of a cat", "a drawing of a tree"]
USUAL_STEPS = 50
WATERMARK = "add_watermarker"
"""Argument of the classes that draw a mark into images where a package for it is installed; bundles never do."""
KNOWN_ARGUMENTS: Mapping[str, Any] = {"prompt": PROMPTS, "class_labels": [0, 1]}


def load_pipeline(
    path: Path, *, loop: Path | None = None, inputs: Path | None = None, call: PipelineCall | None = None
) -> Checkpoint:
    """Load the denoiser of a pipeline, with the loop the pipeline runs around it.

    With a loop file the denoiser is loaded by itself. Otherwise the pipeline is run with a recorder on the denoiser,
    which answers for it, so that a step costs little, and every step is compared with the loop that the first two say;
    steps, guidance and size are the defaults of its `__call__` unless the call says otherwise.

    Args:
        path: a folder with `model_index.json`.
        loop: a loop file for the denoiser.
        inputs: example tensors: arguments of the pipeline's call (such as `prompt_embeds`, when the folder holds no
            tokenizer), or with a loop file those of the denoiser.
        call: arguments of the pipeline's call that replace its defaults.

    Raises:
        UsageError: the folder is no pipeline with one denoiser, it cannot be run, or its loop does not fold.
    """
    index = read_index(path)
    components = index.components
    role = next((name for name in DENOISERS if components.get(name)), None)
    listed = components.get(role or "")
    if role is None or listed is None or not components.get("scheduler"):
        raise UsageError(
            f"{path / PIPELINE_FILE}: expected a pipeline with a scheduler and a {' or a '.join(DENOISERS)}; it has "
            f"{', '.join(name for name, value in components.items() if value) or 'none'}."
        )
    file = loop or path / LOOP_FILE
    if loop is not None or file.is_file():
        refuse_call(call, f"{file} says them")
        return load_network(path / role, loop=file, inputs=inputs, listed=(listed.class_name, listed.library))
    parts = read_parts(index)
    denoiser = parts.get(role)
    if denoiser is None:
        raise UsageError(
            f"{path / PIPELINE_FILE}: component {role!r}: expected a network of diffusers; received "
            f"{listed.library}.{listed.class_name}."
        )
    pipeline = _pipeline(index, parts, denoiser)
    given = read_tensors(inputs or path / INPUTS_FILE) if inputs or (path / INPUTS_FILE).is_file() else {}
    arguments = _arguments(path, pipeline, given, call or PipelineCall())
    others = {name: part for name, part in parts.items() if type(part) is type(denoiser) and part is not denoiser}
    run = PipelineRun(pipeline, denoiser, arguments, BATCH, others)
    inferred = _with_nothing(denoiser, record(path, run))
    experts = None if inferred.networks is None else Experts((denoiser, *others.values()), inferred.networks)
    return Checkpoint(
        path=path,
        class_name=type(denoiser).__name__,
        model=dense(denoiser),
        loop=inferred.loop,
        component=None,
        kwargs=inferred.kwargs,
        weights_sha256=weights_hash(*(experts.called() if experts is not None else (denoiser,))),
        experts=experts,
        config=read_config(path / role),
        unconditional=inferred.unconditional,
        around=_around(run, guided=inferred.loop.guidance is not None),
        run=run,
    )


def _with_nothing(denoiser: torch.nn.Module, inferred: Inferred) -> Inferred:
    """The call with the None that a pipeline gives for arguments without a default (the text of AudioLDM's UNet)."""
    parameters = inspect.signature(denoiser.forward).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    missing = dict.fromkeys(name for name in required if name not in inferred.kwargs)
    constants = {**inferred.loop.constants, **missing}
    return replace(
        inferred,
        kwargs={**inferred.kwargs, **missing},
        loop=inferred.loop.model_copy(update={"constants": constants}),
    )


def _around(run: PipelineRun, guided: bool) -> Around | None:
    """What surrounds the loop, where stepfold knows pipelines of this class.

    Raises:
        UsageError: the call does to prompts what no bundle does.
    """
    name = type(run.pipeline).__name__
    if name not in SURROUNDINGS:
        logger.info("%s: prompts and images of this pipeline are not compiled, only its denoiser", name)
        return None
    surroundings = SURROUNDINGS[name](run.pipeline, run.arguments)
    prompts, negative = (run.arguments.get(argument) for argument in ("prompt", "negative_prompt"))
    if prompts is not None:
        surroundings.require_one_encoding(guided)
    told = negative is not None or surroundings.unprompted == "empty"
    if prompts is not None and told and not isinstance(negative, list):
        negative = [negative or ""] * run.batch
    return Around(surroundings, prompts, negative, run.drawn)


def _pipeline(index: Index, parts: Mapping[str, Any], denoiser: torch.nn.Module) -> Any:
    """The pipeline around its loaded networks."""
    import diffusers

    cls = getattr(diffusers, index.class_name)
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "torch_dtype": torch.float32}
    expected = inspect.signature(cls.__init__).parameters
    given = {name: part for name, part in parts.items() if name in expected}
    if WATERMARK in expected:
        options[WATERMARK] = False
    with (
        staged(index, parts) as stage,
        _runs(index.path, index.class_name, denoiser, stage),
        without_progress_bars("diffusers"),
        without_progress_bars("transformers"),
    ):
        pipeline = cls.from_pretrained(str(stage), **given, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _arguments(path: Path, pipeline: Any, given: Mapping[str, torch.Tensor], call: PipelineCall) -> dict[str, Any]:
    """Arguments of one call for two samples."""
    parameters = inspect.signature(pipeline.__call__).parameters
    asked = call.for_pipeline(
        type(pipeline).__name__, {name: p.default for name, p in parameters.items()}, prompts=len(PROMPTS)
    )
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
    if not arguments and "batch_size" in parameters:  # of an unconditional model
        arguments["batch_size"] = BATCH
    if "prompt_embeds" in given:
        arguments |= {name: None for name in ("prompt", "negative_prompt") if name in parameters}
    arguments |= {name: value.item() if value.ndim == 0 else value for name, value in given.items()}
    arguments |= asked
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


def record(path: Path, run: PipelineRun) -> Inferred:
    """The loop of a pipeline, which all of its steps were compared with.

    Args:
        path: its folder, for messages.
        run: the pipeline's call.

    Raises:
        UsageError: the call fails, or the fold cannot hold what it does.
    """
    pipeline, denoiser = run.pipeline, run.denoiser
    steps = _steps(pipeline, run.arguments)
    try:
        try:
            inferred = _watched(path, run, Watch(pipeline.scheduler, BATCH, steps))
        except GuidedLater as later:
            inferred = _watched(path, run, Watch(pipeline.scheduler, BATCH, steps, later.guided))
    except UsageError as error:
        options = " ".join(_switches(run))
        if options and BY_HAND in str(error):  # says to turn something off, and not by which name the pipeline has it
            told = str(error).replace(
                BY_HAND, f"Call it without: {options}. Or write a {LOOP_FILE} for the denoiser alone."
            )
            raise UsageError(told) from error
        raise
    called = [
        network for i, network in enumerate((denoiser, *run.experts.values())) if i in (inferred.networks or (0,))
    ]
    _mention_others(pipeline, called)
    return inferred


def _watched(path: Path, run: PipelineRun, watch: Watch) -> Inferred:
    pipeline = run.pipeline
    with _runs(path, type(pipeline).__name__, run.denoiser), run.recorded(watch) as recorded, torch.no_grad():
        pipeline(**run.given())
    return watch.finish(recorded)


def _switches(run: PipelineRun) -> list[str]:
    """Options that turn off what a pipeline's call does to its guidance besides its scale."""
    found = []
    for parameter in inspect.signature(run.pipeline.__call__).parameters.values():
        name, value = parameter.name, run.arguments.get(parameter.name, parameter.default)
        if value is True and ("cfg" in name or "guidance" in name):
            found.append(f"--call {name}=false")
        elif "rescale" in name and isinstance(value, float) and value > 0:
            found.append(f"--call {name}=0")
    return found


def _mention_others(pipeline: Any, called: Sequence[torch.nn.Module]) -> None:
    """Tell of networks of the denoiser's kind that the loop does not call: an expert that is switched off, a prior."""
    import diffusers

    for name, part in pipeline.components.items():
        aside = all(part is not one for one in called)
        if isinstance(part, diffusers.ModelMixin) and aside and not hasattr(part, "decode"):
            logger.warning(
                "%s (%s): the loop of the pipeline does not call it, so it is not compiled", name, type(part).__name__
            )


@contextmanager
def _runs(path: Path, name: str, denoiser: torch.nn.Module, stage: Path | None = None) -> Iterator[None]:
    """Turn what a pipeline raises, which may be anything, into an error that says what to give instead."""
    try:
        yield
    except (StepfoldError, MemoryError, GuidedLater):
        raise
    except Exception as error:
        if _asks_for_an_image(name, error):
            raise UsageError(
                f"{path}: {name} is called with an image ({first_line(error)}), and the fold holds text-to-image and "
                "class-to-image pipelines, from noise to sample. Save the folder as the text-to-image pipeline of its "
                "model."
            ) from error
        reason = first_line(error) if stage is None else first_line(error).replace(str(stage), str(path))
        if isinstance(error, ImportError):
            raise UsageError(f"{path}: {name} cannot be run: {reason} Install the package that it asks for.") from error
        raise UsageError(
            f"{path}: {name} cannot be run: {reason} Give what is missing with --inputs "
            f"FILE.safetensors (arguments of its call, such as prompt_embeds), or a {LOOP_FILE} for the "
            f"{type(denoiser).__name__}. {loop_lines(type(denoiser))}"
        ) from error


def _asks_for_an_image(name: str, error: Exception) -> bool:
    """Whether a pipeline failed for want of an image that only its call can give."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, name).__call__).parameters
    return "image" in str(error).lower() and not {"image", "control_image"}.isdisjoint(parameters)


def _steps(pipeline: Any, arguments: Mapping[str, Any]) -> int:
    """How many steps a pipeline makes: as many as its own grid has where it is called with one."""
    for name in GRID_ARGUMENTS:
        if arguments.get(name) is not None:
            return len(arguments[name])
    parameter = inspect.signature(pipeline.__call__).parameters.get("num_inference_steps")
    default = parameter.default if parameter is not None else None
    return int(arguments.get("num_inference_steps") or (default if isinstance(default, int) else USUAL_STEPS))
