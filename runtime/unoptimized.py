"""A checkpoint as it is: the captured network along the whole loop, run by PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..loop.driver import OnStep, run_loop
from ..loop.errors import UsageError
from ..loop.plan import fold
from ..loop.ports import BoundProgram
from ..loop.recurrence import Recurrence
from ..loop.spec import LoopSpec
from .ends import Ends
from .engine import guidance_scale
from .request import build_request
from .samples import finite

if TYPE_CHECKING:
    from ..frontend.load import Checkpoint

Array = np.ndarray


class Unoptimized:
    """The loop of a checkpoint without any pass; samples as an `Engine` does.

    Attributes:
        loop: sampler, guidance and roles.
        program: the captured network as callables.
        ends: what its pipeline does around the loop.
    """

    def __init__(self, loop: LoopSpec, recurrence: Recurrence, program: BoundProgram, ends: Ends):
        """See `load_unoptimized`."""
        self.loop = loop
        self.program = program
        self.ends = ends
        self._recurrence = recurrence

    def sample(
        self,
        noise: Any,
        guidance: float | None = None,
        on_step: OnStep | None = None,
        *,
        unconditional: Mapping[str, Any] | None = None,
        conditions: Mapping[str, Any] | None = None,
    ) -> Array:
        """Run every call of the loop.

        Args:
            noise: float32 [B, *latent], standard normal.
            guidance: scale; None takes that of the loop.
            on_step: called with (evaluations done, evaluations in all).
            unconditional: name -> [B, ...] of the unconditional branch, where the loop takes it as an input.
            conditions: name -> [B, ...].

        Returns:
            float32 [B, *latent].

        Raises:
            UsageError: the request does not fit the model.
            StepfoldError: a sample has numbers that are not finite.
        """
        plan = fold(self._recurrence, guidance_scale(self.loop, guidance))
        guided = bool(plan.guided.any())
        request = build_request(self.program.inputs, self.loop, noise, conditions or {}, unconditional, guided)
        return finite(run_loop(self.program, self.loop, request, plan, on_step))


def load_unoptimized(checkpoint: Path) -> Unoptimized:
    """Load and capture a checkpoint; needs the extra `compile`.

    Raises:
        UsageError: the checkpoint cannot be used, or it is a component without a loop.
    """
    from ..frontend.load import load_checkpoint

    loaded = load_checkpoint(checkpoint)
    program = loaded.capture()
    if program.loop is None or program.recurrence is None:
        raise UsageError(f"{checkpoint}: expected a model with a loop; received a component, which makes no samples.")
    return Unoptimized(program.loop, program.recurrence, program.bind(), _ends(loaded))


def _ends(checkpoint: Checkpoint) -> Ends:
    captured = checkpoint.capture_ends()
    if captured is None:
        return Ends()
    text, decoder = (None if program is None else program.bind() for program in (captured.text, captured.decoder))
    return Ends(captured.readers, text, decoder, captured.given, captured.unprompted)
