"""A stage as a float ONNX model whose products carry the names of the stage's linear layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import torch

from ....backends.onnx.emit import emit
from ....ir.edit import copy_graph
from ....ir.program import Stage
from ....loop.errors import StepfoldError

LINEAR = torch.ops.aten.linear.default
NAME = "stepfold.node"  # key of the metadata that carries a name through the exporter


def emit_floats(stage: Stage, path: Path) -> list[str]:
    """Write the stage with each linear layer as `MatMul` (and `Add`), the MatMul named as the layer's node.

    The exporter names nodes after its own graph, in which linear layers are counted anew. So the name goes along as
    metadata of the node, and becomes the name of the node afterwards: quantizers keep names and drop metadata. Operators of
    stepfold take their portable form, because modelopt wants standard ONNX.

    Args:
        stage: stage without quantized layers.
        path: the `.onnx` file.

    Returns:
        The names, in the order of the graph.

    Raises:
        StepfoldError: an operator has no ONNX form, or a layer was lost on the way.
    """
    graph = copy_graph(stage)
    names = [node.name for node in graph.graph.nodes if node.target is LINEAR]
    for node in graph.graph.nodes:
        if node.target is LINEAR:
            node.target, node.kwargs = _named_linear, {**node.kwargs, "name": node.name}
    graph.recompile()
    emit(Stage(stage.name, stage.rate, graph, stage.inputs, stage.outputs), path, {})
    _rename(path, names)
    return names


def _named_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, name: str) -> Any:
    product = torch.onnx.ops.symbolic(
        "MatMul",
        (x, weight.transpose(0, 1)),  # not `t`: the exporter would name the result as the input of that name
        dtype=x.dtype,
        shape=(*x.shape[:-1], weight.shape[0]),
        version=13,
        metadata_props={NAME: name},
    )
    return product if bias is None else product + bias


def _rename(path: Path, names: list[str]) -> None:
    model = onnx.load(str(path), load_external_data=False)
    found = []
    for node in model.graph.node:
        carried = next((item.value for item in node.metadata_props if item.key == NAME), None)
        if carried is not None:
            node.name = carried
            found.append(carried)
    if sorted(found) != sorted(names):
        missing = sorted(set(names) - set(found))
        raise StepfoldError(f"{path.name}: expected one product for each linear layer; missing: {', '.join(missing)}.")
    onnx.save(model, str(path))
