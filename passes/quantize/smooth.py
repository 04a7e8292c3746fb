"""Divide what layers read by a scale for each channel, exactly: folds F1 to F3 of the method cards.

For a value x that only linear layers read, `x -> x / s` and `W -> W diag(s)` compute the same. The division costs nothing
where x is written by something linear in its channels:

- F1, `x = norm(.) * scale + shift`: scale and shift are divided, at the lower rate they are computed at (PTQ4DiT,
  arXiv 2405.16005, eq. 13);
- F2, x is the result of an attention: it mixes tokens and not channels, so the rows of the value projection are divided;
- F3, x = up(.) * activation(gate(.)): the rows of the linear half are divided.

Elsewhere one multiplication at run time does it, when a scheme is worth that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from ...ir.analysis.writers import find_writer
from ...ir.edit import Copies, add_buffer, copy_graph, finish, module_of
from ...ir.program import Program, Refusal, Stage, attribute
from .layers import Group

aten = torch.ops.aten


def smooth(
    program: Program,
    groups: Sequence[Group],
    scales: Mapping[str, torch.Tensor],
    at_run_time: Callable[[Group], bool] = lambda group: False,
    shared: bool = False,
) -> tuple[Program, set[str], list[Refusal]]:
    """Divide what groups read.

    Args:
        program: program of the groups.
        groups: layers that read one value.
        scales: key of a group -> positive scale [M]; groups without one are left alone.
        at_run_time: whether a multiplication may be inserted for a group that has no fold.
        shared: whether stages that are not in the program read what its stages read, which then stays as it is.

    Returns:
        The program, the keys of the groups that now read the divided value, and why the others do not.
    """
    fold = _Fold(program, at_run_time, shared)
    for group in groups:
        if group.key in scales:
            fold.divide(group, scales[group.key])
    return _divide_at_source(fold.copies.program(), fold.at_source), fold.done, fold.refused


class _Fold:
    """The edited copies of the computing slots."""

    def __init__(self, program: Program, at_run_time: Callable[[Group], bool], shared: bool):
        self.copies = Copies(program)
        self.at_run_time = at_run_time
        self.done: set[str] = set()
        self.refused: list[Refusal] = []
        self.at_source: dict[str, torch.Tensor] = {}
        self._twins = self.copies.twins
        self._ports = {
            node: port.name
            for stage in program.steps
            for node, port in zip(
                self.copies.graphs[stage.name].graph.find_nodes(op="placeholder"), stage.inputs, strict=True
            )
        }
        read = Counter(self._ports.values())
        given = set(read) if shared else {i.name for i in program.inputs}
        self._own = {name for name, stages in read.items() if stages == 1} - given

    def divide(self, group: Group, scale: torch.Tensor) -> None:
        """Divide what a group reads, or say why not."""
        value, layers = self._twins[group.source], [self._twins[layer.node] for layer in group.layers]
        alone = set(value.users) == set(layers)
        if alone and (operands := modulation(value)) is not None:
            for operand, reader in operands:
                self._divide_vector(operand, reader, scale)
        elif alone and (writer := find_writer(value)) is not None:
            self._divide_rows(writer.linear, writer.rows(scale))
        elif self.at_run_time(group):
            self._divide_value(value, layers, scale)
        else:
            reason = "its input has no exact place for a scale" if alone else "another operator reads its input"
            self.refused.append(Refusal(group.name, f"smoothing: {reason}"))
            return
        self.done.add(group.key)
        for layer in layers:
            self._set(layer, 1, attribute(module_of(layer), str(layer.args[1].target)).detach() * scale, "smoothed")  # type: ignore[union-attr]

    def _divide_vector(self, operand: fx.Node, reader: fx.Node, scale: torch.Tensor) -> None:
        """Divide a vector of a modulation: where it is computed when it is a stage input read once, else here."""
        port = self._ports.get(operand) if len(operand.users) == 1 else None
        if port in self._own:  # what the caller gives, nothing computes or can divide
            self.at_source[port] = scale
            return
        with reader.graph.inserting_before(reader):
            quotient = _divided(operand, scale)
        reader.replace_input_with(operand, quotient)

    def _divide_rows(self, linear: fx.Node, scale: torch.Tensor) -> None:
        """Divide the outputs of a linear layer by a scale [N]."""
        for at, shape in ((1, (-1, 1)), (2, (-1,))):
            if len(linear.args) > at and isinstance(linear.args[at], fx.Node):
                held = attribute(module_of(linear), str(linear.args[at].target)).detach()  # type: ignore[union-attr]
                self._set(linear, at, held / scale.reshape(shape), "divided")

    def _divide_value(self, value: fx.Node, layers: Sequence[fx.Node], scale: torch.Tensor) -> None:
        with value.graph.inserting_before(layers[0]):
            quotient = _divided(value, scale)
        for layer in layers:
            layer.update_arg(0, quotient)

    def _set(self, layer: fx.Node, at: int, tensor: torch.Tensor, what: str) -> None:
        with layer.graph.inserting_before(layer):
            held = layer.graph.get_attr(add_buffer(module_of(layer), f"{layer.name}.{what}", tensor))
        layer.update_arg(at, held)


def _divided(value: fx.Node, scale: torch.Tensor) -> fx.Node:
    """A value times 1 / scale, where its graph is being edited."""
    buffer = value.graph.get_attr(add_buffer(module_of(value), f"{value.name}.smooth", 1 / scale))
    return value.graph.call_function(aten.mul.Tensor, (value, buffer))


def modulation(value: fx.Node) -> list[tuple[fx.Node, fx.Node]] | None:
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


def _divide_at_source(program: Program, divided: Mapping[str, torch.Tensor]) -> Program:
    """Divide hoisted values, by port, in the stage or table that holds them; exact, and free at every step."""
    tables = {
        name: value / divided[name].numpy() if name in divided else value for name, value in program.tables.items()
    }
    program = replace(program, tables=tables)
    for stage in program.stages:
        targets = {port.name: divided[port.name] for port in stage.outputs if port.name in divided}
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
