"""Small floats: FP8 for Ada and Hopper, NVFP4 for Blackwell; every other engine runs them as a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from ....ir.blocked import pack_bits
from ....ir.floats import E2M1, E4M3
from ....ir.operators.nvfp4 import NVFP4_BLOCK
from ..algebra.grids import FP8_CHANNEL, NVFP4, Quantized
from ..algebra.int8 import positive
from ..algebra.smoothing import exponent_scale
from ..inputs import Inputs, Need
from ..layers import Group, LinearLayer
from ..realize import Realization, Reconstructed
from ..scheme import Scheme


class SmallFloats(Scheme):
    """Weights and activations as small floats, products in floats."""

    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {"smooth": ("0 to 1", "null")}

    @property
    def need(self) -> Need:
        """Ranges of activations, which are rounded under a scale known before."""
        return Need.RANGES

    def scale(self, group: Group, inputs: Inputs) -> torch.Tensor | None:
        """See `Scheme.scale`."""
        smooth = self.options.smooth
        if smooth is None:
            return None
        assert not isinstance(smooth, str)
        return exponent_scale(inputs.largest, group.weight, smooth, 1 - smooth)


class Fp8(SmallFloats):
    """FP8 E4M3 weights per output channel and activations under one calibrated scale."""

    name = "fp8"
    source = "OCP 8-bit floating point, TensorRT explicit quantization"

    def realize(self, group: Group, inputs: Inputs | None) -> Realization:
        """See `Scheme.realize`."""
        assert inputs is not None
        return fp8_products([Quantized.of(layer.weight, FP8_CHANNEL) for layer in group.layers], inputs)


def fp8_products(weights: Sequence[Quantized], inputs: Inputs) -> Realization:
    """Products of FP8 weights, each on `FP8_CHANNEL`, with activations under one scale that covers their range."""
    held = []
    for rounded in weights:
        codes = (rounded.weight / rounded.scales.scale).to(torch.float8_e4m3fn)
        held.append({"fp8": codes, "scale": rounded.scales.scale[:, 0].contiguous()})
    round_input = (torch.ops.stepfold.round_fp8.default, positive(inputs.largest.amax() / E4M3.largest))
    return Reconstructed(torch.ops.stepfold.decode_fp8.default, held, round_input)


class Nvfp4(SmallFloats):
    """NVFP4: E2M1 weights and activations in blocks of 16 under E4M3 scales."""

    name = "nvfp4"
    source = "NVFP4, TensorRT IDynamicQuantizeLayer; modelopt NVFP4_DEFAULT_CFG"

    def unfit(self, layer: LinearLayer) -> str | None:
        """See `Scheme.unfit`."""
        M = layer.weight.shape[1]
        return None if M % NVFP4_BLOCK == 0 else f"its {M} inputs are no multiple of {NVFP4_BLOCK}"

    def realize(self, group: Group, inputs: Inputs | None) -> Realization:
        """See `Scheme.realize`."""
        assert inputs is not None
        weights = []
        for layer in group.layers:
            rounded = Quantized.of(layer.weight, NVFP4)
            unit = rounded.scales.unit
            assert unit is not None
            blocks = (rounded.scales.scale / unit).to(torch.float8_e4m3fn)
            weights.append({"e2m1": pack_bits(rounded.codes, E2M1.bits), "scales": blocks, "unit": unit})
        unit = positive(inputs.largest.amax() / (E2M1.largest * E4M3.largest))
        round_input = (torch.ops.stepfold.round_nvfp4.default, unit)
        return Reconstructed(torch.ops.stepfold.decode_nvfp4.default, weights, round_input)
