"""PyTorch's `fake_quantize` operators in a program: kept as nodes, so that Q/DQ pairs of a captured model survive.

PyTorch ships no shape kernel for them, and without one neither `torch.export` nor shape propagation takes a graph that
has them. Importing this module adds the missing kernels.
"""

from __future__ import annotations

import torch

aten = torch.ops.aten
FAKE_QUANTIZE = frozenset(
    {
        aten.fake_quantize_per_tensor_affine.default,
        aten.fake_quantize_per_tensor_affine.tensor_qparams,
        aten.fake_quantize_per_channel_affine.default,
    }
)
"""Quantize and dequantize in one: `scale (clamp(round(x / scale) + zero, low, high) - zero)`."""

_KERNELS = (
    "fake_quantize_per_tensor_affine_cachemask",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "fake_quantize_per_channel_affine_cachemask",
)
"""What the composite operators call."""


def _shapes(x: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient mask, both of the shape of the input."""
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


_library = torch.library.Library("aten", "IMPL", "Meta")
for _name in _KERNELS:
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{_name}", "Meta"):
        _library.impl(_name, _shapes)
