"""`stepfold optimize`: a checkpoint becomes a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..loop.errors import UsageError
from ..loop.pipeline_call import PipelineCall
from ..loop.reading import Expected
from ..loop.yaml_files import parse_yaml
from .console import console, print_json, table, working
from .options import (
    NO_CALL,
    Json,
    MinPsnr,
    quality_budget,
    with_pipeline_call,
)

SETTING = Expected("a YAML value, as in 10 or [a, b]")
REASONS = 3  # that are told of each pass
STAGES = ("stage", "rate", "engine file", "bytes", "FLOPs")


@with_pipeline_call
def optimize(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Folder with config.json and safetensors, or a pipeline.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="BUNDLE", help="Folder to write.")],
    recipe: Annotated[
        str, typer.Option("--recipe", metavar="NAME|FILE.yaml", help="The passes; see `stepfold recipes`.")
    ] = "default",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME.OPTION=VALUE", help="Replace an option of a pass or backend; repeatable."),
    ] = None,
    backend: Annotated[
        str | None, typer.Option("--backend", metavar="NAME", help="Engine; that of the recipe, or onnxruntime.")
    ] = None,
    loop: Annotated[
        Path | None, typer.Option("--loop", metavar="FILE.yaml", help="Loop to use instead of the checkpoint's.")
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option("--inputs", metavar="FILE.safetensors", help="Example inputs by name.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="STORE", help="Statistics for the passes; see `stepfold calibrate`."),
    ] = None,
    min_psnr: MinPsnr = None,
    call: PipelineCall = NO_CALL,
    no_proof: Annotated[
        bool, typer.Option("--no-proof", help="Do not compare the captured program of a pipeline with the pipeline.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of the three sets of samples.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Compile a checkpoint and the loop around it into a bundle.

    Ends with exit code 3 when no schedule meets the quality budget; nothing is left behind then.

    $ stepfold optimize examples/mnist_dit --out out/mnist --min-psnr 40
    """
    budget = quality_budget(min_psnr)
    chosen = [parse_setting(text) for text in settings or ()]
    from ..report.bundle_report import write_bundle_report
    from ..runtime.compiler import Job
    from ..runtime.compiler import optimize as run

    job = Job(checkpoint, out, recipe, chosen, backend, loop, inputs, budget, seed, overwrite, calibration, call)
    job = replace(job, proof=not no_proof)
    with working() as progress:
        document = run(job, progress, write_bundle_report)
    if as_json:
        print_json(document)
    else:
        print_summary(document)


def parse_setting(text: str) -> tuple[str, str, Any]:
    """`NAME.OPTION=VALUE` as (pass or backend, option, value); the value is YAML: `10`, `40.5`, `auto`, `[a, b]`.

    Of several passes of one name, `NAME:2` is the second.

    Raises:
        UsageError: it has another form.
    """
    address, equals, value = text.partition("=")
    name, dot, option = address.partition(".")
    if not (equals and dot and name and option):
        raise UsageError(f"--set: expected NAME.OPTION=VALUE, as in schedule.evaluations=10; received {text!r}.")
    return name, option, parse_yaml(value, f"--set {address}", SETTING)[0]


def print_summary(document: Mapping[str, Any]) -> None:
    """Print what `optimize` did: passes, stages, schedule, quality and where the bundle is."""
    from ..report.prose import pass_costs

    screen = console()
    numbers = ("changed", "refused", "drift", "total drift", "PSNR", "cost", "parameters", "seconds")
    rows = [_pass_row(*entry) for entry in zip(document["passes"], pass_costs(document["passes"]), strict=True)]
    screen.print(table("Passes", ("pass", "outcome", *numbers), rows, numbers))
    for line in refusals(document["passes"]):
        screen.print(escape(line))
    screen.print(table("Stages", STAGES, list(map(_stage_row, document["stages"])), ("bytes", "FLOPs")))
    if document["shared"]:
        screen.print(shared_line(document["shared"], document["shared"]["bytes"]), markup=False, soft_wrap=True)
    for line in (schedule_line(document["schedule"]), quality_line(document["quality"]), *proof_lines(document)):
        screen.print(escape(line))
    screen.print(f"Bundle: {document['bundle']} ({document['seconds']:.0f} s)", markup=False, soft_wrap=True)


