"""Rounding grids: which numbers a quantized weight can be, and how its scales follow from it.

Every grid quantizes along rows: `weight ~ scale * value`, one scale for each run of `group` input channels of a row,
for each row, or for the tensor. Activations [T, M] are rows too, so that a grid quantizes them just as well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from math import frexp
from typing import Literal

import torch

from ....ir.floats import E2M1, E4M3, FloatFormat
from ....ir.pairs import LARGEST_SUM, pair_sums
from ....loop.errors import UsageError

Group = int | Literal["row", "tensor"]
"""How many input channels of a row share a scale; or the whole row (a channel of the output), or all of it."""

INTEGER_BITS = (2, 3, 4, 8)
FLOAT_SCALE_BITS = 32  # as MatMulNBits and DequantizeLinear read them
SMALLEST_E4M3 = 2.0**-9
LARGEST_E8M0 = 127
PRODUCT_LEVELS = 127


@dataclass(frozen=True, eq=False)
class Scales:
    """The scales of a weight.

    Attributes:
        scale: [N, M / group]; [1, 1] for one scale of the tensor.
        group: input channels that share a scale.
        zero: same shape as scale, the code of the number zero; None where codes are signed.
        unit: [] what block scales are multiples of in their own small format; None where they are floats.
    """

    scale: torch.Tensor
    group: int
    zero: torch.Tensor | None = None
    unit: torch.Tensor | None = None

    def of_columns(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero point of each column: [N, M] or [1, M]."""
        scale = self.scale.repeat_interleave(self.group, dim=1)
        return scale, None if self.zero is None else self.zero.repeat_interleave(self.group, dim=1)

    def better_of(self, other: Scales, mask: torch.Tensor) -> Scales:
        """The scales of `other` where the mask (of the shape of scale) says so, these elsewhere."""
        zero = None if self.zero is None or other.zero is None else torch.where(mask, other.zero, self.zero)
        return replace(self, scale=torch.where(mask, other.scale, self.scale), zero=zero)


