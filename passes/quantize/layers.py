"""Which linear layers are quantized, and which of them read the same value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import fx

from ...ir.analysis.sites.walk import rearranges
from ...ir.names import module_path
from ...ir.program import Program, Refusal, Stage, attribute
from ...loop.errors import UsageError
from ...loop.ports import Rate
from ..marks import made

LINEAR = torch.ops.aten.linear.default

BRANCH = "stepfold_branch"
"""Key of the metadata of layers that a quantization added."""


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """A linear layer of a stage.

    Attributes:
        node: node that calls it.
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
        """The node of the first layer by name, which copies of the graph and the stages of a cut keep."""
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

    def refuses(self, name: str) -> str | None:
        """Why the recipe leaves a layer of this name alone, or None."""
        if not any(fnmatchcase(name, pattern) for pattern in self.include):
            return "not included"
        return "skipped by the recipe" if any(fnmatchcase(name, pattern) for pattern in self.skip) else None


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


def groups_of(
    program: Program, selection: Selection, unfit: Callable[[LinearLayer], str | None]
) -> tuple[list[Group], list[Refusal]]:
    """The layers of the computing slots to quantize, in the order in which they run; see `find_groups`."""
    groups, refused = [], []
    for stage in program.steps:
        predicts = any(port.name in program.outputs for port in stage.outputs)
        found, left = find_groups(stage, replace(selection, predicts=predicts), unfit)
        groups, refused = [*groups, *found], [*refused, *left]
    return groups, refused


def named(groups: Iterable[Group]) -> list[str]:
    """The module paths of all layers."""
    return [layer.name for group in groups for layer in group.layers]


def require_matches(selection: Selection, stages: Iterable[Stage]) -> None:
    """Check that every pattern names a layer, because one that names none protects or quantizes nothing.

    Args:
        selection: what the recipe chooses.
        stages: those that the patterns may name layers of.

    Raises:
        UsageError: a pattern matches no linear layer, quantized ones included.
    """
    nodes = [node for stage in stages for node in stage.graph.graph.nodes]
    names = sorted({module_path(node) for node in nodes if node.target is LINEAR or made(node, "quantize")})
    for option, patterns in (("include", selection.include), ("skip", selection.skip)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = get_close_matches(pattern.replace("*", ""), names, n=3, cutoff=0.0)
                raise UsageError(
                    f"pass quantize: option {option!r}: expected patterns of linear layers of the model; received "
                    f"{pattern!r}, which matches none. The nearest layers: {', '.join(near)}."
                )


def quantized_layers(stage: Stage, selection: Selection) -> dict[str, str]:
    """The chosen layers of a stage that a pass has quantized before: module path -> in which way."""
    ways = [(module_path(node), made(node, "quantize")) for node in stage.graph.graph.nodes]
    return {name: way for name, way in ways if way is not None and selection.refuses(name) is None}


def mark_branch(node: fx.Node) -> fx.Node:
    """Say that a linear layer is part of a branch of low rank, which stays in full precision."""
    node.meta[BRANCH] = True
    return node


def _refusal(stage: Stage, node: fx.Node, name: str, selection: Selection) -> str | None:
    if node.meta.get(BRANCH):
        return "it is part of a branch in full precision"
    reason = selection.refuses(name)
    if reason is not None:
        return reason
    if made(node, "quantize") is not None:
        return "it is quantized already"
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return "its weight is computed, not stored"
    tokens = prod(size or 1 for size in node.args[0].meta["shape"][1:-1])  # type: ignore[union-attr]
    if stage.rate is Rate.STEP and tokens < selection.min_tokens:
        rows = "1 row" if tokens == 1 else f"{tokens} rows"
        return f"{rows} per sample: reading the weights dominates, not arithmetic"
    if selection.predicts and _feeds_output_only(node):
        return "the last layer: nothing after it damps its error"
    return None


def _feeds_output_only(node: fx.Node) -> bool:
    """Whether only layout operators stand between a layer and the prediction."""
    seen, stack = set(), [node]
    while stack:
        for user in stack.pop().users:
            if user.op == "output" or user in seen:
                continue
            if not rearranges(user):
                return False
            seen.add(user)
            stack.append(user)
    return True
