"""A norm by the root of the mean square that the capture has as several operators, as one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ...ir.rewriting import Refused, Rewrite, two

aten = torch.ops.aten


@dataclass(frozen=True)
class RootMeanSquare:
    """Bindings: what is normalized [..., D], its weight [D], and what is added to the mean square."""

    x: fx.Node
    weight: fx.Node
    epsilon: float


class FuseRMSNorm(Rewrite[RootMeanSquare]):
    """x * rsqrt(mean(x^2) + e) * w -> rms_norm(x, w, e).

    Constraints: the mean is over the last dimension; w is [D], stored.
    """

    name: ClassVar[str] = "rms_norm"
    roots: ClassVar[Collection[Any]] = (aten.mul.Tensor,)

    def match(self, node: fx.Node) -> RootMeanSquare | Refused | None:
        """The product with the weight."""
        for normed, weight in two(node, aten.mul.Tensor):
            for x, root in two(normed, aten.mul.Tensor):
                epsilon = _epsilon(x, root)
                if epsilon is None:
                    continue
                if weight.op != "get_attr" or tuple(weight.meta["shape"]) != (x.meta["shape"][-1],):
                    return Refused("what the norm is multiplied by is not a stored weight [D]", weight)
                return RootMeanSquare(x, weight, epsilon)
        return None

    def rewrite(self, graph: fx.GraphModule, node: fx.Node, match: RootMeanSquare) -> fx.Node:
        """One `aten::rms_norm`."""
        sizes = [match.x.meta["shape"][-1]]
        return graph.graph.call_function(aten.rms_norm.default, (match.x, sizes, match.weight, match.epsilon))


def _epsilon(x: fx.Node, root: fx.Node) -> float | None:
    """What is added to the mean square of `x` under `root`; None when that is something else."""
    shifted = root.args[0] if root.target is aten.rsqrt.default else None
    if not isinstance(shifted, fx.Node) or shifted.target is not aten.add.Tensor or shifted.kwargs:
        return None
    mean, epsilon = shifted.args
    if not isinstance(mean, fx.Node) or mean.target is not aten.mean.dim or not isinstance(epsilon, float):
        return None
    square, dimensions, keep = (*mean.args, False)[:3]
    last = list(dimensions) in ([-1], [len(x.meta["shape"]) - 1])  # type: ignore[arg-type]
    if mean.kwargs or not keep or not last or not isinstance(square, fx.Node):
        return None
    return epsilon if square.target is aten.pow.Tensor_Scalar and square.args == (x, 2) else None
