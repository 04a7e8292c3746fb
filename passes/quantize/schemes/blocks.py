"""Weights of 4 or 8 bits in blocks; activations stay, or are rounded row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from ..algebra.awq import awq
from ..algebra.clipping import clipped_scales
from ..algebra.errors import relative_error
from ..algebra.gptq import gptq
from ..algebra.grids import IntegerGrid, Quantized
from ..algebra.packing import SMALLEST_BLOCK, to_matmul_nbits
from ..inputs import Inputs, Need
from ..layers import Group, LinearLayer
from ..realize import BlockedProducts, Realization
from ..rotate import Rotation, tried_rotations
from ..scheme import SEQUENTIAL, RoundingScheme


class Blocked(RoundingScheme):
    """Weights in blocks that share a scale (contrib `MatMulNBits`)."""

    bits: int
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "group": (),
        "activations": ("dynamic", "float"),
        "smooth": ("awq", "null"),
        "rounding": ("nearest", "gptq", SEQUENTIAL),
        "repair": (),
    }

    @property
    def need(self) -> Need:
        """Statistics for what is judged by outputs."""
        options = self.options
        return Need.STATISTICS if options.smooth is not None or options.rounding == "gptq" else Need.NOTHING

    def unfit(self, layer: LinearLayer) -> str | None:
        """See `Scheme.unfit`."""
        M = layer.weight.shape[1]
        if block_of(M, self.options.group) is None:
            return f"no block of a power of two from {SMALLEST_BLOCK} divides its {M} inputs"
        return None

    def scale(self, group: Group, inputs: Inputs) -> torch.Tensor | None:
        """See `Scheme.scale`."""
        if self.options.smooth is None:
            return None
        weight, grid = group.weight, self.grid(group.weight.shape[1])
        found = awq(weight, inputs.mean_magnitude, inputs.gram(), grid, site=group.name)
        return found.scale if found.ratio > 0 else None

    def realize(self, group: Group, inputs: Inputs | None) -> Realization:
        """See `Scheme.realize`."""
        packed = [to_matmul_nbits(weight) for weight in self._weights(group, inputs)]
        return BlockedProducts(packed, self.options.activations == "dynamic")

    def rounded(self, group: Group, inputs: Inputs | None) -> Sequence[torch.Tensor]:
        """See `RoundingScheme.rounded`."""
        return [weight.weight for weight in self._weights(group, inputs)]

    def _weights(self, group: Group, inputs: Inputs | None) -> list[Quantized]:
        gram = inputs.gram() if inputs is not None else None
        return [self._round(layer.weight, gram, layer.name) for layer in group.layers]

    def _round(self, weight: torch.Tensor, gram: torch.Tensor | None, name: str) -> Quantized:
        """A weight [N, M]: nearest, or with the Gram of its input under clipped ranges, or by GPTQ."""
        grid = self.grid(weight.shape[1])
        if gram is None:
            return Quantized.of(weight, grid)
        scales = clipped_scales(weight, grid, gram.to(weight.dtype))
        if self.options.rounding == "nearest":
            return Quantized.of(weight, grid, scales)
        return gptq(weight, gram, grid, scales, site=name).quantized

    def grid(self, M: int) -> IntegerGrid:
        """What weights of M inputs are rounded to."""
        block = block_of(M, self.options.group)
        assert block is not None
        return IntegerGrid(self.bits, block)


class Int4(Blocked):
    """4-bit weights in groups, nearest, AWQ or GPTQ; activations rounded to 8 bits row by row, or left."""

    name = "int4"
    source = "ONNX Runtime MatMulNBits; AWQ, arXiv 2306.00978; GPTQ, arXiv 2210.17323"
    bits = 4
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {**Blocked.reads, "rotate": ("heads", "null")}

    @property
    def need(self) -> Need:
        """Statistics for rotations too, which are judged by outputs."""
        return Need.STATISTICS if self.options.rotate is not None else super().need

    def rotations(self, groups: Sequence[Group], inputs: Mapping[str, Inputs], seed: int) -> Mapping[str, Rotation]:
        """See `Scheme.rotations`."""
        return tried_rotations(groups, inputs, self._error, seed) if self.options.rotate is not None else {}

    def _error(self, weight: torch.Tensor, gram: torch.Tensor) -> float:
        """Relative output error of a rounded weight."""
        rounded = self._round(weight, gram, "weight").weight
        return relative_error(rounded.to(gram.dtype), weight.to(gram.dtype), gram)


class Int8Weights(Blocked):
    """8-bit weights in groups; activations rounded to 8 bits row by row, or left."""

    name = "int8-weights"
    source = "ONNX Runtime MatMulNBits"
    bits = 8


def block_of(M: int, wanted: int) -> int | None:
    """The largest power of two from `SMALLEST_BLOCK` to `wanted` that divides M, or None."""
    block = wanted
    while block >= SMALLEST_BLOCK:
        if M % block == 0:
            return block
        block //= 2
    return None
