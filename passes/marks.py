"""Marks on nodes that say which pass made them, and how; copies of a graph keep them."""

from __future__ import annotations

from typing import Literal

from torch import fx

Owner = Literal["attend", "fuse", "quantize"]


def key_of(owner: Owner) -> str:
    """The key of the metadata that holds the mark of a pass."""
    return f"stepfold_{owner}"


def mark(node: fx.Node, owner: Owner, way: str) -> fx.Node:
    """Say that a pass made a node, and how: the rule of a fusion, the scheme of a quantization with its options."""
    node.meta[key_of(owner)] = way
    return node


def made(node: fx.Node, owner: Owner) -> str | None:
    """How a pass made a node; None for one that it did not make."""
    return node.meta.get(key_of(owner))
