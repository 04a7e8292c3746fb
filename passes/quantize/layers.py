"""Which linear layers are quantized, and which of them read the same value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from math import prod

import torch
from torch import fx

from ...ir.names import module_path
from ...ir.program import Refusal, Stage, attribute
from ...loop.ports import Rate

LINEAR = torch.ops.aten.linear.default
LAYOUT = ("view", "reshape", "permute", "transpose", "einsum", "clone", "_unsafe_view", "slice", "split", "getitem")
"""Names of operators that only rearrange elements."""


BRANCH = "stepfold_branch"
"""Key of the metadata of layers that a quantization added."""


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """A linear layer of a stage.

    Attributes:
        node: that calls it.
        name: its module path.
        source: the value it reads [..., M].
        weight: [N, M].
    """

    node: fx.Node
    name: str
    source: fx.Node
    weight: torch.Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """The layers that read one value: they share how it is scaled and rounded."""

    layers: tuple[LinearLayer, ...]

    @property
    def source(self) -> fx.Node:
        """The value all of them read."""
        return self.layers[0].source

    @property
    def name(self) -> str:
        """The module path of the first."""
        return self.layers[0].name

    @property
    def key(self) -> str:
        """The node of the first layer by name, which copies of the graph keep."""
        return self.layers[0].node.name

    @property
    def weight(self) -> torch.Tensor:
        """[N, M] all weights stacked."""
        return torch.cat([layer.weight for layer in self.layers])


@dataclass(frozen=True)
class Selection:
    """What a recipe chooses.

    Attributes:
        include: module patterns to quantize.
        skip: module patterns to leave alone.
        min_tokens: fewest rows of a sample.
        predicts: whether the outputs of the stage are those of the program, so that its last layer is left alone.
    """

    include: Sequence[str]
    skip: Sequence[str]
    min_tokens: int
    predicts: bool = True


def find_groups(
    stage: Stage, selection: Selection, unfit: Callable[[LinearLayer], str | None]
) -> tuple[list[Group], list[Refusal]]:
    """The layers to quantize, in graph order, and every other one with the reason.

    Args:
        stage: where to look.
        selection: what the recipe chooses.
        unfit: why the scheme cannot quantize a layer, or None.
    """
    accepted: dict[fx.Node, list[LinearLayer]] = {}
    refused = []
    for node in stage.graph.graph.find_nodes(op="call_function", target=LINEAR):
        name = module_path(node)
        reason = _refusal(stage, node, name, selection)
        if reason is None:
            layer = LinearLayer(node, name, node.args[0], attribute(stage.graph, str(node.args[1].target)).detach())
            reason = unfit(layer)
            if reason is None:
                accepted.setdefault(layer.source, []).append(layer)
        if reason is not None:
            refused.append(Refusal(name, reason))
    return [Group(tuple(layers)) for layers in accepted.values()], refused


def named(groups: Iterable[Group]) -> list[str]:
    """The module paths of all layers."""
    return [layer.name for group in groups for layer in group.layers]


def mark_branch(node: fx.Node) -> fx.Node:
    """Say that a linear layer is part of a branch of low rank, which stays in full precision."""
    node.meta[BRANCH] = True
    return node


def _refusal(stage: Stage, node: fx.Node, name: str, selection: Selection) -> str | None:
    if node.meta.get(BRANCH):
        return "it is part of a branch in full precision"
    if not any(fnmatch(name, pattern) for pattern in selection.include):
        return "not included"
    if any(fnmatch(name, pattern) for pattern in selection.skip):
        return "skipped by the recipe"
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return "its weight is computed, not stored"
    tokens = prod(size or 1 for size in node.args[0].meta["shape"][1:-1])  # type: ignore[union-attr]
    if stage.rate is Rate.STEP and tokens < selection.min_tokens:
        return f"{tokens} row a sample: weights dominate, not arithmetic"
    if selection.predicts and _feeds_output_only(node):
        return "the last layer: its error is not damped by anything behind it"
    return None


def _feeds_output_only(node: fx.Node) -> bool:
    """Whether only layout operators stand between a layer and the prediction."""
    seen, stack = set(), [node]
    while stack:
        for user in stack.pop().users:
            if user.op == "output" or user in seen:
                continue
            if not any(str(user.target).removeprefix("aten.").startswith(name) for name in LAYOUT):
                return False
            seen.add(user)
            stack.append(user)
    return True
