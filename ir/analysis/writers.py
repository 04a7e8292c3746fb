"""Which rows of which linear layer write the channels of a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from ..operators.block_sparse_attention import block_sparse_attention
from .sites.walk import LAYOUT, LINEAR

aten = torch.ops.aten
ATTENTIONS = (aten.scaled_dot_product_attention.default, block_sparse_attention.overload)
"""Each token of the result is a weighted mean of tokens of the third argument."""
CUTS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
TOKENS = -2


@dataclass(frozen=True, eq=False)
class Writer:
    """A linear layer whose outputs reach a value unmixed.

    Attributes:
        linear: its node.
        channels: [M] the output of the layer that each channel of the value comes from, all different.
    """

    linear: fx.Node
    channels: torch.Tensor

    def rows(self, scale: torch.Tensor) -> torch.Tensor:
        """A scale of the value's channels [M] as one of the layer's outputs [N], 1 where none is read."""
        N = self.linear.meta["val"].shape[-1]
        return torch.ones(N, dtype=scale.dtype).index_copy(0, self.channels, scale)


def find_writer(value: fx.Node) -> Writer | None:
    """The layer that writes a value through layouts, the value side of attention, and products; None without one.

    Everything on the way is read once, so that dividing the layer's outputs divides this value and no other.
    """
    path = _path(value)
    if path is None:
        return None
    linear = path[-1]
    numbers: Any = torch.arange(linear.meta["val"].shape[-1]).expand(linear.meta["val"].shape)
    for before, node in pairwise(reversed(path)):
        numbers = _passed(node, before, numbers)
        if numbers is None:
            return None
    channels = numbers.reshape(-1, numbers.shape[-1])
    if (channels != channels[0]).any() or channels[0].unique().numel() != channels.shape[1]:
        return None
    return Writer(linear, channels[0].clone())


@dataclass(frozen=True, eq=False)
class Heads:
    """The value side of an attention whose result is a value, head by head.

    Attributes:
        linear: the value projection.
        rows: [H, K] the outputs of the projection that each head consists of.
        columns: [H, K] the channels of the result that they reach.
    """

    linear: fx.Node
    rows: torch.Tensor
    columns: torch.Tensor

    def spread(self, matrix: torch.Tensor) -> torch.Tensor:
        """[M, M] that acts on the channels of each head as the matrix [K, K] does."""
        M = self.columns.numel()
        whole = torch.zeros(M, M, dtype=matrix.dtype)
        for columns in self.columns:
            whole[columns[:, None], columns[None, :]] = matrix
        return whole


def find_heads(value: fx.Node) -> Heads | None:
    """The heads of the attention whose result a value is; None where anything but layouts lies around it."""
    writer, path = find_writer(value), _path(value)
    if writer is None or path is None or not _is_attention(path):
        return None
    numbers: Any = torch.arange(writer.linear.meta["val"].shape[-1]).expand(writer.linear.meta["val"].shape)
    for before, node in pairwise(reversed(path)):
        if node.target in ATTENTIONS:
            break
        numbers = _passed(node, before, numbers)
    rows = numbers[0, :, 0, :]  # [B, H, T, K]
    if numbers.ndim != 4 or (numbers != rows[None, :, None, :]).any() or rows.numel() != writer.channels.numel():
        return None
    places = torch.full((writer.linear.meta["val"].shape[-1],), -1)
    places[writer.channels] = torch.arange(writer.channels.numel())
    columns = places[rows]
    return None if (columns < 0).any() else Heads(writer.linear, rows.clone(), columns)


def _is_attention(path: Sequence[fx.Node]) -> bool:
    """Whether a path leads through layouts and one attention to a linear layer."""
    targets = [node.target for node in path if node.target not in LAYOUT]
    return len(targets) == 2 and targets[0] in ATTENTIONS and targets[1] is LINEAR


def _path(value: fx.Node) -> list[fx.Node] | None:
    """From the value up to a stored linear layer, every node but the value read once."""
    if value.target is LINEAR:
        weight = value.args[1]
        return [value] if isinstance(weight, fx.Node) and weight.op == "get_attr" else None
    for source in _sources(value):
        if isinstance(source, fx.Node) and (len(source.users) == 1 or _cuts_channels(source)):
            found = _path(source)
            if found is not None:
                return [value, *found]
    return None


def _cuts_channels(node: fx.Node) -> bool:
    """Whether a node cuts a value into runs of channels: each of them is written by outputs of its own."""
    if node.target not in CUTS:
        return False
    dimension = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    return dimension in (-1, node.args[0].meta["val"].ndim - 1)  # type: ignore[union-attr]


def _sources(node: fx.Node) -> tuple[object, ...]:
    """The values whose channels a node passes on."""
    if node.target in ATTENTIONS:
        return () if node.kwargs.get("enable_gqa") else (node.args[2],)
    if node.target is aten.mul.Tensor:
        return node.args[:2]
    return node.args[:1] if node.op == "call_function" and node.target in LAYOUT else ()


def _passed(node: fx.Node, before: fx.Node, numbers: Any) -> Any:
    """The numbers of the channels of a node, one tensor or those of its parts; None where it needs more."""
    if node.target in ATTENTIONS:
        queries = node.meta["val"].shape[TOKENS]
        return numbers.narrow(TOKENS, 0, 1).expand(*numbers.shape[:TOKENS], queries, numbers.shape[-1])
    if node.target is aten.mul.Tensor:
        return numbers.expand(node.meta["val"].shape)
    arguments = fx.map_arg(node.args, lambda n: numbers if n is before else n.meta["val"])
    if any(isinstance(argument, torch.Tensor) and argument is not numbers for argument in arguments):  # type: ignore[union-attr]
        return None
    return node.target(*arguments, **node.kwargs)  # type: ignore[operator]
