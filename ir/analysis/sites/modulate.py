"""Modulate sites: norm(x) (1 + scale) + shift."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from .site import Found, NearMiss, Site
from .walk import LAYOUT, NORMS, constant_values, module_path, sorter

aten = torch.ops.aten
ADDS = frozenset({aten.add.Tensor, aten.add.Scalar})
CASTS = frozenset({aten.to.dtype, aten._to_copy.default})


def find_modulate(graph: fx.Graph) -> Found:
    """norm(x) (1 + scale) + shift, where scale and shift are values, not weights.

    `parts` holds `norm`, `scale` (before 1 is added), `shift` and `result`.
    """
    constants = constant_values(graph)
    ordered = sorter(graph)
    sites, misses = [], []
    for norm in graph.nodes:
        if norm.target not in NORMS:
            continue
        for product in _products(norm):
            factor = _other(product, norm)
            if factor is None or factor in constants:
                continue
            plus_one, scale = _plus_one(factor)
            shifted = next((user for user in product.users if user.target in ADDS), None)
            shift = None if shifted is None else _other(shifted, product)
            missing = "" if plus_one else "(1 + scale): the factor is not one plus a value"
            missing = missing or ("" if shift is not None else "a shift: nothing is added to the product")
            if missing:
                misses.append(NearMiss("modulate", module_path(norm), product, missing))
                continue
            assert scale is not None and shift is not None and shifted is not None
            parts = {"norm": (norm,), "scale": (scale,), "shift": (shift,), "result": (shifted,)}
            nodes = {norm, product, shifted, plus_one, *_between(factor, plus_one)} - {None}
            sites.append(Site("modulate", module_path(norm), ordered(n for n in nodes if n is not None), parts))
    return Found(tuple(sites), tuple(misses))


def _products(norm: fx.Node) -> list[fx.Node]:
    """Multiplications that read a norm, through casts."""
    found, stack = [], list(norm.users)
    while stack:
        user = stack.pop()
        if user.target in CASTS:
            stack.extend(user.users)
        elif user.target is aten.mul.Tensor:
            found.append(user)
    return found


def _other(node: fx.Node, known: fx.Node) -> fx.Node | None:
    """The tensor argument of a binary operator that does not come from `known`."""
    values = [argument for argument in node.args[:2] if isinstance(argument, fx.Node)]
    others = [
        value for value in values if value is not known and not (value.target in CASTS and value.args[0] is known)
    ]
    return others[0] if len(values) == 2 and others else None


def _plus_one(factor: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The addition of 1 after layout operators, and what it is added to."""
    node = factor
    while node.target in LAYOUT and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if node.target not in ADDS:
        return None, None
    values: Collection[object] = node.args[:2]
    ones = [value for value in values if isinstance(value, int | float) and value == 1]
    scales = [value for value in values if isinstance(value, fx.Node)]
    return (node, scales[0]) if ones and scales else (None, None)


def _between(factor: fx.Node, end: fx.Node | None) -> list[fx.Node]:
    """Layout operators from a factor back to the addition of 1."""
    found, node = [], factor
    while node is not end and isinstance(node.args[0], fx.Node):
        found.append(node)
        node = node.args[0]
    return found
