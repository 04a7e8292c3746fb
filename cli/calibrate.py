"""`stepfold calibrate`: statistics of a checkpoint's activations over its real loop, in a store."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..loop.errors import StepfoldError
from ..loop.pipeline_call import PipelineCall
from ..loop.writing import require_writable
from .console import console, errors_console, print_json, working
from .options import (
    MOST_SAMPLES,
    NO_CALL,
    Json,
    with_pipeline_call,
)

if TYPE_CHECKING:
    from ..calibration.run import Outcome, Prepared, Work


@with_pipeline_call
def calibrate(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Folder with config.json and safetensors, or a pipeline.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="STORE", help="Folder to write, or to go on with.")],
    samples: Annotated[
        int | None,
        typer.Option("--samples", min=1, max=MOST_SAMPLES, metavar="N", help="Calibration samples; 32 by default."),
    ] = None,
    buckets: Annotated[
        int | None,
        typer.Option(
            "--buckets",
            min=1,
            max=MOST_SAMPLES,
            metavar="N",
            help="Equal parts of the calls of the loop; 8 by default.",
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            "--workers", min=1, max=MOST_SAMPLES, metavar="N", help="Processes; more than one needs Ray. Same result."
        ),
    ] = 1,
    loop: Annotated[
        Path | None, typer.Option("--loop", metavar="FILE.yaml", help="Loop to use instead of the checkpoint's.")
    ] = None,
    call: PipelineCall = NO_CALL,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of the samples.")] = 0,
    as_json: Json = False,
) -> None:
    """Run the real loop and keep statistics of what every linear layer reads, by timestep and guidance branch.

    The memory it needs is printed first. After an interruption the same command goes on where it stopped.

    $ stepfold calibrate examples/mnist_dit --out out/store --samples 32
    """
    from ..calibration.document import STORE
    from ..calibration.plan import Settings
    from ..calibration.run import calibrate as run
    from ..calibration.store import check_folder
    from ..calibration.workers import Source, Workers, require_ray

    start = time.perf_counter()
    check_folder(out)
    require_writable("--out", out / STORE)
    settings = Settings(samples=samples, seed=seed, buckets=buckets)
    work: Work | None = None
    if workers > 1:
        require_ray()
        work = Workers(workers, Source(checkpoint, loop, settings, call))
    prepared = _prepare(checkpoint, loop, call, settings)
    _print_plan(prepared, workers, as_json)
    with working() as progress:
        try:
            outcome = run(prepared, out, progress, work)
        except KeyboardInterrupt:
            raise StepfoldError(f"interrupted; {_kept(out, prepared)}. The same command goes on from there.") from None
    document = _document(out, outcome, time.perf_counter() - start)
    if as_json:
        print_json(document)
    else:
        _print(document)


def _prepare(checkpoint: Path, loop: Path | None, call: PipelineCall, settings: Any) -> Prepared:
    from ..calibration.run import prepare
    from ..frontend.load import load_checkpoint

    with working() as progress:
        progress("loading", 0, 1)
        loaded = load_checkpoint(checkpoint, loop=loop, call=call)
        progress("capturing", 0, 1)
        return prepare(loaded.capture(), settings)


def _print_plan(prepared: Prepared, workers: int, as_json: bool) -> None:
    """The plan, before any work: on standard output, or on standard error where that is kept for JSON."""
    from ..calibration.memory import resident_bytes
    from ..calibration.summary import plan_bytes
    from ..report.prose import size

    plan, document = prepared.plan, prepared.document
    branches, grams = " and ".join(plan.branches), sum(entry.gram for entry in document.sites)
    part = {name: size(value) for name, value in plan_bytes(document).items()}
    what = (
        f"Plan: {plan.samples} samples in {len(plan.shards)} shards, {document.calls} calls in {plan.buckets} buckets, "
        f"branches: {branches}, {len(document.sites)} sites, {grams} of them with a Gram matrix."
    )
    memory = (
        f"Memory: {size(resident_bytes())} in use (weights {part['weights']}) and {part['planned']} planned: "
        f"accumulators {part['accumulators']}, Gram matrices {part['gram']}, raw rows {part['rows']}, activations of "
        f"one shard {part['activations']}."
    )
    lines = [what, memory, f"Disk: {part['disk']}."]
    if workers > 1:
        lines.append(f"Each of {workers} workers needs that memory for itself.")
    screen = errors_console() if as_json else console()
    for line in lines:
        screen.print(line, markup=False, highlight=False, soft_wrap=True)


def _kept(out: Path, prepared: Prepared) -> str:
    """How many shards are finished."""
    from ..calibration.store import missing_shards

    total = len(prepared.document.shards)
    return f"{total - len(missing_shards(out, prepared.document))} of {total} shards are kept in {out}"


def _document(out: Path, outcome: Outcome, seconds: float) -> dict[str, Any]:
    from ..calibration.summary import plan_bytes

    document = outcome.document
    total = len(document.shards)
    return {
        "store": str(out),
        "key": document.key,
        "shards": {"done": total, "total": total},
        "resumed": outcome.resumed,
        "sites": len(document.sites),
        "plan": plan_bytes(document),
        "seconds": seconds,
    }


def _print(document: dict[str, Any]) -> None:
    total, resumed = document["shards"]["total"], document["resumed"]
    how = "all of them finished before" if resumed == total else f"{resumed} of them finished before"
    console().print(
        f"Store: {document['store']}: {total} shards, {how if resumed else 'all of them new'}; "
        f"{document['sites']} sites ({document['seconds']:.0f} s)",
        markup=False,
        soft_wrap=True,
    )
