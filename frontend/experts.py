"""Experts: networks of one class that take turns in a loop, each at the calls that the pipeline gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..ir.program import Program, Stage
from ..loop.errors import UsageError
from .capture import capture
from .dense import dense


@dataclass(frozen=True)
class Experts:
    """What takes the place of a denoiser.

    Attributes:
        networks: networks by number; the first is the denoiser itself.
        by_call: [S] number of the network that each call runs.
    """

    networks: tuple[torch.nn.Module, ...]
    by_call: tuple[int, ...]

    def called(self) -> tuple[torch.nn.Module, ...]:
        """The denoiser, and those of the others that a call runs."""
        return tuple(network for i, network in enumerate(self.networks) if i == 0 or i in self.by_call)

    def beside(self, program: Program, kwargs: Mapping[str, Any]) -> Program:
        """A program of the denoiser with the others as variants of its slot.

        Args:
            program: program of the denoiser, before any pass.
            kwargs: example call that it was captured with.

        Raises:
            UsageError: another network takes other inputs.
            StepfoldError: `torch.export` refuses one.
        """
        (slot,) = program.computing
        variants, numbers = [slot.original], {0: 0}
        for number in sorted(set(self.by_call) - {0}):
            numbers[number] = len(variants)
            captured = capture(dense(self.networks[number]), dict(kwargs), program.loop, identity=program.model)
            variants.append(_variant(slot.original, captured.step, len(variants)))
        by_call = tuple(numbers[number] for number in self.by_call)
        found = replace(slot, variants=tuple(variants), by_call=by_call)
        return replace(program, slots=tuple(found if one is slot else one for one in program.slots))


def _variant(original: Stage, other: Stage, number: int) -> Stage:
    if (other.inputs, other.outputs) != (original.inputs, original.outputs):
        raise UsageError(
            f"the networks of the loop take turns and differ in what they take or compute: expected "
            f"{', '.join(map(str, original.inputs))}; received {', '.join(map(str, other.inputs))}."
        )
    return replace(other, name=f"{original.name}_{number}")
