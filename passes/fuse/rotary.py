"""A rotary position embedding as one operator."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ...frontend.repairs.constants import LAYOUTS
from ...ir.edit import add_buffer
from ...ir.program import attribute
from ...ir.rewriting import Refused, Rewrite, two

aten = torch.ops.aten
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)
TABLE = "rotary_table"


@dataclass(frozen=True)
class Turned:
    """Bindings of either form: what is turned, its tables, and whether those have a row for each pair or two."""

    x: fx.Node
    cosine: fx.Node
    sine: fx.Node
    doubled: bool


@dataclass(frozen=True)
class Rotary(Turned):
    """Bindings with their layout: [B, H, T, K] where `heads_first`, else [B, T, H, K]."""

    heads_first: bool


class FuseRotary(Rewrite[Rotary]):
    """interleave(even * c - odd * s, even * s + odd * c) -> rotary(x, c, s), also as x * c + turn(x) * s.

    Constraints: even and odd are the neighbours of a pair of features of x; the tables are stored, [T, K / 2] beside
    dimensions of size 1, or [T, K] with the same value for both of a pair; x is [B, T, H, K] or [B, H, T, K].
    """

    name: ClassVar[str] = "rotary"
    roots: ClassVar[Collection[Any]] = (*RESHAPES, aten.add.Tensor)

    def match(self, node: fx.Node) -> Rotary | Refused | None:
        """The interleaved result, or the sum."""
        found = _by_pairs(node) or _by_quarter_turn(node)
        if found is None:
            return None
        if len(node.meta["shape"]) != 4:
            return Refused("what it turns is not [B, T, H, K] or [B, H, T, K]")
        if not (_is_stored(found.cosine) and _is_stored(found.sine)):
            return Refused("its tables are computed, not stored")
        layouts = [_heads_first(found.x, table) for table in (found.cosine, found.sine)]
        if layouts[0] is None or layouts[0] is not layouts[1]:
            return Refused("its tables differ between heads or samples")
        if found.doubled and not all(_is_doubled(_values(table)) for table in (found.cosine, found.sine)):
            return Refused("its tables differ within a pair of features")
        if any(value.meta["val"].dtype != node.meta["val"].dtype for value in (found.x, found.cosine, found.sine)):
            return Refused("its tables are of another type")
        return Rotary(found.x, found.cosine, found.sine, found.doubled, layouts[0])

    def rewrite(self, graph: fx.GraphModule, node: fx.Node, match: Rotary) -> fx.Node:
        """One `stepfold::rotary`; its tables are those of the graph, without what is doubled."""
        tables = (_table(graph, table, match.doubled) for table in (match.cosine, match.sine))
        return graph.graph.call_function(torch.ops.stepfold.rotary.default, (match.x, *tables, match.heads_first))


def _by_pairs(node: fx.Node) -> Turned | None:
    """interleave(even * c - odd * s, even * s + odd * c)."""
    parts = _interleaved(node)
    if parts is None:
        return None
    for left, right in two(parts[0], aten.sub.Tensor)[:1]:
        for even, cosine in two(left, aten.mul.Tensor):
            for odd, sine in two(right, aten.mul.Tensor):
                x = _of_pairs(even, odd)
                if x is not None and _is_imaginary(parts[1], (even, sine), (odd, cosine)):
                    return Turned(x, cosine, sine, doubled=False)
    return None


def _by_quarter_turn(node: fx.Node) -> Turned | None:
    """x * c + interleave(-odd, even) * s."""
    for left, right in two(node, aten.add.Tensor):
        for turned, sine in two(right, aten.mul.Tensor):
            parts = _interleaved(turned)
            if not parts or parts[0].target is not aten.neg.default:
                continue
            x = _of_pairs(parts[1], parts[0].args[0])  # type: ignore[arg-type]
            for source, cosine in two(left, aten.mul.Tensor):
                if source is x and x is not None:
                    return Turned(x, cosine, sine, doubled=True)
    return None


def _is_imaginary(node: fx.Node, *products: tuple[fx.Node, fx.Node]) -> bool:
    """Whether `node` adds products, each of a value and a table that reads the same weight."""
    wanted = {(value, _weight(table)) for value, table in products}
    for terms in two(node, aten.add.Tensor)[:1]:
        found = [{(a, _weight(b)) for a, b in two(term, aten.mul.Tensor)} & wanted for term in terms]
        return all(found) and found[0] | found[1] == wanted
    return False


def _weight(table: fx.Node) -> object:
    return table.target if table.op == "get_attr" else table


def _interleaved(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The even and the odd features that `node` interleaves along the last dimension."""
    stack = node.args[0] if node.target in RESHAPES else None
    if not isinstance(stack, fx.Node) or stack.target is not aten.stack.default:
        return None
    parts, dimension = stack.args[0], (*stack.args, 0)[1]
    shape = stack.meta["shape"]
    last = dimension in (-1, len(shape) - 1)
    if not last or shape[-1] != 2 or node.meta["shape"] != (*shape[:-2], 2 * shape[-2]):
        return None
    return tuple(parts)  # type: ignore[arg-type]


