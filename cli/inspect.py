"""`stepfold inspect`: what a checkpoint, a bundle or a calibration store consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..loop.errors import UsageError
from ..loop.pipeline_call import PipelineCall
from ..loop.ports import Port
from .console import console, print_json, table, working
from .inspect_store import print_store
from .optimize import proof_lines, quality_line, schedule_line, shared_line
from .options import (
    ANY_FOLDER,
    NO_CALL,
    Json,
    is_bundle,
    is_store,
    with_pipeline_call,
)


@with_pipeline_call
def inspect(
    model: Annotated[Path, typer.Argument(metavar=ANY_FOLDER, help="Folder to look into.")],
    inputs: Annotated[
        Path | None,
        typer.Option("--inputs", metavar="FILE.safetensors", help="Example inputs of a checkpoint by name."),
    ] = None,
    call: PipelineCall = NO_CALL,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint consists of, rate by rate and site by site, or what a bundle or calibration store holds.

    $ stepfold inspect examples/mnist_dit
    """
    if is_bundle(model) or is_store(model):
        _refuse_beside(model, inputs, call)
    if is_bundle(model):
        from ..bundle.reader import read_manifest
        from ..runtime.differences import differences

        manifest = read_manifest(model)
        document = manifest.model_dump(mode="json", by_alias=True)
        show = partial(print_bundle, differs_here=differences(manifest))
    elif is_store(model):
        from ..calibration.summary import store_summary

        document = store_summary(model)
        show = print_store
    else:
        document = _checkpoint(model, inputs, call, whole=as_json)
        show = print_checkpoint if "rates" in document else print_pipeline
    if as_json:
        print_json(document)
    else:
        show(document)


def _refuse_beside(model: Path, inputs: Path | None, call: PipelineCall) -> None:
    """Raise UsageError for options about a checkpoint beside a folder that is none."""
    named = [*(["inputs"] if inputs is not None else []), *call.given]
    if named:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in named)
        raise UsageError(f"{options}: expected a checkpoint beside it; {model} is none.")


def _checkpoint(path: Path, inputs: Path | None, call: PipelineCall, whole: bool) -> dict[str, Any]:
    """What a checkpoint consists of; of a pipeline only what its folder and one call tell, unless all is asked for."""
    from ..frontend.inspect import inspect_program
    from ..frontend.load import load_checkpoint
    from ..frontend.overview import overview

    with working() as progress:
        progress("loading", 0, 1)
        checkpoint = load_checkpoint(path, inputs=inputs, call=call)
        pipeline = overview(checkpoint)
        if pipeline is not None and checkpoint.loop is not None and not whole:
            return {"pipeline": pipeline, "loop": checkpoint.loop.model_dump(mode="json", exclude_defaults=True)}
        progress("capturing", 0, 1)
        return inspect_program(checkpoint.capture()) | ({} if pipeline is None else {"pipeline": pipeline})


def print_pipeline(document: Mapping[str, Any]) -> None:
    """Print what a person asks about a pipeline before compiling it."""
    screen, pipeline = console(), document["pipeline"]
    rows = [
        (entry["name"], entry["class"], f"{entry['parameters']:,}", entry["reason"] or _where(entry))
        for entry in pipeline["networks"]
    ]
    columns = ("network", "class", "parameters", "in the bundle")
    screen.print(table(pipeline["class"], columns, rows, ("parameters",)))
    height, width = pipeline["image"] or (None, None)
    image = "" if height is None else f"Image: {height} x {width} pixels, for which it is compiled; see --height."
    lines = [
        loop_line(document["loop"]),
        f"Guidance: {pipeline['guidance']}.",
        image,
        "A request gives: " + "; ".join(pipeline["takes"]) + ". Any number of samples at once.",
        *(f"Refused: {reason}." for reason in pipeline["refused"]),
        "What no engine can run is found by capturing the network: --json, or optimize.",
    ]
    for line in filter(None, lines):
        screen.print(line, markup=False, soft_wrap=True)


def _where(entry: Mapping[str, Any]) -> str:
    return f"yes, at {entry['calls']} calls" if "calls" in entry else "yes"


