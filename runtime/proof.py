"""The proof of a bundle of a pipeline, as the manifest keeps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..bundle.manifest import ProofEntry, SkippedProofEntry

if TYPE_CHECKING:
    from ..frontend.load import Checkpoint
    from ..frontend.surroundings.ends import CapturedEnds
    from ..ir.program import Program

NO_PROOF = "--no-proof"


def prove(
    checkpoint: Checkpoint, program: Program, ends: CapturedEnds | None, progress: Callable[[str, int, int], None]
) -> ProofEntry | SkippedProofEntry | None:
    """Compare what was captured of a pipeline with the pipeline's own samples; None for what is no pipeline.

    Args:
        checkpoint: checkpoint as it was loaded.
        program: its denoiser and loop, before any pass.
        ends: what surrounds the loop, before any pass.
        progress: called with (task, done, total).

    Raises:
        StepfoldError: they differ; the message says where they part.
    """
    from ..frontend import proof

    if checkpoint.run is None:
        return None
    found = proof.prove(
        checkpoint.run, program, ends.decoder if ends else None, lambda done, total: progress("proof", done, total)
    )
    return ProofEntry.model_validate(asdict(found))


def skipped(checkpoint: Checkpoint) -> SkippedProofEntry | None:
    """That the proof was left out; None for what is no pipeline."""
    return None if checkpoint.run is None else SkippedProofEntry(skipped=NO_PROOF)
