"""Names of nodes that survive passes."""

from __future__ import annotations

from torch import fx


def module_path(node: fx.Node) -> str:
    """The module a node belongs to, or its own name."""
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    return modules[-1][0] if modules and modules[-1][0] else node.name
