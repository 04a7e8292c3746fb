"""Structural edits of stages: cut a graph at named values, add weights, clean up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from ..loop.ports import Port, Rate
from .program import Program, Stage
from .shapes import PROBE_BATCHES, port, propagate

SYM_SIZE = torch.ops.aten.sym_size.int


def output_nodes(stage: Stage) -> list[fx.Node]:
    """The nodes a stage returns, in the order of its output ports."""
    return list(stage.graph.graph.output_node().args[0])  # type: ignore[arg-type]


def copy_graph(stage: Stage) -> fx.GraphModule:
    """A graph module that shares the stage's weights and whose graph may be edited."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(stage.graph.graph, mapping)
    graph.output(output)
    return fx.GraphModule(stage.graph, graph)


class Copies:
    """Copies of the graphs of a program's computing slots, edited together.

    Attributes:
        graphs: the copies, by the name of their stage.
        twins: node of a stage -> what stands for it in its copy.
    """

    def __init__(self, program: Program):
        """Copy the graphs of a program; weights are shared."""
        self._program = program
        self.graphs = {stage.name: copy_graph(stage) for stage in program.steps}
        self.twins = {
            node: twin
            for stage in program.steps
            for node, twin in zip(stage.graph.graph.nodes, self.graphs[stage.name].graph.nodes, strict=True)
        }

    def program(self) -> Program:
        """The program with the edited graphs."""
        return self._program.with_stages([finish(stage, self.graphs[stage.name]) for stage in self._program.steps])


def module_of(node: fx.Node) -> fx.GraphModule:
    """The module that holds the weights of a node's graph."""
    module = node.graph.owning_module
    assert isinstance(module, fx.GraphModule)
    return module


def drop_dead_code(graph: fx.Graph) -> None:
    """Erase what nothing reads."""
    # attention counts as impure for its dropout, which no stage has
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def finish(stage: Stage, graph: fx.GraphModule) -> Stage:
    """The stage with an edited graph: dead code and unused inputs removed, shapes propagated again."""
    drop_dead_code(graph.graph)
    _read_batch_from_one_input(graph.graph)
    kept = []
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, declared in zip(placeholders, stage.inputs, strict=True):
        if node.users:
            kept.append(declared)
        else:
            graph.graph.erase_node(node)
    graph.graph.lint()
    slim = fx.GraphModule(graph, graph.graph)  # keeps only the weights that are still read
    propagate(slim, kept)
    return replace(stage, graph=slim, inputs=tuple(kept))


def extract(stage: Stage, name: str, rate: Rate, values: Sequence[fx.Node], names: Sequence[str]) -> Stage:
    """A new stage that computes `values` of `stage` from the stage's inputs; weights are shared.

    Args:
        stage: the stage that computes the values today.
        name: name of the new stage.
        rate: rate of the new stage.
        values: nodes of `stage`, each with the batch as first dimension.
        names: the port names of the values.
    """
    needed = _ancestors(values)
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    inputs: list[Port] = []
    for node, declared in zip(_placeholders(stage), stage.inputs, strict=True):
        if node in needed:
            mapping[node] = graph.node_copy(node)
            inputs.append(declared)
    batch = mapping[next(node for node in _placeholders(stage) if node in needed and node.meta["shape"][:1] == (None,))]
    for node in stage.graph.graph.nodes:
        if node not in needed or node in mapping:
            continue
        if reads_batch(node):
            mapping[node] = graph.call_function(SYM_SIZE, (batch, 0))
        else:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    graph.output(tuple(mapping[value] for value in values))
    module = fx.GraphModule(stage.graph, graph)
    propagate(module, inputs)
    outputs = tuple(port(mapping[value], label) for value, label in zip(values, names, strict=True))
    return Stage(name, rate, module, tuple(inputs), outputs)


def replace_by_inputs(stage: Stage, values: Sequence[fx.Node], names: Sequence[str]) -> Stage:
    """The stage with `values` received as inputs instead of computed."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {node: graph.node_copy(node) for node in _placeholders(stage)}
    for value, label in zip(values, names, strict=True):
        mapping[value] = graph.placeholder(label.replace(".", "_"))
        mapping[value].meta = dict(value.meta)
    for node in stage.graph.graph.nodes:
        if node not in mapping and node.op != "output":
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    graph.output(tuple(mapping[node] for node in output_nodes(stage)))
    added = tuple(port(value, label) for value, label in zip(values, names, strict=True))
    widened = replace(stage, inputs=(*stage.inputs, *added))
    return finish(widened, fx.GraphModule(stage.graph, graph))


def reads_batch(node: fx.Node) -> bool:
    """Whether a node asks for the size of the batch, of whatever tensor carries it."""
    if node.target is not SYM_SIZE or node.args[1] != 0:
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = source.meta.get("shape", ())
    return shape[:1] == (None,) and source.meta["val"].shape[0] == PROBE_BATCHES[0]  # not a multiple of the batch


def _read_batch_from_one_input(graph: fx.Graph) -> None:
    """Take the batch size from an input whose values are read too, so that no input is kept for its shape alone."""
    sizes = [node for node in graph.nodes if reads_batch(node)]
    sources = [node for node in graph.nodes if node.op == "placeholder" and node.meta.get("shape", ())[:1] == (None,)]
    read = [source for source in sources if any(user not in sizes for user in source.users)]
    for node in sizes if read else []:
        node.args = (read[0], 0)


def add_buffer(graph: fx.GraphModule, name: str, tensor: torch.Tensor) -> str:
    """Register a tensor under a free attribute name derived from `name`; returns that name."""
    base = "".join(c if c.isalnum() else "_" for c in name)
    free, count = base, 1
    while hasattr(graph, free):
        free, count = f"{base}_{count}", count + 1
    graph.register_buffer(free, tensor)
    return free


def set_weight(graph: fx.GraphModule, target: str, tensor: torch.Tensor) -> None:
    """Put a tensor in the place of the weight of this attribute name, in a copy that shares its other weights."""
    parent, _, name = target.rpartition(".")
    owner = graph.get_submodule(parent)
    delattr(owner, name)
    owner.register_buffer(name, tensor)


def _placeholders(stage: Stage) -> list[fx.Node]:
    return [node for node in stage.graph.graph.nodes if node.op == "placeholder"]


def _ancestors(values: Sequence[fx.Node]) -> set[fx.Node]:
    """Everything the values are computed from; what a size of the batch is read from does not count."""
    found: set[fx.Node] = set()
    stack = list(values)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if not reads_batch(node):
                stack.extend(node.all_input_nodes)
    return found
