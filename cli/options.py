"""Options that several commands share."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from ..loop.budget import QualityBudget
from ..loop.errors import UsageError
from ..loop.pipeline_call import PipelineCall, pipeline_call
from ..loop.reading import Expected
from ..loop.yaml_files import parse_yaml

BUNDLE_OR_CHECKPOINT = "BUNDLE|CHECKPOINT"
MOST_SAMPLES = 1_000_000_000  # what a NumPy array can still count
ANY_FOLDER = "CHECKPOINT|BUNDLE|STORE"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of the noise.")]
Guidance = Annotated[
    float | None, typer.Option("--guidance", metavar="SCALE", help="Guidance scale; that of the loop by default.")
]
AllowNative = Annotated[
    bool,
    typer.Option(
        "--allow-native", help="Open native code (inductor) that you did not build here; it runs with all your rights."
    ),
]
MinPsnr = Annotated[
    str | None,
    typer.Option(
        "--min-psnr",
        metavar="DB|mean=DB,p05=DB",
        help="Quality budget in dB, of the mean or of mean and 5th percentile; overrides that of the recipe.",
    ),
]
ReferenceCheckpoint = Annotated[
    Path | None,
    typer.Option("--reference", metavar="CHECKPOINT", help="Checkpoint whose full loop quality is measured against."),
]

Steps = Annotated[
    int | None,
    typer.Option("--steps", min=1, max=10_000, metavar="N", help="Inference steps of a pipeline, not its default."),
]
PipelineGuidance = Annotated[
    float | None,
    typer.Option(
        "--guidance", metavar="SCALE", help="Guidance scale of a pipeline, not its default; at most 1: one branch."
    ),
]
Height = Annotated[
    int | None, typer.Option("--height", min=1, metavar="N", help="Height of a pipeline's images, in pixels.")
]
Width = Annotated[
    int | None, typer.Option("--width", min=1, metavar="N", help="Width of a pipeline's images, in pixels.")
]
Frames = Annotated[int | None, typer.Option("--frames", min=1, metavar="N", help="Frames of a pipeline's video.")]
NegativePrompt = Annotated[
    str | None,
    typer.Option("--negative-prompt", metavar="TEXT", help="What a pipeline is to keep away from while it is watched."),
]
CallArguments = Annotated[
    list[str] | None,
    typer.Option("--call", metavar="NAME=VALUE", help="Another argument of a pipeline's call; YAML; repeatable."),
]
NO_CALL = PipelineCall()
ARGUMENT = Expected("a YAML value, as in 10, [a, b] or true")


CALL_OPTIONS: Mapping[str, Any] = {
    "steps": Steps,
    "guidance": PipelineGuidance,
    "height": Height,
    "width": Width,
    "frames": Frames,
    "negative_prompt": NegativePrompt,
    "arguments": CallArguments,
}
"""What a pipeline is called with, as the commands that run one take it."""


def with_pipeline_call(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options of a pipeline's call in the place of its parameter `call`."""

    @wraps(command)
    def asking(**given: Any) -> None:
        asked = {name: given.pop(name) for name in CALL_OPTIONS}
        command(**given, call=asked_call(asked.pop("arguments"), **asked))

    signature = inspect.signature(command, eval_str=True)
    options = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)
        for name, annotation in CALL_OPTIONS.items()
    ]
    parameters = [new for old in signature.parameters.values() for new in (options if old.name == "call" else [old])]
    asking.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    asking.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return asking


def asked_call(arguments: Sequence[str] | None, **options: Any) -> PipelineCall:
    """What the options of a command ask a pipeline to be called with.

    Args:
        arguments: the values of `--call`.
        options: the others by name; None where one is not given.

    Raises:
        UsageError: a `--call` has another form or comes twice, or a value is out of its range.
    """
    named: dict[str, Any] = {}
    for text in arguments or ():
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()):
            raise UsageError(f"--call: expected NAME=VALUE, as in max_sequence_length=64; received {text!r}.")
        if name in named:
            raise UsageError(f"--call {name}: expected it once; received it twice.")
        named[name] = parse_yaml(value, f"--call {name}", ARGUMENT)[0]
    return pipeline_call(**options, arguments=named)


def quality_budget(text: str | None) -> QualityBudget | None:
    """The budget of `--min-psnr`: `40`, or `mean=40,p05=34`.

    Raises:
        UsageError: it has another form, or a figure is no number of decibels.
    """
    if text is None:
        return None
    words = [part.strip().partition("=") for part in (text if "=" in text else f"mean={text}").split(",")]
    try:
        figures = {name: float(value) for name, _, value in words}
        if len(figures) < len(words):
            raise ValueError
        return QualityBudget.model_validate(figures)
    except ValueError:
        raise UsageError(
            "--min-psnr: expected a number of decibels, 0 or more, or two of them, as in mean=40,p05=34; received "
            f"{text!r:.60}."
        ) from None


def is_bundle(path: Path) -> bool:
    """Whether a folder is a bundle; otherwise it is taken for a checkpoint.

    Raises:
        UsageError: there is no such folder.
    """
    if not os.path.isdir(path):  # False, too, where the system refuses to say
        raise UsageError(f"{path}: expected the folder of a bundle or a checkpoint; there is none.")
    return os.path.lexists(path / "manifest.json")


def is_store(path: Path) -> bool:
    """Whether a folder is a calibration store."""
    return os.path.lexists(path / "store.json")
