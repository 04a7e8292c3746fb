"""8-bit weights and 8-bit activations, products in integers (Q1 of the method cards)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import fx

from ....ir.analysis.sites.walk import ACTIVATIONS, LAYOUT, NORMS
from ....ir.program import Program
from ..algebra.buckets import plan_activations
from ..algebra.gptq import gptq
from ..algebra.grids import INT8_CHANNEL, IntegerGrid, Quantized
from ..algebra.int8 import LEVELS, activation_range, centring_offset, positive, to_products
from ..algebra.smoothing import balanced_scale, exponent_scale, smoothquant
from ..inputs import Inputs, Need
from ..layers import Group
from ..realize import (
    Activation,
    BucketedActivation,
    DynamicActivation,
    IntegerProducts,
    Realization,
    Shifted,
    StaticActivation,
)
from ..scheme import RoundingScheme

if TYPE_CHECKING:
    from ...base import Context

UINT8_TENSOR = IntegerGrid(8, "tensor", symmetric=False)


class Int8(RoundingScheme):
    """8-bit weights and activations; products in integers.

    linear(x, W) + b -> s_x s_W (q(x) - z) W_q + b with W_q int8 per output channel and q(x) uint8.
    """

    name = "int8"
    source = "ONNX Runtime MatMulIntegerToFloat; SmoothQuant, arXiv 2211.10438; PTQ4DiT, arXiv 2405.16005"
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "weights": ("per_channel",),
        "activations": ("dynamic", "static", "symmetric", "auto"),
        "smooth": ("0 to 1", "search", "salience", "null"),
        "rounding": ("auto", "nearest", "gptq"),
        "repair": (),
    }
    saves_time = True

    @property
    def need(self) -> Need:
        """Ranges for static scales and for an exponent; rows or Gram matrices for what is judged by outputs."""
        options = self.options
        if options.smooth == "search" or options.rounding == "gptq":
            return Need.STATISTICS
        if options.rounding == "auto":
            return Need.GRAMS
        return Need.RANGES if options.smooth is not None or options.activations != "dynamic" else Need.NOTHING

    def scale(self, group: Group, inputs: Inputs) -> torch.Tensor | None:
        """See `Scheme.scale`."""
        smooth = self.options.smooth
        if smooth is None:
            return None
        if smooth == "search":
            return smoothquant(group.weight, inputs.rows(), INT8_CHANNEL, UINT8_TENSOR).scale
        if smooth == "salience":
            return balanced_scale(inputs.salience, group.weight)
        assert not isinstance(smooth, str)
        return exponent_scale(inputs.largest, group.weight, smooth, 1 - smooth)

    def scales_at_run_time(self, group: Group) -> bool:
        """A norm that others read too, as in encoders, has outliers no exponent may be folded into.

        Behind an activation function the multiplication gains little and may lose: its channels have no outliers.
        """
        return group.source.target in NORMS

    def prepare(
        self, program: Program, groups: Sequence[Group], inputs: Mapping[str, Inputs], context: Context
    ) -> Mapping[str, object]:
        """Say which values are shifted, and how far."""
        offsets = {group.name: self._offset(group, inputs.get(group.key)) for group in groups}
        shifted = {name: offset for name, offset in offsets.items() if offset is not None}
        return {"shifted": shifted} if shifted else {}

    def realize(self, group: Group, inputs: Inputs | None) -> Realization:
        """See `Scheme.realize`."""
        weights, offset = self._weights(group, inputs), self._offset(group, inputs)
        if inputs is None or offset is None:
            return IntegerProducts(self._activation(inputs), weights)
        sums = [codes.sum(dim=0) * scale for codes, scale in weights]
        return Shifted(IntegerProducts(self._activation(inputs.less(offset)), weights), offset, sums)

    def _offset(self, group: Group, inputs: Inputs | None) -> float | None:
        """What is taken from the value so that symmetric codes are not wasted, None where they are not."""
        if self.options.activations != "symmetric" or inputs is None or not _is_activated(group.source):
            return None
        return centring_offset(float(inputs.low.amin()), float(inputs.high.amax()))

    def rounded(self, group: Group, inputs: Inputs | None) -> Sequence[torch.Tensor]:
        """See `RoundingScheme.rounded`."""
        return [(codes * scale).T for codes, scale in self._weights(group, inputs)]

    def _weights(self, group: Group, inputs: Inputs | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Codes [M, N] int8 and scale [N] of each layer."""
        gram = inputs.gram() if inputs is not None and self._compensates(inputs) else None
        return [_rounded(layer.weight, gram, layer.name) for layer in group.layers]

    def _compensates(self, inputs: Inputs) -> bool:
        """Whether GPTQ rounds; `auto` leaves the choice to whether a Gram matrix is at hand."""
        return self.options.rounding == "gptq" or (self.options.rounding == "auto" and inputs.has_gram)

    def _activation(self, inputs: Inputs | None) -> Activation:
        if self.options.activations == "dynamic" or inputs is None:
            return DynamicActivation()
        if self.options.activations == "symmetric":
            return StaticActivation(positive(inputs.largest.amax() / LEVELS), torch.zeros((), dtype=torch.int8))
        plan = plan_activations(inputs.low.amin(dim=1), inputs.high.amax(dim=1), dynamic=False)
        pairs = [activation_range(*ends) for ends in plan.ranges]
        scales, zeros = (torch.stack(values) for values in zip(*pairs, strict=True))
        return StaticActivation(scales[0], zeros[0]) if plan.kind == "static" else BucketedActivation(scales, zeros)


def _rounded(weight: torch.Tensor, gram: torch.Tensor | None, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [M, N] int8 and scale [N] float32."""
    if gram is None:
        return to_products(Quantized.of(weight, INT8_CHANNEL))
    return to_products(gptq(weight, gram, INT8_CHANNEL, site=name).quantized)


def _is_activated(value: fx.Node) -> bool:
    """Whether an activation function writes a value, layouts aside."""
    while value.target in LAYOUT and isinstance(value.args[0], fx.Node):
        value = value.args[0]
    return value.target in ACTIVATIONS
