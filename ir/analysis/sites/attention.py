"""Attention sites: `scaled_dot_product_attention` with the linears that reach its query, key and value."""

from __future__ import annotations

import torch
from torch import fx

from .site import Found, NearMiss, Site
from .walk import ELEMENTWISE, LAYOUT, LINEAR, NORMS, cone, constant_values, described, module_path, readers, sorter

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
MATMULS = frozenset({aten.matmul.default, aten.bmm.default})
BETWEEN = LAYOUT | NORMS | ELEMENTWISE | {aten.mean.dim}
"""Layouts, norms whole or written out, and rotary embeddings."""
TABLES = frozenset({aten.cos.default, aten.sin.default})  # rotary tables computed from an input


def find_attention(graph: fx.Graph) -> Found:
    """q, k, v = rope(norm(reshape(linear(x)))); out = linear(reshape(sdpa(q, k, v))).

    Joint attention has several linears for each of them. `parts` holds `sdpa`, `q`, `k`, `v` and `out` (empty when
    the result reaches no linear directly).
    """
    constants = constant_values(graph)
    ordered = sorter(graph)
    sites, misses = [], []
    for node in graph.nodes:
        if node.target in SOFTMAX and _written_out(node):
            misses.append(
                NearMiss(
                    "attention",
                    module_path(node),
                    node,
                    "scaled_dot_product_attention: it is written out as matmul, softmax, matmul",
                )
            )
        if node.target is not SDPA:
            continue
        parts: dict[str, tuple[fx.Node, ...]] = {"sdpa": (node,)}
        nodes = {node}
        missing = ""
        for name, value in zip("qkv", node.args[:3], strict=True):
            found = cone(value, BETWEEN, constants)
            linears = [source for source in found.sources if source.target is LINEAR]
            others = [s for s in found.sources if s.target is not LINEAR and s.target not in TABLES]
            if not linears or others:
                origin = ", ".join(described(source) for source in others) or "a constant"
                missing = f"a linear that makes {name}: it comes from {origin}"
                break
            parts[name] = ordered(linears)
            nodes |= found.inner | set(linears)
        if missing:
            misses.append(NearMiss("attention", module_path(node), node, missing))
            continue
        after, passed = readers(node, LAYOUT)
        parts["out"] = ordered(reader for reader in after if reader.target is LINEAR)
        sites.append(Site("attention", module_path(node), ordered(nodes | passed | set(parts["out"])), parts))
    return Found(tuple(sites), tuple(misses))


def _written_out(softmax: fx.Node) -> bool:
    """Whether a softmax lies between two matrix products."""
    before = cone(softmax.args[0], BETWEEN, ()).sources
    after, _ = readers(softmax, LAYOUT)
    return any(n.target in MATMULS for n in before) and any(n.target in MATMULS for n in after)
