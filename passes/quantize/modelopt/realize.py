"""Linear layers as a quantizer decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from ....ir.names import module_path
from ....ir.program import Stage, attribute
from ....loop.errors import StepfoldError
from ..layers import LINEAR, Group, LinearLayer
from ..realize import BlockedProducts, IntegerProducts, Realization, Reconstructed, StaticActivation
from ..rewrite import replaced_in
from .operands import IntegerOperands, blocked_weight, fp8_operands, integer_operands
from .read import LinearDecision
from .run import Mode


def realize(stage: Stage, decisions: Mapping[str, LinearDecision]) -> Stage:
    """The stage with every decided layer in integers; layers that read one value with one scale share its quantization.

    linear(x, W) + b -> s_x s_W (q(x) - z) W_q + b

    Args:
        stage: stage with float linear layers.
        decisions: decisions by the name of the linear node.

    Raises:
        StepfoldError: a decision is not 8-bit integers, or names no linear layer of the stage.
    """
    layers = {node.name: node for node in stage.graph.graph.nodes if node.target is LINEAR}
    unknown = sorted(decisions.keys() - layers.keys())
    if unknown:
        raise StepfoldError(f"stage {stage.name}: expected decisions for its linear layers; received {unknown[0]!r}.")
    alike: dict[tuple[fx.Node, float, int], list[tuple[LinearLayer, IntegerOperands]]] = {}
    for name, node in layers.items():
        if name in decisions:
            operands = integer_operands(name, decisions[name])
            key = (node.args[0], float(operands.scale), int(operands.zero))
            alike.setdefault(key, []).append((_layer(stage, node), operands))  # type: ignore[arg-type]
    groups = [Group(tuple(layer for layer, _ in members)) for members in alike.values()]
    return replaced_in(stage, groups, [products([o for _, o in members]) for members in alike.values()])[0]


def products(operands: Sequence[IntegerOperands]) -> IntegerProducts:
    """What takes the place of layers whose inputs have one scale and zero point."""
    activation = StaticActivation(operands[0].scale, operands[0].zero)
    return IntegerProducts(activation, [(o.weight, o.weight_scale) for o in operands])


def realization(mode: Mode, decisions: Sequence[tuple[str, LinearDecision]]) -> Realization:
    """What takes the place of the layers that read one value.

    Args:
        mode: mode that modelopt decided in.
        decisions: the name and the decision of each layer.

    Raises:
        StepfoldError: a decision has another form than that of the mode, or gives their input different scales.
    """
    if mode == "int4":
        return BlockedProducts([blocked_weight(name, item) for name, item in decisions], False)
    _expect_one_scale(decisions)
    if mode == "int8":
        return products([integer_operands(name, item) for name, item in decisions])
    operands = [fp8_operands(name, item) for name, item in decisions]
    weights = [{"fp8": o.weight, "scale": o.weight_scale} for o in operands]
    round_input = (torch.ops.stepfold.round_fp8.default, operands[0].scale)
    return Reconstructed(torch.ops.stepfold.decode_fp8.default, weights, round_input)


def _expect_one_scale(decisions: Sequence[tuple[str, LinearDecision]]) -> None:
    scales = {(item.input.scale, item.input.zero) for _, item in decisions if item.input is not None}
    if len(scales) > 1:
        first, _ = decisions[0]
        raise StepfoldError(
            f"modelopt: expected one scale for the input of {first} and its neighbours; received {len(scales)}."
        )


def _layer(stage: Stage, node: fx.Node) -> LinearLayer:
    weight: torch.Tensor = attribute(stage.graph, str(node.args[1].target)).detach()  # type: ignore[union-attr]
    return LinearLayer(node, module_path(node), node.args[0], weight)  # type: ignore[arg-type]
