"""Attention with its head split and merge as one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from .rules import NearMiss, Rule

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class HeadedAttention:
    """Bindings: the three values before their head split, [B, T, D] or [B, T, H, K], the heads and the scale."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    heads: int
    scale: float | None


class FuseAttention(Rule[HeadedAttention]):
    """merge(sdpa(split(q), split(k), split(v))) -> attention(q, k, v, heads).

    Constraints: no mask, not causal, no dropout, the same number of heads for query and key; `split` is a transpose of
    [B, T, H, K], with the reshape to it if there is one, `merge` its inverse.
    """

    name: ClassVar[str] = "attention"

    def match(self, node: fx.Node) -> HeadedAttention | NearMiss | None:
        """A reshape to [B, T, D] of a transposed attention."""
        if node.target is SDPA and not _is_merged(node):
            return NearMiss("its output is not a plain head merge")
        attention = _merged_attention(node)
        if attention is None:
            return None
        query, key, value, *rest = attention.args
        options = dict(zip(("attn_mask", "dropout_p", "is_causal"), rest, strict=False)) | attention.kwargs
        if options.get("attn_mask") is not None:
            return NearMiss("it has a mask")
        if options.get("is_causal") or options.get("dropout_p"):
            return NearMiss("it is causal or has dropout")
        sources = [_before_split(argument) for argument in (query, key, value)]
        if None in sources:
            return NearMiss("query, key or value is not a plain head split")
        heads = {argument.meta["shape"][1] for argument in (query, key, value)}  # type: ignore[union-attr]
        if len(heads) != 1 or not isinstance(next(iter(heads)), int):
            return NearMiss("query, key and value have different numbers of heads")
        q, k, v = sources
        return HeadedAttention(q, k, v, next(iter(heads)), options.get("scale"))  # type: ignore[arg-type]

    def rewrite(self, graph: fx.Graph, node: fx.Node, match: HeadedAttention) -> fx.Node:
        """One `stepfold::attention`."""
        shape = match.query.meta["val"].shape
        width = shape[-1] if len(shape) == 4 else shape[-1] // match.heads
        scale = match.scale if match.scale is not None else width**-0.5
        values = (_merged(graph, value) for value in (match.query, match.key, match.value))
        return graph.call_function(torch.ops.stepfold.attention.default, (*values, match.heads, scale))


def _merged(graph: fx.Graph, value: fx.Node) -> fx.Node:
    """[B, T, D] of a value that may be [B, T, H, K], which moves nothing."""
    return graph.call_function(aten.flatten.using_ints, (value, 2)) if len(value.meta["val"].shape) == 4 else value


def _merged_attention(node: fx.Node) -> fx.Node | None:
    """The attention whose transposed output `node` reshapes to [B, T, D], if that is what it does."""
    if node.target not in RESHAPES or len(node.meta["shape"]) != 3:
        return None
    attention = _swapped(_skip_copies(node.args[0]))
    if attention is None or attention.target is not SDPA:
        return None
    T, D = node.meta["shape"][1:]
    _, H, queries, K = attention.meta["shape"]
    return attention if (T, D) == (queries, H * K) else None


def _is_merged(attention: fx.Node) -> bool:
    """Whether a reader of an attention, through copies and one swap, merges its heads."""
    readers = list(attention.users)
    for reader in readers:
        if reader.target is aten.clone.default or _swapped(reader) is attention:
            readers.extend(reader.users)
    return any(_merged_attention(reader) is attention for reader in readers)


def _before_split(node: object) -> fx.Node | None:
    """The value that is transposed to [B, H, T, K]: [B, T, D] where a reshape splits it, else [B, T, H, K]."""
    split = _swapped(_skip_copies(node))
    if split is None or split.target not in RESHAPES:
        return split
    source = split.args[0]
    assert isinstance(source, fx.Node)
    shape, wanted = source.meta["shape"], split.meta["shape"]
    whole = len(shape) == 3 and shape[:2] == wanted[:2] and shape[2] == wanted[2] * wanted[3]
    return source if whole else split


def _swapped(node: fx.Node) -> fx.Node | None:
    """What `node` swaps tokens and heads of, [B, T, H, K] <-> [B, H, T, K]; None when it does something else."""
    swaps = node.target is aten.transpose.int and {int(d) % 4 for d in node.args[1:]} == {1, 2}  # type: ignore[arg-type]
    swaps |= node.target is aten.permute.default and [d % 4 for d in node.args[1]] == [0, 2, 1, 3]  # type: ignore[union-attr]
    if not swaps or len(node.meta["shape"]) != 4:
        return None
    return _skip_copies(node.args[0])


def _skip_copies(node: object) -> fx.Node:
    assert isinstance(node, fx.Node)
    while node.target is aten.clone.default:
        (node, *_) = node.all_input_nodes
    return node
