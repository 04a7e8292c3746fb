"""Runs passes in order and checks the contract of each."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ..ir.cost import program_depth, program_flops
from ..ir.probe import Outputs, outputs_drift, probe_outputs
from ..ir.program import PassRecord, Program
from ..ir.verify import verify
from ..loop.errors import StepfoldError, UsageError
from .base import Context, Pass, PassResult, Phase

logger = logging.getLogger(__name__)

EXACT_DRIFT = 1e-5
"""Largest drift of an exact pass in float32, relative L2 on the probe, up to `EXACT_DEPTH` products in a chain."""

EXACT_DEPTH = 32
"""Matrix products in a chain, as about four transformer blocks have them, beyond which the largest drift grows."""


@dataclass(frozen=True)
class Step:
    """One entry of a recipe: a pass with its options, and whether it may find nothing to do."""

    operation: Pass[Any]
    optional: bool = False


def run_passes(program: Program, steps: Sequence[Step], context: Context) -> Program:
    """Apply the passes and append one record for each.

    Raises:
        UsageError: a pass stands after one of a later phase; nothing was run.
        StepfoldError: a pass that should have acted changed nothing, broke the program, or drifted further than
            its contract allows.
    """
    misplaced = out_of_order(steps)
    if misplaced is not None:
        raise UsageError(misplaced.problem)
    original = probe_outputs(context.original)
    current = original if program is context.original else probe_outputs(program)
    for step in steps:
        program, current = _run_one(program, step, context, current, original)
    return program


@dataclass(frozen=True)
class Misplaced:
    """A pass that stands after one of a later phase: its place in the recipe, and what is wrong."""

    index: int
    problem: str


def out_of_order(steps: Sequence[Step]) -> Misplaced | None:
    """The first pass that stands after one of a later phase, if any does."""
    latest, before = Phase.HOIST, ""
    for i, step in enumerate(steps):
        name, phase = step.operation.name, step.operation.phase
        if phase is None:
            phase = min(latest, Phase.FUSE)
        if phase < latest:
            order = ", ".join(str(one) for one in Phase)
            problem = (
                f"pass {name}: expected it before {before}, because the phases of a recipe are {order}, in this order; "
                f"received it after {before}. Put {name} before {before}."
            )
            return Misplaced(i, problem)
        latest, before = phase, name
    return None


def _run_one(
    program: Program, step: Step, context: Context, current: Outputs, original: Outputs
) -> tuple[Program, Outputs]:
    operation, start = step.operation, time.perf_counter()
    with _named(operation):
        result, outcome = _run(program, step, context)
    outputs = current
    if outcome == "changed":
        result = _without_stale_schedule(operation, program, result)
        with _named(operation, "left a broken program: "):
            verify(result.program)
            outputs = probe_outputs(result.program)
    drift = outputs_drift(outputs, current)
    _check_drift(operation, drift, program)
    record = PassRecord(
        name=operation.name,
        outcome=outcome,
        changed=result.changed,
        refused=result.refused,
        drift=drift,
        total_drift=outputs_drift(outputs, original),
        parameters_before=program.parameters(),
        parameters_after=result.program.parameters(),
        flops_before=program_flops(program),
        flops_after=program_flops(result.program),
        seconds=time.perf_counter() - start,
        details=result.details,
        psnr_db=_quality(operation, result.program, context) if outcome == "changed" else None,
        keeps_activations=operation.keeps_activations,
    )
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


def _without_stale_schedule(operation: Pass[Any], before: Program, result: PassResult) -> PassResult:
    """The result without a schedule that was fitted on other stages than it has."""
    after = result.program
    if after.schedule is None or after.schedule is not before.schedule:
        return result
    if after.slots == before.slots and after.tables is before.tables:
        return result
    logger.warning(
        "pass %s: the schedule was fitted on the program before it and is dropped; every call of the loop is evaluated. "
        "Run schedule again.",
        operation.name,
    )
    return replace(result, program=replace(after, schedule=None), details={**result.details, "dropped": ["schedule"]})


def _quality(operation: Pass[Any], program: Program, context: Context) -> float | None:
    """Mean PSNR in dB of what a lossy pass left, where it is measured."""
    if context.quality is None or program.loop is None or operation.exact:
        return None
    with _named(operation, "quality of what it left: "):
        return context.quality(program)


@contextmanager
def _named(operation: Pass[Any], what: str = "") -> Iterator[None]:
    """Say which pass an error comes from, and what it did."""
    try:
        yield
    except StepfoldError as error:
        if not what:
            raise
        raise type(error)(f"pass {operation.name}: {what}{error}") from error
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


def exact_drift(program: Program) -> float:
    """Largest drift of an exact pass on a program: rounding errors along a chain add up like a random walk."""
    return EXACT_DRIFT * math.sqrt(max(1.0, program_depth(program) / EXACT_DEPTH))


def _check_drift(operation: Pass[Any], drift: float, program: Program) -> None:
    if not math.isfinite(drift):
        raise StepfoldError(
            f"pass {operation.name}: expected finite outputs on the probe; received NaN or infinity. "
            "Remove the pass from the recipe or exclude sites."
        )
    limit = exact_drift(program) if operation.exact else getattr(operation.options, "max_drift", None)
    if limit is not None and not drift <= limit:
        problem = f"pass {operation.name}: drift {drift:.2e} exceeds {limit:.3g}"
        if operation.exact:
            raise StepfoldError(f"{problem}, the limit of an exact pass. This is a defect of the pass on this model.")
        raise StepfoldError(f"{problem}, its max_drift; raise max_drift or exclude sites.")