class Grid(ABC):
    """The numbers that `scale * value` can be."""

    group: Group

    @abstractmethod
    def scales(self, weight: torch.Tensor, shrink: float = 1.0) -> Scales:
        """The scales that cover a weight.

        Args:
            weight: [N, M] floating point.
            shrink: part of the range of each group that is covered; what lies beyond saturates.

        Raises:
            UsageError: the group does not divide M, or the weight is not finite.
        """

    @abstractmethod
    def encode_at(self, values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """Codes of values [N, ...] under scales that broadcast with them."""

    @abstractmethod
    def decode_at(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """Values of codes [N, ...] under scales that broadcast with them."""

    @abstractmethod
    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Bits that a weight [rows, columns] needs for each element, scales and zero points included."""

    def encode(self, weight: torch.Tensor, scales: Scales) -> torch.Tensor:
        """The codes [N, M] of the nearest numbers."""
        return self.encode_at(weight, *scales.of_columns())

    def fit(self, codes: torch.Tensor, neighbours: torch.Tensor) -> torch.Tensor:
        """Codes [N] of an input channel that go with those [N] of its neighbour, which was rounded before it.

        The neighbour of channel 2j is 2j + 1 and the other way round. Most grids round each channel on its own.
        """
        return codes

    def decode(self, codes: torch.Tensor, scales: Scales) -> torch.Tensor:
        """The weight [N, M] that codes stand for, in the dtype of the scales."""
        return self.decode_at(codes, *scales.of_columns())

    def round(self, weight: torch.Tensor, scales: Scales) -> torch.Tensor:
        """The nearest weight [N, M] of the grid: exactly what its codes decode to."""
        return self.decode(self.encode(weight, scales), scales)

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """Round to nearest with the scales that cover the weight [N, M]."""
        return self.round(weight, self.scales(weight))


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """Integers of a few bits: `scale * (code - zero)`.

    Symmetric: `scale = max |w| / (2**(bits - 1) - 1)`, codes are int8 in [-2**(bits - 1), 2**(bits - 1) - 1].
    Asymmetric: `scale = (max - min) / (2**bits - 1)` over a range that includes 0, codes are uint8.

    Attributes:
        bits: 2, 3, 4 or 8.
        group: which elements share a scale.
        symmetric: whether zero is in the middle.
    """

    bits: int
    group: Group = "row"
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in INTEGER_BITS:
            raise UsageError(f"bits: expected one of {', '.join(map(str, INTEGER_BITS))}; received {self.bits}.")

    def scales(self, weight: torch.Tensor, shrink: float = 1.0) -> Scales:
        """See `Grid.scales`."""
        groups = grouped(weight, self.group)
        if self.symmetric:
            scale = groups.abs().amax(dim=-1) * shrink / (2 ** (self.bits - 1) - 1)
            return Scales(_positive(scale), _width(weight, self.group))
        low = groups.amin(dim=-1).clamp(max=0) * shrink
        high = groups.amax(dim=-1).clamp(min=0) * shrink
        scale = _positive((high - low) / (2**self.bits - 1))
        zero = torch.round(-low / scale).clamp(0, 2**self.bits - 1).to(torch.uint8)
        return Scales(scale, _width(weight, self.group), zero)

    def encode_at(self, values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """See `Grid.encode_at`."""
        if zero is None:
            half = 2 ** (self.bits - 1)
            return torch.round(values / scale).clamp(-half, half - 1).to(torch.int8)
        return (torch.round(values / scale) + zero).clamp(0, 2**self.bits - 1).to(torch.uint8)

    def decode_at(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """See `Grid.decode_at`."""
        value = codes.to(scale.dtype)
        return (value if zero is None else value - zero) * scale

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """See `Grid.bits_per_weight`."""
        stored = FLOAT_SCALE_BITS if self.symmetric else FLOAT_SCALE_BITS + self.bits
        return self.bits + stored * _groups(self.group, rows, columns) / (rows * columns)


@dataclass(frozen=True)
class ProductGrid(IntegerGrid):
    """8-bit integers that every processor multiplies exactly with unsigned 8-bit activations (see `stepfold.ir.pairs`).

    Symmetric, one scale for each row: the larger of `max |w| / 127` and `max (w_2j + w_2j+1) / 127` over neighbours of
    one sign. Two roundings add at most 1 to such a sum, so nearest codes add up to at most 128.
    """

    bits: int = 8

    def scales(self, weight: torch.Tensor, shrink: float = 1.0) -> Scales:
        """See `Grid.scales`."""
        M = grouped(weight, self.group).shape[-1]
        return Scales(_positive(pair_sums(weight).amax(dim=1, keepdim=True) * shrink / PRODUCT_LEVELS), M)

    def encode(self, weight: torch.Tensor, scales: Scales) -> torch.Tensor:
        """See `Grid.encode`; what a pair has too much, under scales that do not cover it, both give up in equal parts."""
        codes = super().encode(weight, scales)
        even, odd = codes[:, 0::2].to(torch.int16), codes[:, 1::2].to(torch.int16)
        even, alone = even[:, : odd.shape[1]], even[:, odd.shape[1] :]
        excess = torch.where(even * odd > 0, even.abs() + odd.abs() - LARGEST_SUM, 0).clamp(min=0)
        even, odd = even - even.sign() * (excess // 2), odd - odd.sign() * (excess - excess // 2)
        paired = torch.stack((even, odd), dim=-1).flatten(1)
        return torch.cat((paired, alone), dim=1).to(torch.int8)

    def encode_at(self, values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """See `Grid.encode_at`."""
        return super().encode_at(values, scale, zero).clamp(min=-PRODUCT_LEVELS)

    def fit(self, codes: torch.Tensor, neighbours: torch.Tensor) -> torch.Tensor:
        """See `Grid.fit`."""
        beside = neighbours.to(torch.int16)
        low, high = -LARGEST_SUM - beside.clamp(max=0), LARGEST_SUM - beside.clamp(min=0)
        return torch.clamp(codes.to(torch.int16), low, high).to(torch.int8)


@dataclass(frozen=True)
class FloatGrid(Grid):
    """Small floating-point numbers under scales.

    Attributes:
        element: format of the values.
        group: which elements share a scale.
        scale_format: `float` scales; `e4m3` multiples of one float (NVFP4: `unit = max |W| / (largest * 448)`, scale
            `unit * E4M3(max |w| / (largest * unit))`); `e8m0` powers of two (OCP MX: `2**(floor(log2 max |w|) - e)`
            with e the exponent of the largest value, rounded down, so that the largest elements may saturate).
    """

    element: FloatFormat
    group: Group = "row"
    scale_format: Literal["float", "e4m3", "e8m0"] = "float"

    def scales(self, weight: torch.Tensor, shrink: float = 1.0) -> Scales:
        """See `Grid.scales`."""
        largest = grouped(weight, self.group).abs().amax(dim=-1)
        width = _width(weight, self.group)
        if self.scale_format == "float":
            return Scales(_positive(largest * shrink / self.element.largest), width)
        if self.scale_format == "e8m0":
            top = frexp(self.element.largest)[1] - 1
            exponent = torch.frexp(largest * shrink).exponent - 1 - top
            scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(-LARGEST_E8M0, LARGEST_E8M0))
            return Scales(torch.where(largest > 0, scale, torch.ones_like(scale)), width)
        unit = _positive(largest.amax() / (self.element.largest * E4M3.largest))
        block = E4M3.nearest(largest * shrink / (self.element.largest * unit)).clamp(min=SMALLEST_E4M3)
        return Scales(block * unit, width, unit=unit)

    def encode_at(self, values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """See `Grid.encode_at`; uint8."""
        return self.element.encode(values / scale)

    def decode_at(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """See `Grid.decode_at`."""
        return self.element.decode(codes, scale.dtype) * scale

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """See `Grid.bits_per_weight`."""
        scale_bits = FLOAT_SCALE_BITS if self.scale_format == "float" else 8
        shared = FLOAT_SCALE_BITS if self.scale_format == "e4m3" else 0
        return self.element.bits + (scale_bits * _groups(self.group, rows, columns) + shared) / (rows * columns)


INT8_CHANNEL = ProductGrid()
FP8_TENSOR = FloatGrid(E4M3, "tensor")
FP8_CHANNEL = FloatGrid(E4M3, "row")
NVFP4 = FloatGrid(E2M1, 16, "e4m3")
MXFP4 = FloatGrid(E2M1, 32, "e8m0")
MXFP8 = FloatGrid(E4M3, 32, "e8m0")


@dataclass(frozen=True, eq=False)
class Quantized:
    """A weight on a grid: codes [N, M], their scales, and the grid that reads them."""

    grid: Grid
    codes: torch.Tensor
    scales: Scales

    @classmethod
    def of(cls, weight: torch.Tensor, grid: Grid, scales: Scales | None = None) -> Quantized:
        """A weight [N, M] rounded to nearest; scales that cover it unless others are given."""
        scales = grid.scales(weight) if scales is None else scales
        return cls(grid, grid.encode(weight, scales), scales)

    def of_rows(self, first: int, stop: int) -> Quantized:
        """The rows from `first` to `stop` of a weight whose rows have scales of their own."""
        scales = self.scales
        zero = None if scales.zero is None else scales.zero[first:stop]
        return replace(
            self, codes=self.codes[first:stop], scales=replace(scales, scale=scales.scale[first:stop], zero=zero)
        )

    @property
    def weight(self) -> torch.Tensor:
        """[N, M] what the codes stand for."""
        return self.grid.decode(self.codes, self.scales)


def grouped(weight: torch.Tensor, group: Group) -> torch.Tensor:
    """A weight [N, M] as [N, M / group, group], or [1, 1, N M] when all of it shares a scale.

    Raises:
        UsageError: the group does not divide M, or the weight is not finite.
    """
    if not torch.isfinite(weight).all():
        raise UsageError("weight: expected finite numbers; received NaN or infinity. Check the checkpoint.")
    if group == "tensor":
        return weight.reshape(1, 1, -1)
    return weight.unflatten(1, (-1, _width(weight, group)))


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of a positive number that is nearest to the wanted one, the smaller of two."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))


def _width(weight: torch.Tensor, group: Group) -> int:
    M = weight.shape[1]
    if isinstance(group, str):
        return M
    if group < 1 or M % group:
        near = nearest_divisor(M, group)
        raise UsageError(f"group: expected a divisor of the {M} input features; received {group}. Try {near}.")
    return group


def _groups(group: Group, rows: int, columns: int) -> float:
    return {"tensor": 1, "row": rows}[group] if isinstance(group, str) else rows * columns / group


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """A scale of nothing but zeros is 1: engines want positive ones, and the codes are zero anyhow."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
