"""What an operator of the namespace `stepfold::` is made of, in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

Arguments = Sequence[Any]


@dataclass(frozen=True)
class Operator:
    """An operator: everything that passes, engines and counts have to know of it.

    Attributes:
        overload: what graphs hold.
        reference: what it computes, in ATen operators; verification, calibration and tests compare with it.
        portable: the form for engines that have none of their own, in ATen operators; None where such a form would not be
            worth having, as floats in place of integer products are not.
        flops: FLOPs of a node at the probe batch; None where it multiplies no matrices.
        couples_batch: whether a sample depends on its batch mates.
        weight: which argument holds the weight, for the operators that take the place of a layer's product or weight.
        examples: arguments that show its cases; tests compare shape, reference and portable form on them.
    """

    overload: torch._ops.OpOverload
    reference: Callable[..., Any]
    portable: Callable[..., Any] | None
    flops: Callable[[fx.Node], int] | None
    couples_batch: bool
    weight: int | None
    examples: Callable[[], Sequence[Arguments]]

    def __call__(self, *arguments: Any) -> Any:
        """Call the operator; where a graph is captured, the call becomes one node."""
        return self.overload(*arguments)


RECORDS: dict[object, Operator] = {}
"""By overload, in the order in which they were defined."""


def operator(
    shape: Callable[..., Any],
    examples: Callable[[], Sequence[Arguments]],
    portable: Callable[..., Any] | bool = True,
    flops: Callable[[fx.Node], int] | None = None,
    couples_batch: bool = False,
    weight: int | None = None,
) -> Callable[[Callable[..., Any]], Operator]:
    """Define `stepfold::<name of the function>`; the function is the reference.

    Args:
        shape: function of the same arguments that makes an empty result, for shape propagation.
        examples: function that makes lists of arguments, one for each case worth showing.
        portable: True where the reference serves engines that have no form of their own, False where an engine needs one, or
            the function that serves them.
        flops: see `Operator`.
        couples_batch: see `Operator`.
        weight: see `Operator`.
    """

    def define(reference: Callable[..., Any]) -> Operator:
        made = torch.library.custom_op(f"stepfold::{reference.__name__}", reference, mutates_args=())
        made.register_fake(shape)
        overload = made._opoverload
        form = (reference if portable else None) if isinstance(portable, bool) else portable
        RECORDS[overload] = Operator(overload, reference, form, flops, couples_batch, weight, examples)
        return RECORDS[overload]

    return define


def couples_batch(node: fx.Node) -> bool:
    """Whether a node makes samples depend on their batch mates."""
    record = RECORDS.get(node.target)
    return record is not None and record.couples_batch
