"""A norm and its modulation as one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from .rules import NearMiss, Rule, two

aten = torch.ops.aten
EPSILON = 1e-5  # of `layer_norm` where the call gives none


@dataclass(frozen=True)
class ModulatedNorm:
    """Bindings: what is normalized [B, T, D], scale and shift [B, 1, D], and the epsilon of the norm."""

    x: fx.Node
    scale: fx.Node
    shift: fx.Node
    epsilon: float


class FuseModulatedNorm(Rule[ModulatedNorm]):
    """layer_norm(x) * scale + shift -> modulated_norm(x, scale, shift).

    Constraints: the norm is over the last dimension, has no weights of its own and no other reader; scale and shift
    are [B, 1, D], the same for all tokens of a sample.
    """

    name: ClassVar[str] = "modulate"

    def match(self, node: fx.Node) -> ModulatedNorm | NearMiss | None:
        """An addition to a product of a norm."""
        found = _modulated(node)
        if found is None:
            return None
        norm, product, scale, shift = found
        x, sizes, *rest = norm.args
        options = dict(zip(("weight", "bias", "eps"), rest, strict=False)) | norm.kwargs
        if options.get("weight") is not None or options.get("bias") is not None:
            return NearMiss("the norm has weights of its own")
        if len(norm.users) > 1 or len(product.users) > 1:
            return NearMiss("another operator reads the norm, or its product with the scale")
        shape = norm.meta["shape"]
        wanted = (shape[0], 1, shape[-1])
        if len(shape) != 3 or len(sizes) != 1 or any(tuple(v.meta["shape"]) != wanted for v in (scale, shift)):  # type: ignore[arg-type]
            return NearMiss("scale and shift are not one row for each sample, [B, 1, D]")
        return ModulatedNorm(x, scale, shift, options.get("eps", EPSILON))  # type: ignore[arg-type]

    def rewrite(self, graph: fx.Graph, node: fx.Node, match: ModulatedNorm) -> fx.Node:
        """One `stepfold::modulated_norm`."""
        arguments = (match.x, match.scale, match.shift, match.epsilon)
        return graph.call_function(torch.ops.stepfold.modulated_norm.default, arguments)


def _modulated(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node] | None:
    """Norm, product, scale and shift of `norm * scale + shift`, the factors and the terms in either order."""
    for product, shift in two(node, aten.add.Tensor):
        for norm, scale in two(product, aten.mul.Tensor):
            if norm.target is aten.layer_norm.default:
                return norm, product, scale, shift
    return None
