"""Quantizers that a model carries are captured as PyTorch's `fake_quantize` operators.

A model quantized by modelopt (`mtq.quantize`) has a `TensorQuantizer` in front of each quantized value. It looks at its
ranges while it runs (`if amax.min() < 0`), which `torch.export` refuses, and rounds with plain arithmetic in which no
engine would find a Q/DQ pair. So for the time of the capture each of them computes `fake_quantize` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..ir import fake_quantize  # noqa: F401  (shape kernels of the operators)
from ..loop.errors import StepfoldError

PACKAGE, CLASS = "modelopt.", "TensorQuantizer"
BITS = 8
SMALLEST = 1.0 / (1 << 24)  # modelopt's floor of a range: all values below it are zero

Forward = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def plain_quantizers(model: torch.nn.Module) -> Iterator[int]:
    """Within the block every modelopt quantizer of a model computes `fake_quantize`; yields how many there are.

    Raises:
        StepfoldError: a quantizer has a format without such an operator; the message names it.
    """
    found = {name: module for name, module in model.named_modules() if is_quantizer(module)}
    forwards = {name: _forward(name, module) for name, module in found.items()}
    try:
        for name, module in found.items():
            module.__dict__["forward"] = forwards[name]
        yield len(found)
    finally:
        for module in found.values():
            module.__dict__.pop("forward", None)


def is_quantizer(module: torch.nn.Module) -> bool:
    """Whether a module is modelopt's: told by its class, because modelopt need not be installed here."""
    return any(kind.__name__ == CLASS and kind.__module__.startswith(PACKAGE) for kind in type(module).__mro__)


def _forward(name: str, quantizer: Any) -> Forward:
    """What a quantizer computes, as operators that can be captured."""
    factors = getattr(quantizer, "pre_quant_scale", None)  # SmoothQuant and AWQ: the input is multiplied first
    quantize = _identity if not quantizer.is_enabled else _fake_quantize(name, quantizer)
    if factors is None:
        return quantize
    return lambda x: quantize(x * factors)


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _fake_quantize(name: str, quantizer: Any) -> Forward:
    _require_integers(name, quantizer)
    amax = quantizer.amax.detach().float().clamp(min=SMALLEST)
    low, high = (0, 2**BITS - 1) if quantizer.unsigned else (-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1)
    scale = amax / high
    if scale.numel() == 1:
        return lambda x: torch.fake_quantize_per_tensor_affine(x, float(scale), 0, low, high)
    (axis,) = (i for i, size in enumerate(scale.shape) if size > 1)
    scale, zero = scale.reshape(-1), torch.zeros(scale.numel(), dtype=torch.int32)
    return lambda x: torch.fake_quantize_per_channel_affine(x, scale, zero, axis, low, high)


def _require_integers(name: str, quantizer: Any) -> None:
    amax = getattr(quantizer, "amax", None)
    reasons = {
        f"num_bits={quantizer.num_bits}": quantizer.num_bits != BITS,
        "blocks": getattr(quantizer, "block_sizes", None) is not None,
        "a range that is computed at run time": amax is None,
        "weights that are stored as codes": not quantizer.fake_quant,
        "a narrow range": quantizer.narrow_range,
        "a rotation": getattr(quantizer, "rotate_is_enabled", False),
        "a bias": getattr(quantizer, "bias_value", None) is not None,
        "ranges along several axes": amax is not None and sum(size > 1 for size in amax.shape) > 1,
    }
    received = [reason for reason, holds in reasons.items() if holds]
    if received:
        raise StepfoldError(
            f"quantizer {name}: expected 8-bit integers with one fixed range for the tensor or for each channel; "
            f"received {', '.join(received)}. Capture the model before mtq.quantize and let the pass `quantize` "
            "choose the format."
        )
