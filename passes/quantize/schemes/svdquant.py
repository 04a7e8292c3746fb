"""SVDQuant: a branch of low rank in full precision beside a residual of few bits (Q5 of the method cards)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from ..algebra.grids import FP8_CHANNEL, FP8_TENSOR, INT8_CHANNEL, Grid, IntegerGrid, Quantized
from ..algebra.int8 import to_products
from ..algebra.packing import to_matmul_nbits
from ..algebra.svdquant import SvdquantSettings, branch_and_residual, branch_smoothing
from ..inputs import Inputs, Need
from ..layers import Group, LinearLayer
from ..realize import BlockedProducts, DynamicActivation, IntegerProducts, Realization, WithBranch
from ..scheme import SEQUENTIAL, Scheme
from .blocks import block_of
from .floats import fp8_products
from .int8 import UINT8_TENSOR

GRIDS: Mapping[str, tuple[Grid, Grid]] = {"int8": (INT8_CHANNEL, UINT8_TENSOR), "fp8": (FP8_CHANNEL, FP8_TENSOR)}
"""What the residual and what it reads are rounded to, by its format; `int4` has blocks that fit the layer."""


class Svdquant(Scheme):
    """SVDQuant: smoothing moves outliers into weights, a branch of low rank takes them out, the rest gets few bits."""

    name = "svdquant"
    source = "SVDQuant, arXiv 2411.05007; deepcompressor"
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "group": (),
        "rank": (),
        "rounding": ("nearest", "gptq", SEQUENTIAL),
        "residual": ("int4", "int8", "fp8"),
        "activations": ("dynamic", "float"),
    }

    @property
    def need(self) -> Need:
        """See `Scheme.need`."""
        return Need.STATISTICS

    def scales_at_run_time(self, group: Group) -> bool:
        """See `Scheme.scales_at_run_time`."""
        return True

    def unfit(self, layer: LinearLayer) -> str | None:
        """See `Scheme.unfit`."""
        N, M = layer.weight.shape
        if self.options.rank > min(N, M):
            return f"rank {self.options.rank} is above the {min(N, M)} it has"
        if self.options.residual == "int4" and block_of(M, self.options.group) is None:
            return f"no block of a power of two divides its {M} inputs"
        return None

    def scale(self, group: Group, inputs: Inputs) -> torch.Tensor | None:
        """See `Scheme.scale`."""
        settings = self._settings(group.weight.shape[1])
        found = branch_smoothing(group.weight, inputs.rows(), settings, inputs.largest)
        return found.scale if (found.alpha, found.beta) != (0.0, 0.0) else None

    def realize(self, group: Group, inputs: Inputs | None) -> Realization:
        """See `Scheme.realize`."""
        assert inputs is not None
        compensate = self.options.rounding != "nearest"
        settings = replace(self._settings(group.weight.shape[1]), clip=compensate)
        gram = inputs.gram() if compensate else None
        split = branch_and_residual(group.weight, inputs.rows(), settings, gram, group.name)
        sizes = [layer.weight.shape[0] for layer in group.layers]
        parts = [split.residual.of_rows(first, first + size) for first, size in zip(_starts(sizes), sizes, strict=True)]
        return WithBranch(self._products(parts, inputs), split.down, list(split.up.split(sizes)))

    def _products(self, residuals: Sequence[Quantized], inputs: Inputs) -> Realization:
        """What computes with the rounded residual of each layer."""
        if self.options.residual == "fp8":
            return fp8_products(residuals, inputs)
        if self.options.residual == "int8":
            return IntegerProducts(DynamicActivation(), [to_products(part) for part in residuals])
        return BlockedProducts([to_matmul_nbits(part) for part in residuals], self.options.activations == "dynamic")

    def _settings(self, M: int) -> SvdquantSettings:
        if self.options.residual != "int4":
            return SvdquantSettings(*GRIDS[self.options.residual], self.options.rank)
        block = block_of(M, self.options.group)
        assert block is not None
        activations = IntegerGrid(8, block) if self.options.activations == "dynamic" else None
        return SvdquantSettings(IntegerGrid(4, block), activations, self.options.rank)


def _starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]
