"""Emit a stage as an ONNX file.

The stage's `stepfold::` operators are replaced by what the target engine runs, the graph is exported again (which
validates it), translated by the dynamo exporter, cleaned with onnx-ir and checked by onnx's own checker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from torch import fx

from ...ir.program import Stage
from ...loop.errors import StepfoldError
from ..export import Lowerings, export_again, lowered, where
from .optimize import optimize

OPSET = 23
EXTERNAL_DATA_BYTES = 1 << 30  # a protobuf ends at 2 GiB; keep well below

NORMS = ("RMSNormalization", "LayerNormalization")


Rewrite = Callable[[onnx_ir.Model], None]


def emit(stage: Stage, path: Path, lowerings: Lowerings, rewrite: Rewrite | None = None) -> None:
    """Write `stage` to `path`, and its weights to `path.data` when they exceed a gigabyte.

    Args:
        stage: the graph; the batch dimension of its ports stays dynamic.
        path: the `.onnx` file.
        lowerings: lowering of each `stepfold::` operator, and of ATen operators whose usual translation does not serve
            this engine: a function of the same arguments that calls ATen operators or `torch.onnx.ops.symbolic`.
        rewrite: changes the ONNX graph, for what PyTorch has no types for.

    Raises:
        StepfoldError: an operator has no ONNX form; the message names node, module and source line.
    """
    exported = export_again(stage, lowered(stage, lowerings))
    model = _translate(stage, exported).model
    optimize(model)
    _name_ends(stage, model)
    _require_dynamic_batch(stage, model)
    _give_norms_one_type(model)
    if rewrite is not None:
        rewrite(model)
    _clear_value_info(model)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    external = f"{path.name}.data" if size > EXTERNAL_DATA_BYTES else None
    onnx_ir.save(model, path, external_data=external)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise StepfoldError(f"stage {stage.name}: the emitted ONNX file is not valid: {error}") from error


def _translate(stage: Stage, exported: torch.export.ExportedProgram) -> Any:
    """What `torch.onnx.export` does with a program, but for reading its translations again."""
    from torch.onnx._internal.exporter import _core

    try:
        return _core.export(
            exported,
            registry=_translations(),
            opset_version=OPSET,
            optimize=False,  # see `optimize`, whose rewrites are exact
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise StepfoldError(f"stage {stage.name}: {_untranslated(error)}") from error


@cache
def _translations() -> Any:
    """The exporter's translations of ATen operators.

    `torch.onnx.export` makes this table at each call, which parses the source of 500 functions and takes longer than
    most stages do.
    """
    from torch.onnx._internal.exporter import _registration

    quiet = logging.getLogger(_registration.__name__)
    level, quiet_level = quiet.level, logging.ERROR
    quiet.setLevel(quiet_level)  # it reports every missing torchvision operator
    try:
        return _registration.ONNXRegistry.from_torchlib(opset_version=OPSET)
    finally:
        quiet.setLevel(level)


def _untranslated(error: BaseException) -> str:
    """What has no ONNX form and where it comes from."""
    node = None
    while True:
        node = _node_in_hand(error) or node
        if error.__cause__ is None:
            break
        error = error.__cause__
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{where(node)} has no ONNX form: {reason}" if node else f"no ONNX form: {reason}"


def _node_in_hand(error: BaseException) -> fx.Node | None:
    """The node the exporter was at: one of its own decomposed graph, which its errors name but do not carry."""
    found, frame = None, error.__traceback__
    while frame is not None:
        value = frame.tb_frame.f_locals.get("node")
        found = value if isinstance(value, fx.Node) else found
        frame = frame.tb_next
    return found


def _name_ends(stage: Stage, model: onnx_ir.Model) -> None:
    """Give what the graph reads and computes the names of the stage's ports."""
    for ports, values in ((stage.inputs, model.graph.inputs), (stage.outputs, model.graph.outputs)):
        for port, value in zip(ports, values, strict=True):
            value.name = port.name


def _require_dynamic_batch(stage: Stage, model: onnx_ir.Model) -> None:
    """The exporter fixes a size that an operator insists on, and says nothing."""
    for port, value in zip(stage.inputs, model.graph.inputs, strict=True):
        if port.shape[:1] == (None,) and value.shape is not None and isinstance(value.shape[0], int):
            raise StepfoldError(
                f"stage {stage.name}: expected a dynamic batch; the exported graph takes {port.name!r} with batch "
                f"{value.shape[0]} only."
            )


def _give_norms_one_type(model: onnx_ir.Model) -> None:
    """Cast the input of a norm to the type of its scale.

    The exporter folds the cast before an RMS norm into the operator, whose result then has the type of its scale by
    ONNX, and that of its input by TensorRT.
    """
    for node in list(model.graph.all_nodes()):
        if node.op_type not in NORMS or node.graph is None:
            continue
        value, scale = node.inputs[:2]
        if value is None or scale is None or value.dtype is None or scale.dtype in (None, value.dtype):
            continue
        cast = onnx_ir.node("Cast", [value], {"to": scale.dtype}, name=f"{node.name}_input")
        cast.metadata_props.update(node.metadata_props)
        node.graph.insert_before(node, cast)
        node.replace_input_with(0, cast.outputs[0])


def _clear_value_info(model: onnx_ir.Model) -> None:
    """Drop inferred shapes of intermediate values: engines infer their own, and stale ones break quantizers."""
    outputs = set(model.graph.outputs)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value not in outputs:
                value.shape = None
                value.type = None
