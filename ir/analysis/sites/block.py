"""Blocks: the outermost repeated modules."""

from __future__ import annotations

from torch import fx

from .site import Found, Site


def find_blocks(*graphs: fx.Graph) -> Found:
    """Modules whose path ends in a number, of which a list holds several: `transformer_blocks.0`, `down_blocks.1`.

    Only the outermost ones count, and single layers of PyTorch are no blocks.

    Args:
        *graphs: graphs of one network, in the order in which they run.
    """
    members: dict[str, list[fx.Node]] = {}
    for node in [node for graph in graphs for node in graph.nodes]:
        path = _outermost(node)
        if path:
            members.setdefault(path, []).append(node)
    families: dict[str, int] = {}
    for path in members:
        family = path.rpartition(".")[0]
        families[family] = families.get(family, 0) + 1
    sites = [Site("block", p, tuple(nodes)) for p, nodes in members.items() if families[p.rpartition(".")[0]] > 1]
    return Found(tuple(sites))


def _outermost(node: fx.Node) -> str:
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__name__}"
        if path.rpartition(".")[2].isdigit() and not name.startswith("torch.nn."):
            return path
    return ""
