"""SmoothQuant: move activation outliers into weights where a scale can be folded away (Q2, folds F1 and F2).

For a value x that only linear layers read, `x -> x / s` and `W -> W diag(s)` with `s = a^alpha / w^(1 - alpha)`, a the
largest magnitude of each input channel over the real loop and w that of the weights that read it. The division is
exact and free where x = norm(.) * scale + shift: scale and shift are divided instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from ...ir.edit import add_buffer, copy_graph, finish
from ...ir.program import Program, Refusal, Stage, attribute
from .algebra.smoothing import exponent_scale

aten = torch.ops.aten
LINEAR = aten.linear.default


def smoothing_scale(activation: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """The scale of each input channel.

    Args:
        activation: [M] largest magnitude of each channel.
        weight: [N, M] the stacked weights of every layer that reads it.
        alpha: 0 keeps the difficulty in the activations, 1 moves all of it into the weights.

    Returns:
        [M], with geometric mean 1; 1 where a channel is never used.
    """
    return exponent_scale(activation, weight, alpha, 1 - alpha)


def smooth(
    program: Program, groups: Mapping[fx.Node, Sequence[fx.Node]], largest: Mapping[fx.Node, torch.Tensor], alpha: float
) -> tuple[Program, dict[fx.Node, torch.Tensor], list[Refusal]]:
    """Smooth every value whose producer is a modulation.

    Args:
        program: whose step stage holds the nodes.
        groups: value -> the linear layers that read it.
        largest: value -> [M] largest magnitude of each channel.
        alpha: see `smoothing_scale`.

    Returns:
        The program, the scale [M] of each smoothed value, and the values where no exact fold exists.
    """
    stage = program.step
    graph, refused, scales = copy_graph(stage), list[Refusal](), dict[fx.Node, torch.Tensor]()
    twins = dict(zip(stage.graph.graph.nodes, graph.graph.nodes, strict=True))
    divided: dict[str, torch.Tensor] = {}
    given = _program_inputs(program)
    for value, layers in groups.items():
        name = str(layers[0].name)
        operands = _modulation(value)
        if operands is None:
            refused.append(Refusal(name, "smoothing: its input is not a modulation norm(x) * scale + shift"))
            continue
        if set(value.users) != set(layers):
            refused.append(Refusal(name, "smoothing: another operator reads its input"))
            continue
        weights = torch.cat([attribute(graph, str(layer.args[1].target)).detach() for layer in layers])  # type: ignore[union-attr]
        scale = scales[value] = smoothing_scale(largest[value], weights, alpha)
        for operand, reader in operands:
            _divide(graph, twins[operand], twins[reader], scale, None if operand.name in given else divided)
        for layer in layers:
            _multiply_weight(graph, twins[layer], scale)
    return _divide_at_source(program.with_stage(finish(stage, graph)), divided), scales, refused


def _modulation(value: fx.Node) -> list[tuple[fx.Node, fx.Node]] | None:
    """scale and shift of `norm * scale + shift`, each with the operator that reads it, or None."""
    if value.target is not aten.add.Tensor or not all(isinstance(a, fx.Node) for a in value.args[:2]):
        return None
    for product, shift in (value.args[:2], value.args[1::-1]):
        if product.target is not aten.mul.Tensor or len(product.users) != 1:  # type: ignore[union-attr]
            continue
        for norm, scale in (product.args[:2], product.args[1::-1]):  # type: ignore[union-attr]
            if isinstance(norm, fx.Node) and "norm" in str(norm.target) and _is_vector(scale) and _is_vector(shift):
                return [(scale, product), (shift, value)]  # type: ignore[list-item]
    return None


def _is_vector(node: object) -> bool:
    """Whether a value is one vector a sample: [B, 1, D] or [B, D]."""
    return isinstance(node, fx.Node) and all(size == 1 for size in node.meta["shape"][1:-1])


def _divide(
    graph: fx.GraphModule,
    operand: fx.Node,
    reader: fx.Node,
    scale: torch.Tensor,
    divided: dict[str, torch.Tensor] | None,
) -> None:
    """Divide a vector by the scale: where it is computed when it is a stage input read once, else here."""
    if divided is not None and operand.op == "placeholder" and len(operand.users) == 1:
        divided[operand.name] = scale
        return
    with graph.graph.inserting_before(reader):
        buffer = graph.graph.get_attr(add_buffer(graph, f"{operand.name}.smooth", 1 / scale))
        quotient = graph.graph.call_function(aten.mul.Tensor, (operand, buffer))
    reader.replace_input_with(operand, quotient)


def _program_inputs(program: Program) -> set[str]:
    """Names of the nodes of the step stage that the caller supplies: nothing computes them, so nothing can divide."""
    names = {i.name for i in program.inputs}
    placeholders = [node for node in program.step.graph.graph.nodes if node.op == "placeholder"]
    return {node.name for node, port in zip(placeholders, program.step.inputs, strict=True) if port.name in names}


def _multiply_weight(graph: fx.GraphModule, layer: fx.Node, scale: torch.Tensor) -> None:
    weight = attribute(graph, str(layer.args[1].target)).detach()  # type: ignore[union-attr]
    with graph.graph.inserting_before(layer):
        node = graph.graph.get_attr(add_buffer(graph, f"{layer.name}.smoothed", weight * scale))
    layer.update_arg(1, node)


def _divide_at_source(program: Program, divided: Mapping[str, torch.Tensor]) -> Program:
    """Divide hoisted values in the stages that compute them: in their stage or their table; exact, and free at every step."""
    placeholders = [node.name for node in program.step.graph.graph.nodes if node.op == "placeholder"]
    by_port = {
        port.name: divided[name]
        for name, port in zip(placeholders, program.step.inputs, strict=True)
        if name in divided
    }
    tables = {
        name: value / by_port[name].numpy() if name in by_port else value for name, value in program.tables.items()
    }
    program = replace(program, tables=tables)
    for stage in program.stages:
        targets = {port.name: by_port[port.name] for port in stage.outputs if port.name in by_port}
        if targets:
            program = program.with_stage(_divide_outputs(stage, targets))
    return program


def _divide_outputs(stage: Stage, targets: Mapping[str, torch.Tensor]) -> Stage:
    graph = copy_graph(stage)
    output = graph.graph.output_node()
    values = list(output.args[0])  # type: ignore[arg-type]
    for i, port in enumerate(stage.outputs):
        if port.name in targets:
            with graph.graph.inserting_before(output):
                buffer = graph.graph.get_attr(add_buffer(graph, f"{port.name}.smooth", 1 / targets[port.name]))
                values[i] = graph.graph.call_function(aten.mul.Tensor, (values[i], buffer))
    output.args = (tuple(values),)
    return finish(stage, graph)
