"""Attention with its head split and merge as one operator."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ...ir.rewriting import Refused, Rewrite
from .heads import TokensFirst, skip_copies, swapped

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class HeadedAttention:
    """Bindings: the three values [B, H, T, K] and how to write them with tokens first, the heads and the scale."""

    values: tuple[fx.Node, fx.Node, fx.Node]
    tokens_first: TokensFirst
    heads: int
    scale: float | None


class FuseAttention(Rewrite[HeadedAttention]):
    """merge(sdpa(split(q), split(k), split(v))) -> attention(q, k, v, heads).

    Constraints: no mask, not causal, no dropout, the same number of heads for query and key; `split` is a reshape to
    [B, T, H, K] and a transpose, `merge` its inverse. What works on each head or joins tokens, in front of the
    transpose or after it, may stand between.
    """

    name: ClassVar[str] = "attention"
    roots: ClassVar[Collection[Any]] = (*RESHAPES, SDPA)

    def match(self, node: fx.Node) -> HeadedAttention | Refused | None:
        """A reshape to [B, T, D] of a transposed attention."""
        if node.target is SDPA and not _is_merged(node):
            return Refused("its output is not a plain head merge")
        attention = _merged_attention(node)
        if attention is None:
            return None
        query, key, value, *rest = attention.args
        options = dict(zip(("attn_mask", "dropout_p", "is_causal"), rest, strict=False)) | attention.kwargs
        if options.get("attn_mask") is not None:
            return Refused("it has a mask", attention)
        if options.get("is_causal") or options.get("dropout_p"):
            return Refused("it is causal or has dropout", attention)
        values = (query, key, value)
        tokens_first = TokensFirst(attention)
        if not tokens_first.possible(*values):  # type: ignore[arg-type]
            return Refused("query, key or value is not a plain head split", attention)
        heads = {argument.meta["shape"][1] for argument in values}  # type: ignore[union-attr]
        if len(heads) != 1 or not isinstance(next(iter(heads)), int):
            return Refused("query, key and value have different numbers of heads", attention)
        return HeadedAttention(values, tokens_first, next(iter(heads)), options.get("scale"))  # type: ignore[arg-type]

    def rewrite(self, graph: fx.GraphModule, node: fx.Node, match: HeadedAttention) -> fx.Node:
        """One `stepfold::attention`."""
        width = match.values[0].meta["val"].shape[-1]
        scale = match.scale if match.scale is not None else width**-0.5
        values = [_merged(graph.graph, match.tokens_first.write(graph.graph, value)) for value in match.values]
        return graph.graph.call_function(torch.ops.stepfold.attention.default, (*values, match.heads, scale))


def _merged(graph: fx.Graph, value: fx.Node) -> fx.Node:
    """[B, T, D] of a value [B, T, H, K], which moves nothing."""
    source = _source(value)
    return source if source is not value else graph.call_function(aten.flatten.using_ints, (value, 2))


def _merged_attention(node: fx.Node) -> fx.Node | None:
    """The attention whose transposed output `node` reshapes to [B, T, D], if that is what it does."""
    if node.target not in RESHAPES or len(node.meta["shape"]) != 3:
        return None
    attention = swapped(skip_copies(node.args[0]))
    if attention is None or attention.target is not SDPA:
        return None
    T, D = node.meta["shape"][1:]
    _, H, queries, K = attention.meta["shape"]
    return attention if (T, D) == (queries, H * K) else None


def _is_merged(attention: fx.Node) -> bool:
    """Whether a reader of an attention, through copies and one swap, merges its heads."""
    readers = list(attention.users)
    for reader in readers:
        if reader.target is aten.clone.default or swapped(reader) is attention:
            readers.extend(reader.users)
    return any(_merged_attention(reader) is attention for reader in readers)


def _source(split: fx.Node) -> fx.Node:
    """The [B, T, D] value that is reshaped to `split`, or `split` itself, [B, T, H, K]."""
    source = split.args[0] if split.target in RESHAPES else None
    if not isinstance(source, fx.Node):
        return split
    shape, wanted = source.meta["shape"], split.meta["shape"]
    whole = len(shape) == 3 and shape[:2] == wanted[:2] and shape[2] == wanted[2] * wanted[3]
    return source if whole else split