def _stage_row(stage: Mapping[str, Any]) -> tuple[str, ...]:
    made = "reused" if stage["reused"] else "compiled"
    return stage["name"], stage["rate"], made, f"{stage['bytes']:,}", f"{stage['flops']:,}"


def _pass_row(entry: Mapping[str, Any], cost: float | None) -> tuple[str, ...]:
    from ..report.prose import decibels

    before, after = entry["parameters_before"], entry["parameters_after"]
    return (
        entry["name"],
        entry["outcome"].replace("_", " "),
        str(entry["changed"]),
        str(len(entry["refused"])),
        _drift(entry["drift"]),
        _drift(entry["total_drift"]),
        "-" if entry["psnr_db"] is None else decibels(entry["psnr_db"]),
        "-" if cost is None else f"{cost:.1f} dB",
        f"{after:,}" if before == after else f"{before:,} -> {after:,}",
        f"{entry['seconds']:.1f}",
    )


def _drift(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def refusals(passes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each pass refused: a line for each of the first reasons, with the first site and the number of others."""
    lines = []
    for entry in passes:
        sites: dict[str, list[str]] = {}
        for refusal in entry["refused"]:
            sites.setdefault(refusal["reason"], []).append(refusal["site"])
        shown = list(sites.items())[:REASONS]
        for reason, (first, *others) in shown:
            more = f" and {len(others)} more" if others else ""
            lines.append(f"{entry['name']} refused {first}{more}: {reason}")
        hidden = len(entry["refused"]) - sum(len(named) for _, named in shown)
        if hidden:
            lines.append(f"{entry['name']} refused {hidden} more for other reasons; --json has them all")
    return lines


def shared_line(shared: Mapping[str, Any], size: int) -> str:
    """What stages share in a sentence.

    Args:
        shared: weights that several stages share, as the manifest lists them.
        size: bytes of the file.
    """
    return (
        f"Shared by {', '.join(shared['stages'])}: {shared['file']}, {size:,} bytes, which saves "
        f"{shared['saved_bytes']:,}."
    )


def schedule_line(schedule: Mapping[str, Any] | None) -> str:
    """How many of the sampler's calls are evaluated."""
    if schedule is None:
        return "Schedule: none; every call of the loop is evaluated."
    return (
        f"Schedule: {schedule['evaluations']} evaluations ({schedule['guided_evaluations']} with both guidance "
        f"branches) instead of {schedule['grid_steps']}, fitted on the {schedule['fitted_on']}."
    )


def proof_lines(document: Mapping[str, Any]) -> list[str]:
    """How close the unoptimized program is to its pipeline; no line for what is no pipeline."""
    from ..report.prose import proof_words

    return [f"Proof: {proof_words(document['proof'])}."] if document.get("proof") else []


def quality_line(quality: Mapping[str, Any] | None) -> str:
    """How close the samples are to those of the full loop."""
    if quality is None:
        return "Quality: not measured; the model has no loop."
    figures = quality["psnr_db"]
    what = {"latents": "latent PSNR", "images": "PSNR of images"}.get(quality.get("of", ""), "PSNR")
    latents = quality.get("latent_psnr_db")
    behind = "" if latents is None else f"; latent PSNR {latents['mean']:.2f} dB, worst {latents['min']:.2f}"
    percentile = "" if figures.get("p05") is None else f"5th percentile {figures['p05']:.2f}, "
    return (
        f"Quality: {figures['mean']:.2f} dB {what} against the full loop (lower 95 % bound of the mean "
        f"{figures['low']:.2f}, {percentile}worst {figures['min']:.2f}) over {quality['samples']} {quality['set']} "
        f"samples{behind}."
    )
