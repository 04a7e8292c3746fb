"""Runs passes in order and checks the contract of each."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ..ir.cost import program_flops
from ..ir.probe import Outputs, outputs_drift, probe_outputs
from ..ir.program import PassRecord, Program
from ..ir.verify import verify
from ..loop.errors import StepfoldError
from .base import Context, Pass, PassResult

logger = logging.getLogger(__name__)

EXACT_DRIFT = 1e-5
"""Largest drift of an exact pass in float32, relative L2 on the probe."""


@dataclass(frozen=True)
class Step:
    """One entry of a recipe: a pass with its options, and whether it may find nothing to do."""

    operation: Pass[Any]
    optional: bool = False


def run_passes(program: Program, steps: Sequence[Step], context: Context) -> Program:
    """Apply the passes and append one record for each.

    Raises:
        StepfoldError: a pass that should have acted changed nothing, broke the program, or drifted further than
            its contract allows.
    """
    original = probe_outputs(context.original)
    current = original if program is context.original else probe_outputs(program)
    for step in steps:
        program, current = _run_one(program, step, context, current, original)
    return program


def _run_one(
    program: Program, step: Step, context: Context, current: Outputs, original: Outputs
) -> tuple[Program, Outputs]:
    operation, start = step.operation, time.perf_counter()
    with _named(operation):
        result, outcome = _run(program, step, context)
    outputs, quality = current, None
    if outcome == "changed":
        with _named(operation, "left a broken program: "):
            verify(result.program)
            outputs = probe_outputs(result.program)
        if context.quality is not None and result.program.loop is not None and not operation.exact:
            quality = context.quality(result.program)
    record = PassRecord(
        name=operation.name,
        outcome=outcome,
        changed=result.changed,
        refused=result.refused,
        drift=outputs_drift(outputs, current),
        total_drift=outputs_drift(outputs, original),
        parameters_before=program.parameters(),
        parameters_after=result.program.parameters(),
        flops_before=program_flops(program),
        flops_after=program_flops(result.program),
        seconds=time.perf_counter() - start,
        details=result.details,
        psnr_db=quality,
        keeps_activations=operation.keeps_activations,
    )
    _check_drift(operation, record)
    return replace(result.program, records=(*result.program.records, record)), outputs


def _run(program: Program, step: Step, context: Context) -> tuple[PassResult, str]:
    """The result of a pass and its outcome; a pass that counts no change has made none."""
    reason = step.operation.not_applicable(program)
    if reason is not None:
        logger.info("%s: not applicable: %s", step.operation.name, reason)
        return PassResult(program, 0, details={"reason": reason}), "not_applicable"
    step.operation.requires(program)
    result = step.operation.run(program, context)
    outcome = _outcome(step, result)
    return result if outcome == "changed" else replace(result, program=program), outcome


@contextmanager
def _named(operation: Pass[Any], what: str = "") -> Iterator[None]:
    """Say which pass an error comes from, and what it did."""
    try:
        yield
    except StepfoldError as error:
        if not what:
            raise
        raise StepfoldError(f"pass {operation.name}: {what}{error}") from error
    except (MemoryError, OSError):
        raise  # the machine's, not the pass's: no memory, a full disk, a file that may not be read
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise StepfoldError(
            f"pass {operation.name}: {what}{type(error).__name__}: {first} This is a defect of the pass on this model; "
            "remove it from the recipe to go on without it."
        ) from error


def _outcome(step: Step, result: PassResult) -> str:
    if result.identity:
        return "identity"
    if result.changed:
        return "changed"
    if step.optional:
        return "identity"
    reasons = "; ".join(f"{refusal.site}: {refusal.reason}" for refusal in result.refused[:5]) or "no candidate found"
    raise StepfoldError(
        f"pass {step.operation.name}: expected to change something, changed nothing ({reasons}). "
        "Remove it from the recipe or mark it `optional: true`."
    )


def _check_drift(operation: Pass[Any], record: PassRecord) -> None:
    if not math.isfinite(record.drift):
        raise StepfoldError(
            f"pass {operation.name}: expected finite outputs on the probe; received NaN or infinity. "
            "Remove the pass from the recipe or exclude sites."
        )
    limit = EXACT_DRIFT if operation.exact else getattr(operation.options, "max_drift", None)
    if limit is not None and not record.drift <= limit:
        drift = f"pass {operation.name}: drift {record.drift:.2e} exceeds {limit:g}"
        if operation.exact:
            raise StepfoldError(f"{drift}, the limit of an exact pass. This is a defect of the pass on this model.")
        raise StepfoldError(f"{drift}, its max_drift; raise max_drift or exclude sites.")