def _of_pairs(even: fx.Node, odd: fx.Node) -> fx.Node | None:
    """What two values are the even and the odd features of."""
    sources = [_part(value, i) for i, value in enumerate((even, odd))]
    return sources[0] if sources[0] is sources[1] else None


def _part(node: fx.Node, index: int) -> fx.Node | None:
    """What `node` takes every second feature of, from `index` on; None when it does something else."""
    if node.target is aten.slice.Tensor:
        source, dimension, start, end, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
        size = source.meta["shape"][-1]  # type: ignore[union-attr]
        whole = (isinstance(end, int) and end >= size) or end is None
        last = dimension in (-1, len(node.meta["shape"]) - 1)
        return source if last and whole and (start or 0, step) == (index, 2) else None  # type: ignore[return-value]
    pairs = None
    if node.target is aten.select.int and node.args[2] == index:
        pairs, dimension = node.args[:2]
    elif node.target is operator.getitem and node.args[1] == index and node.args[0].target is aten.unbind.int:  # type: ignore[union-attr]
        pairs, dimension = (*node.args[0].args, 0)[:2]  # type: ignore[union-attr]
    if not isinstance(pairs, fx.Node) or pairs.target not in RESHAPES:
        return None
    source = pairs.args[0]
    assert isinstance(source, fx.Node)
    shape, whole = pairs.meta["shape"], source.meta["shape"]
    in_last = dimension in (-1, len(shape) - 1) and shape[-1] == 2
    return source if in_last and whole == (*shape[:-2], 2 * shape[-2]) else None


def _heads_first(x: fx.Node, table: fx.Node) -> bool | None:
    """Which layout a table belongs to; None when it is not one row for each token."""
    wide = table.meta["val"].shape
    sizes, shape = (1,) * (4 - len(wide)) + tuple(wide), x.meta["shape"]
    for tokens in (1, 2):
        if sizes[:3] == tuple(shape[1] if i == tokens == 1 else shape[2] if i == tokens else 1 for i in range(3)):
            return tokens == 2
    return None


def _is_stored(table: fx.Node) -> bool:
    """Whether a table is a weight, or chosen and rearranged elements of one."""
    while table.target in LAYOUTS and len(table.all_input_nodes) == 1:
        (table,) = table.all_input_nodes
    return table.op == "get_attr"


def _values(table: fx.Node) -> torch.Tensor:
    if table.op == "get_attr":
        assert table.graph.owning_module is not None
        return attribute(table.graph.owning_module, str(table.target)).detach()
    source = table.args[0]
    assert isinstance(source, fx.Node)
    return table.target(_values(source), *table.args[1:])  # type: ignore[operator]


def _is_doubled(values: torch.Tensor) -> bool:
    return torch.equal(values[..., 0::2], values[..., 1::2])


def _table(graph: fx.GraphModule, table: fx.Node, doubled: bool) -> fx.Node:
    """The stored table [T, K / 2]; equal ones are one weight."""
    values = _values(table)
    rows = (values[..., 0::2] if doubled else values).reshape(-1, values.shape[-1] // (2 if doubled else 1))
    for name, held in graph.named_buffers():
        if name.startswith(TABLE) and torch.equal(held, rows):
            return graph.graph.get_attr(name)
    return graph.graph.get_attr(add_buffer(graph, TABLE, rows.contiguous()))
