"""Small floating-point formats: the values a few bits can name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class FloatFormat:
    """A sign, an exponent and a mantissa without infinities; values beyond the largest saturate.

    Codes are sign, exponent and mantissa from the highest bit to the lowest, as OCP writes them (OCP Microscaling
    Formats 1.0, section 5.3).

    Attributes:
        bits: width of a code.
        mantissa: bits of the mantissa.
        exponent: exponent of the smallest normal number; subnormal numbers have its step.
        largest: largest finite value.
    """

    bits: int
    mantissa: int
    exponent: int
    largest: float

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """The code of the nearest value, uint8 of any shape; ties go to the even code."""
        magnitude = values.abs().clamp(max=self.largest)
        exponent = torch.where(magnitude > 0, torch.frexp(magnitude).exponent - 1, self.exponent).clamp(
            min=self.exponent
        )
        steps = torch.round(torch.ldexp(magnitude, self.mantissa - exponent))
        # A mantissa that rounds up to the next power of two carries into the exponent, as it should.
        code = steps + (exponent - self.exponent) * 2**self.mantissa
        sign = torch.signbit(values) & (code > 0)  # one zero, the positive one
        return (code + sign * 2 ** (self.bits - 1)).to(torch.uint8)

    def decode(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The values of codes in `dtype`, any shape."""
        return _values(self).to(dtype)[codes.long()]

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest values of the format, any shape."""
        return self.decode(self.encode(values), values.dtype)


@cache
def _values(format: FloatFormat) -> torch.Tensor:
    """[2**bits] float64: the value of every code; codes that name no number go on as if they did."""
    code = torch.arange(2 ** (format.bits - 1), dtype=torch.float64)
    exponent = torch.floor(code / 2**format.mantissa).clamp(min=1)
    steps = code - (exponent - 1) * 2**format.mantissa
    positive = steps * 2.0 ** (exponent - 1 + format.exponent - format.mantissa)
    return torch.cat([positive, -positive])


E2M1 = FloatFormat(bits=4, mantissa=1, exponent=0, largest=6.0)
"""0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""

E4M3 = FloatFormat(bits=8, mantissa=3, exponent=-6, largest=448.0)
"""The FP8 format of weights and activations; `torch.float8_e4m3fn`."""
