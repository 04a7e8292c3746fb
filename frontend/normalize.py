"""From an exported program to a plain graph: weights are attributes, arguments are positional, assertions are gone."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from ..ir.program import attribute

aten = torch.ops.aten
WRAPPED = "model"  # the attribute of `Calling` that holds the model
ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}


def normalize(exported: torch.export.ExportedProgram) -> tuple[fx.GraphModule, list[str]]:
    """Unlift a captured `Calling`.

    Returns:
        A graph module of one positional argument per tensor that returns a tuple of tensors, whose attributes and
        module paths are those of the wrapped model; and the names of the outputs.
    """
    module = exported.module()
    graph = module.graph
    _strip_assertions(graph)
    names = _output_names(exported)
    output = graph.output_node()
    output.args = (tuple(leaf for leaf in pytree.tree_leaves(output.args[0]) if isinstance(leaf, fx.Node)),)
    graph.set_codegen(CodeGen())
    graph.eliminate_dead_code()
    tensors = {}
    for node in graph.nodes:
        _unwrap_stack(node)
        if node.op == "get_attr":
            tensor = attribute(module, str(node.target)).detach()
            node.target = str(node.target).removeprefix(f"{WRAPPED}.")
            tensors[node.target] = tensor
    return _graph_module(tensors, graph), names


def _graph_module(tensors: dict[str, torch.Tensor], graph: fx.Graph) -> fx.GraphModule:
    root = torch.nn.Module()
    for path, tensor in tensors.items():
        *parents, name = path.split(".")
        owner = root
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, torch.nn.Module())
            owner = getattr(owner, parent)
        owner.register_buffer(name, tensor)
    flat = fx.GraphModule(root, graph)
    flat.eval()
    return flat


def _output_names(exported: torch.export.ExportedProgram) -> list[str]:
    spec = exported.call_spec.out_spec
    assert spec is not None
    return list(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))


def _strip_assertions(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.target in ASSERTIONS or (node.op == "call_module" and "_guards_fn" in str(node.target)):
            graph.erase_node(node)


def _unwrap_stack(node: fx.Node) -> None:
    """Make module paths those of the model: drop the entry of `Calling`, and the prefix of the others."""
    stack: dict[str, Any] | None = node.meta.get("nn_module_stack")
    if not stack:
        return
    unwrapped = {}
    for key, (path, kind) in stack.items():
        if path == WRAPPED:
            unwrapped[key] = ("", kind)
        elif path.startswith(f"{WRAPPED}."):
            unwrapped[key] = (path.removeprefix(f"{WRAPPED}."), kind)
    node.meta["nn_module_stack"] = unwrapped
