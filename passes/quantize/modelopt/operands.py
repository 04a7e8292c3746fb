"""A decision as the operands of `stepfold::quantize_static` and `stepfold::qlinear`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ....loop.errors import StepfoldError
from .read import LinearDecision

SHIFT = 128  # from signed to unsigned codes: q + 128 with zero + 128 stands for the same number


@dataclass(frozen=True)
class IntegerOperands:
    """What an integer linear layer with a static scale is made of.

    Attributes:
        scale: [] float32, of the input.
        zero: [] uint8, of the input.
        weight: [M, N] int8.
        weight_scale: [N] float32.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor


def integer_operands(name: str, decision: LinearDecision) -> IntegerOperands:
    """The operands of an 8-bit decision; the integer layer computes what the Q/DQ model does.

    Args:
        name: of the layer, for the message.
        decision: input and weight in 8-bit integers, the weight symmetric with a scale for each output channel.

    Raises:
        StepfoldError: the decision has another form.
    """
    given, weight = decision.input, decision.weight
    received = f"input {given.dtype if given else 'float'}, weight {weight.dtype}" + (
        f" in groups of {weight.group}" if weight.group else ""
    )
    symmetric = weight.dtype == "int8" and weight.group is None and not weight.zero.any()
    if given is None or given.dtype not in ("int8", "uint8") or not symmetric or decision.multiplier is not None:
        raise StepfoldError(
            f"layer {name}: expected an 8-bit integer input and a symmetric int8 weight with one scale for each output "
            f"channel; received {received}. Quantize with mode int8, or read the decision in another form."
        )
    zero = given.zero + (SHIFT if given.dtype == "int8" else 0)
    return IntegerOperands(
        torch.tensor(given.scale, dtype=torch.float32),
        torch.tensor(zero, dtype=torch.uint8),
        torch.from_numpy(np.ascontiguousarray(weight.codes)),
        torch.from_numpy(np.ascontiguousarray(weight.scale)),
    )
