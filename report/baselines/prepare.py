"""Fold the sampler of every baseline into a table; the process that does it needs torch, those that run it do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from ...frontend.sampler import probe
from ...frontend.schedulers import scheduler_class
from ...frontend.solvers import solver_recurrence
from ...loop.errors import StepfoldError, UsageError
from ...loop.pipeline_call import PipelineCall
from ...loop.plan import Plan, fold
from ...loop.solvers import AB2, TAYLORSEER_LITE, taylorseer_lite
from ...loop.spec import LoopSpec
from .names import Baseline, parse
from .torch_engines import load

REFERENCE = "reference"  # the table of the loop as the checkpoint says


def prepare(
    checkpoint: Path,
    baselines: Sequence[str],
    loop: Mapping[str, Any] | None,
    folder: Path,
    call: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Read a checkpoint and write a table for the reference and for each baseline.

    Args:
        checkpoint: the folder.
        baselines: names.
        loop: the one the bundles were made for, which may differ from that of the checkpoint (`optimize --loop`);
            None takes that of the checkpoint.
        folder: where the tables go.
        call: what the bundles say that their pipeline was called with; None leaves it its defaults.

    Returns:
        class, weights_sha256, loop, `tables`: name -> file, and `reasons`: name -> why it has none.

    Raises:
        UsageError: the checkpoint cannot be read, or a baseline names a solver that does not exist.
    """
    parsed = [parse(name) for name in baselines]
    for baseline in parsed:
        if baseline.solver_class not in (None, AB2, TAYLORSEER_LITE):
            scheduler_class(str(baseline.solver_class))
    bundles_loop = LoopSpec.model_validate(loop) if loop is not None else None
    loaded = load(checkpoint, bundles_loop, _call(call))
    spec = bundles_loop or loaded.loop
    tables, reasons = {}, {}
    for index, baseline in enumerate([Baseline(REFERENCE, "eager"), *parsed]):
        file = folder / f"table-{index}.safetensors"
        try:
            table = table_of(baseline, spec)
        except StepfoldError as error:
            reasons[baseline.name] = str(error)
            continue
        if table is not None:
            save_file({name: np.ascontiguousarray(value) for name, value in table.arrays().items()}, file)
            tables[baseline.name] = str(file)
    return {
        "class": loaded.class_name,
        "weights_sha256": loaded.weights_sha256,
        "loop": None if spec is None else spec.model_dump(mode="json"),
        "tables": tables,
        "reasons": reasons,
    }


def inspect(checkpoint: Path, loop: Mapping[str, Any] | None, call: Mapping[str, Any] | None) -> dict[str, Any]:
    """Rates and sites of a checkpoint, as `inspect --json` tells them.

    Raises:
        UsageError: the checkpoint cannot be read.
        StepfoldError: it cannot be captured.
    """
    from ...frontend.inspect import inspect_program

    spec = None if loop is None else LoopSpec.model_validate(loop)
    return inspect_program(load(checkpoint, spec, _call(call)).capture())


def _call(document: Mapping[str, Any] | None) -> PipelineCall | None:
    return None if document is None else PipelineCall.model_validate(document)


def table_of(baseline: Baseline, loop: LoopSpec | None) -> Plan | None:
    """The table a baseline runs along, None for a component.

    Raises:
        UsageError: its sampler does not fold, or a component is asked for steps or a solver.
    """
    if loop is None:
        if not baseline.is_full_loop:
            raise UsageError("a component without a loop has no steps and no solver.")
        return None
    guidance = loop.guidance
    scale = float(guidance.scales[0]) if guidance is not None else None
    strength = guidance.strength if guidance is not None else None
    if baseline.solver == TAYLORSEER_LITE:
        recurrence = probe(loop.sampler).guided_by(strength)
        return fold(recurrence, scale, taylorseer_lite(recurrence.calls, baseline.steps), order=1)
    steps = baseline.steps or loop.sampler.steps
    return fold(solver_recurrence(loop.sampler, baseline.solver_class, steps).guided_by(strength), scale)


def read_table(file: str) -> Plan:
    """A table that `prepare` wrote."""
    return Plan.from_arrays(load_file(file))
