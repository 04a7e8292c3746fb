"""Layers as NVIDIA modelopt decides them, in the operators of our engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from ....ir.program import Program
from ....loop.errors import StepfoldError
from ..algebra.smoothing import exponent_scale
from ..inputs import Inputs, Need
from ..layers import LINEAR, Group
from ..modelopt.decide import decide
from ..modelopt.environment import find
from ..modelopt.read import LinearDecision
from ..modelopt.realize import realization
from ..modelopt.run import Quantizer
from ..realize import Realization
from ..scheme import Scheme

if TYPE_CHECKING:
    from ...base import Context


class Modelopt(Scheme):
    """INT8, FP8 or INT4 with the codes and scales that NVIDIA modelopt chooses, in an environment of its own."""

    name = "modelopt"
    source = "NVIDIA Model-Optimizer, modelopt.onnx.quantization; docs/passes/modelopt.md"
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {"format": (), "smooth": ("0 to 1", "null")}

    _decisions: Mapping[str, LinearDecision]

    @property
    def need(self) -> Need:
        """Ranges, to smooth with."""
        return Need.NOTHING if self.options.smooth is None else Need.RANGES

    def scale(self, group: Group, inputs: Inputs) -> torch.Tensor | None:
        """See `Scheme.scale`."""
        assert isinstance(self.options.smooth, float)
        return exponent_scale(inputs.largest, group.weight, self.options.smooth, 1 - self.options.smooth)

    def prepare(
        self, program: Program, groups: Sequence[Group], inputs: Mapping[str, Inputs], context: Context
    ) -> Mapping[str, object]:
        """Let modelopt quantize the chosen layers of the emitted stage.

        Raises:
            UsageError: there is no environment with modelopt; the message has the command that makes it.
            StepfoldError: modelopt failed, or left out a layer.
        """
        chosen = {layer.node.name for group in groups for layer in group.layers}
        every = [node.name for stage in program.steps for node in stage.graph.graph.nodes if node.target is LINEAR]
        quantizer = Quantizer(self.options.format, excluded=tuple(name for name in every if name not in chosen))
        decisions = decide(program, find(context.cache), quantizer, context.seed, context.progress)
        missing = sorted(chosen - decisions.keys())
        if missing:
            raise StepfoldError(f"modelopt: expected a decision for every chosen layer; none came for {missing[0]}.")
        self._decisions = decisions
        return {}

    def realize(self, group: Group, inputs: Inputs | None) -> Realization:
        """See `Scheme.realize`."""
        decisions = [(layer.name, self._decisions[layer.node.name]) for layer in group.layers]
        return realization(self.options.format, decisions)
