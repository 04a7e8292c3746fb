"""A decision as the operands of our layers: integers, FP8, or blocks of four bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ....loop.errors import StepfoldError
from ..algebra.grids import IntegerGrid, Quantized, Scales
from ..algebra.packing import BlockedWeight, to_matmul_nbits
from .read import FLOAT8, LinearDecision

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
        name: name of the layer, for the message.
        decision: input and weight in 8-bit integers, the weight symmetric with a scale for each output channel.

    Raises:
        StepfoldError: the decision has another form.
    """
    given, weight = decision.input, decision.weight
    symmetric = weight.dtype == "int8" and weight.group is None and not weight.zero.any()
    if given is None or given.dtype not in ("int8", "uint8") or not symmetric or decision.multiplier is not None:
        wanted = "an 8-bit integer input and a symmetric int8 weight with one scale for each output channel"
        raise _unexpected(name, decision, "int8", wanted)
    zero = given.zero + (SHIFT if given.dtype == "int8" else 0)
    return IntegerOperands(
        torch.tensor(given.scale, dtype=torch.float32),
        torch.tensor(zero, dtype=torch.uint8),
        torch.from_numpy(np.ascontiguousarray(weight.codes)),
        torch.from_numpy(np.ascontiguousarray(weight.scale)),
    )


@dataclass(frozen=True)
class Fp8Operands:
    """What an FP8 linear layer is made of.

    Attributes:
        scale: [] float32, of the input.
        weight: [N, M] float8_e4m3fn.
        weight_scale: [N] float32.
    """

    scale: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor


def fp8_operands(name: str, decision: LinearDecision) -> Fp8Operands:
    """The operands of an FP8 decision.

    Args:
        name: name of the layer, for the message.
        decision: input and weight in E4M3, the weight with a scale for each output channel.

    Raises:
        StepfoldError: the decision has another form.
    """
    given, weight = decision.input, decision.weight
    whole = weight.dtype == FLOAT8 and weight.group is None
    if given is None or given.dtype != FLOAT8 or not whole or decision.multiplier is not None:
        wanted = "an E4M3 input and an E4M3 weight with one scale for each output channel"
        raise _unexpected(name, decision, "fp8", wanted)
    codes = torch.from_numpy(np.ascontiguousarray(weight.codes.T).view(np.uint8)).view(torch.float8_e4m3fn)
    return Fp8Operands(
        torch.tensor(given.scale, dtype=torch.float32), codes, torch.from_numpy(np.ascontiguousarray(weight.scale))
    )


def blocked_weight(name: str, decision: LinearDecision) -> BlockedWeight:
    """The weight of a 4-bit decision in blocks; its input stays as it is.

    Args:
        name: name of the layer, for the message.
        decision: a symmetric int4 weight in groups.

    Raises:
        StepfoldError: the decision has another form.
    """
    weight = decision.weight
    symmetric = weight.dtype == "int4" and weight.group is not None and not weight.zero.any()
    if decision.input is not None or not symmetric or decision.multiplier is not None:
        raise _unexpected(name, decision, "int4", "a float input and a symmetric int4 weight in groups")
    assert weight.group is not None
    codes, scale = (torch.from_numpy(np.ascontiguousarray(part.T)) for part in (weight.codes, weight.scale))
    grid = IntegerGrid(4, weight.group)
    return to_matmul_nbits(Quantized(grid, codes, Scales(scale, weight.group)))


def _unexpected(name: str, decision: LinearDecision, mode: str, expected: str) -> StepfoldError:
    given, weight = decision.input, decision.weight
    received = f"input {given.dtype if given else 'float'}, weight {weight.dtype}"
    received += f" in groups of {weight.group}" if weight.group else ""
    received += ", factors in front" if decision.multiplier is not None else ""
    return StepfoldError(
        f"layer {name}: expected {expected}; received {received}. Quantize with mode {mode}, or read the decision in "
        "another form."
    )