def print_checkpoint(document: Mapping[str, Any]) -> None:
    """Print what `inspect --json` says about a checkpoint."""
    screen = console()
    screen.print(f"{document['class']}: {document['parameters']:,} parameters", markup=False)
    screen.print(_inputs(document))
    screen.print(escape(loop_line(document["loop"])))
    rates = [(r["rate"], f"{r['parameters']:,}", f"{r['flops']:,}") for r in document["rates"]]
    screen.print(table("Rates", ("rate", "parameters", "FLOPs"), rates, ("parameters", "FLOPs")))
    sites = [(name.replace("_", "-"), str(count)) for name, count in document["sites"].items()]
    screen.print(table("Sites", ("site", "count"), sites, ("count",)))
    for entry in document["near_misses"]:
        screen.print(escape(f"nearly {entry['kind']}: {entry['site']}: {entry['missing']}"), soft_wrap=True)
    _print_frozen(document)
    for entry in document["unsupported"]:
        screen.print(escape(f"unsupported: {entry['node']}: {entry['reason']} ({entry['source']})"), soft_wrap=True)


def print_bundle(document: Mapping[str, Any], differs_here: Sequence[str] = ()) -> None:
    """Print the manifest of a bundle, and what this machine does otherwise than the one that built it."""
    screen = console()
    backend, recipe = document["backend"], document["recipe"]
    name = recipe.get("name", "-") if isinstance(recipe, dict) else "-"
    size = sum(entry["bytes"] for entry in document["files"].values())
    screen.print(
        f"{document['model']['class']}, recipe {name}, for {backend['name']} {backend['version']} on "
        f"{backend['device']}: {size:,} bytes, written by stepfold {document['stepfold_version']}",
        markup=False,
        soft_wrap=True,
    )
    screen.print(_inputs(document))
    screen.print(escape(loop_line(document["loop"])))
    stages = [(s["name"], s["rate"], s["file"], f"{_stage_bytes(document, s):,}") for s in document["stages"]]
    screen.print(table("Stages", ("stage", "rate", "file", "bytes"), stages, ("bytes",)))
    if document.get("shared"):
        shared = document["shared"]
        screen.print(shared_line(shared, document["files"][shared["file"]]["bytes"]), markup=False, soft_wrap=True)
    screen.print(escape(schedule_line(document["schedule"])), soft_wrap=True)
    screen.print(escape(quality_line(document["quality"])), soft_wrap=True)
    for line in proof_lines(document):
        screen.print(escape(line), soft_wrap=True)
    alone = "does not depend" if document["batch_invariant"] else "depends slightly"
    screen.print(f"A sample {alone} on the samples computed beside it.")
    for stage in document["stages"]:
        for site, form in stage["exact_forms"].items():
            screen.print(f"exact on every processor by {form}: {site}", markup=False, soft_wrap=True)
    for line in differs_here:
        screen.print(f"differs here: {line}", markup=False, soft_wrap=True)
    _print_frozen(document)


def _stage_bytes(document: Mapping[str, Any], stage: Mapping[str, Any]) -> int:
    """Bytes of a stage's file and of the data beside it that is its own."""
    stem = stage["file"].rpartition(".")[0]
    return sum(f["bytes"] for name, f in document["files"].items() if name.startswith(f"{stem}."))


def _inputs(document: Mapping[str, Any]) -> Any:
    rows = [
        (i["name"], i["role"], Port(i["name"], tuple(i["shape"]), i["dtype"]).shape_text, i["dtype"])
        for i in document["inputs"]
    ]
    return table("Inputs", ("input", "role", "shape", "dtype"), rows)


def loop_line(loop: Mapping[str, Any] | None) -> str:
    """Sampler, steps and guidance in one line."""
    if loop is None:
        return "Loop: none; a component."
    sampler, guidance = loop["sampler"], loop.get("guidance")
    scale = guidance["scale"] if guidance else None
    shown = ", ".join(f"{value:g}" for value in scale["values"]) if isinstance(scale, dict) else f"{scale}"
    text = f"Loop: {sampler['scheduler']}, {sampler['steps']} steps, latent {loop['latent']['shape']}"
    return f"{text}, guidance {shown}." if guidance else f"{text}, no guidance."


def _print_frozen(document: Mapping[str, Any]) -> None:
    for entry in document["frozen_dimensions"]:
        place = f"dimension {entry['dimension']} of {entry['input']} is fixed to {entry['value']}"
        console().print(escape(f"frozen: {place} ({entry['source']})"), soft_wrap=True)
