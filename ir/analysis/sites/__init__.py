"""Sites by structure: where passes can act."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from ...program import Program, Stage
from .attention import find_attention
from .block import find_blocks
from .feed_forward import find_feed_forward
from .modulate import find_modulate
from .site import KINDS, Found, NearMiss, Site, Sites, unique_names
from .walk import LINEAR, module_path

__all__ = ["KINDS", "NearMiss", "Site", "Sites", "find_sites"]


def find_linears(graph: fx.Graph) -> Found:
    """Every `linear(x, weight, bias)`, named after its weight."""
    sites = []
    for node in graph.find_nodes(op="call_function", target=LINEAR):
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        path = str(weight.target).removesuffix(".weight") if weight.op == "get_attr" else module_path(node)
        sites.append(Site("linear", path, (node,), {"linear": (node,), "weight": (weight,)}))
    return Found(tuple(sites))


FINDERS = {
    "linear": find_linears,
    "attention": find_attention,
    "feed_forward": find_feed_forward,
    "modulate": find_modulate,
    "block": find_blocks,
}


def find_sites(where: Program | Stage) -> Sites:
    """Find the sites of a program, or of one stage.

    Each site carries its nodes, its named parts and a name; what is nearly a site is listed with what it lacks.
    """
    stages = where.stages if isinstance(where, Program) else (where,)
    found: dict[str, tuple[Site, ...]] = {}
    misses: list[NearMiss] = []
    for kind, finder in FINDERS.items():
        sites: list[Site] = []
        for stage in stages:
            result = finder(stage.graph.graph)
            sites += [replace(site, stage=stage.name) for site in result.sites]
            misses += [replace(miss, stage=stage.name) for miss in result.near_misses]
        found[kind] = unique_names(sites)
    return Sites(**found, near_misses=tuple(misses))
