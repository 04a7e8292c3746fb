"""Feed-forward sites: linear, activation, linear on tokens, gated forms included."""

from __future__ import annotations

from torch import fx

from .site import Found, NearMiss, Site
from .walk import ACTIVATIONS, ELEMENTWISE, LAYOUT, LINEAR, cone, constant_values, described, module_path, sorter

THROUGH = LAYOUT | ELEMENTWISE | ACTIVATIONS
TOKEN_RANK = 3  # [B, T, D]; an embedding of the timestep [B, D] has the same form and is no site


def find_feed_forward(graph: fx.Graph) -> Found:
    """down(act(up(x))), GEGLU down(h act(g)) with h, g = split(up(x)), and SwiGLU down(up(x) act(gate(x))).

    The activation may be written out. `parts` holds `up` (one linear, or two that read the same value), `activation`
    and `down`.
    """
    constants = constant_values(graph)
    ordered = sorter(graph)
    sites, misses = [], []
    for down in graph.find_nodes(op="call_function", target=LINEAR):
        if len(down.meta["val"].shape) < TOKEN_RANK:
            continue
        found = cone(down.args[0], THROUGH, constants)
        activation = [node for node in found.inner if node.target in ACTIVATIONS]
        up = [source for source in found.sources if source.target is LINEAR]
        if not activation or not up:
            continue
        missing = _missing(found.sources, up)
        name = _common_path([*up, down])
        if missing:
            misses.append(NearMiss("feed_forward", name, down, missing))
            continue
        parts = {"up": ordered(up), "activation": ordered(activation), "down": (down,)}
        sites.append(Site("feed_forward", name, ordered({*up, *found.inner, down}), parts))
    return Found(tuple(sites), tuple(misses))


def _missing(sources: list[fx.Node], up: list[fx.Node]) -> str:
    others = [source for source in sources if source not in up]
    if others:
        return f"a second linear that reads the activation alone: it reads {described(others[0])} too"
    if len(up) > 2:
        return f"one or two linears before the activation: there are {len(up)}"
    if any(linear.args[0] is not up[0].args[0] for linear in up):
        return "one input of both linears before the activation: they read different values"
    return ""


def _common_path(nodes: list[fx.Node]) -> str:
    """The innermost module that holds all nodes."""
    paths = [module_path(node).split(".") for node in nodes]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
