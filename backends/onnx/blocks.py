"""ONNX forms of layers whose weights are a few bits in blocks, and blocks as small as one group of activations."""

from __future__ import annotations

import numpy as np
import onnx_ir
import torch
from torch import fx

from ...ir import operators  # noqa: F401  (registers the stepfold:: operators)
from ...ir.blocked import pack_bits, unpack_bits
from ...ir.edit import add_buffer, copy_graph, finish
from ...ir.program import Stage, attribute

BLOCKED_LINEAR = torch.ops.stepfold.blocked_linear.default
FLOAT_PRODUCTS, INTEGER_PRODUCTS = 1, 4
"""Accuracy levels of MatMulNBits."""

MARK = "stepfold::DequantizeBlocks"
"""Stands for DequantizeLinear until `with_signed_blocks`: PyTorch has no tensors of 4-bit integers to export."""

ELEMENTS = {4: onnx_ir.DataType.INT4, 8: onnx_ir.DataType.INT8}
HIGHEST_BITS = {4: 0x88, 8: 0x80}
"""Of the codes in a byte: an unsigned code c around zero point 2**(bits - 1) is c minus that once they are turned."""


def matmul_nbits(
    x: torch.Tensor,
    blocks: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    block: int,
    round_activations: bool,
) -> torch.Tensor:
    """`stepfold::blocked_linear` as the contrib operator whose layout it has."""
    return torch.onnx.ops.symbolic(
        "com.microsoft::MatMulNBits",
        (x, blocks, scales, zero_points, None, bias),
        {
            "K": x.shape[-1],
            "N": blocks.shape[0],
            "bits": bits,
            "block_size": block,
            "accuracy_level": INTEGER_PRODUCTS if round_activations else FLOAT_PRODUCTS,
        },
        dtype=x.dtype,
        shape=(*x.shape[:-1], blocks.shape[0]),
        version=1,
    )


def dequantized_blocks(
    x: torch.Tensor,
    blocks: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    block: int,
    round_activations: bool,
) -> torch.Tensor:
    """`stepfold::blocked_linear` without zero points as a float product of dequantized blocks, which is to be emitted
    with `with_signed_blocks`."""
    weight = torch.onnx.ops.symbolic(
        MARK,
        (blocks, scales),
        {"bits": bits, "block_size": block},
        dtype=scales.dtype,
        shape=(blocks.shape[0], x.shape[-1]),
        version=1,
    )
    product = x @ weight.transpose(0, 1)
    return product if bias is None else product + bias


def with_signed_blocks(model: onnx_ir.Model) -> None:
    """Give the marked weights of a model their form: DequantizeLinear over blocks of INT4 or INT8 [N, M]."""
    domain, _, operator = MARK.partition("::")
    for node in list(model.graph):
        if (node.domain, node.op_type) != (domain, operator):
            continue
        packed, scales = node.inputs
        assert packed is not None and packed.const_value is not None
        bits, size = (node.attributes[name].as_int() for name in ("bits", "block_size"))
        name = f"{packed.name}.codes"
        if name not in model.graph.initializers:
            value = _signed(packed.const_value.numpy(), bits, name)
            model.graph.initializers.add(onnx_ir.Value(name=name, const_value=value))
        codes, attributes = model.graph.initializers[name], {"axis": 1, "block_size": size}
        new = onnx_ir.node("DequantizeLinear", [codes, scales], attributes, name=node.name)
        new.metadata_props.update(node.metadata_props)
        model.graph.insert_before(node, new)
        node.outputs[0].replace_all_uses_with(new.outputs[0])
        model.graph.remove(node, safe=True)
        if not packed.uses():
            model.graph.initializers.pop(str(packed.name))
    model.opset_imports.pop(domain, None)


def _signed(blocks: np.ndarray, bits: int, name: str) -> onnx_ir.TensorProtocol:
    """Codes [N, blocks, bytes] as integers [N, M] around 0; ONNX packs 4-bit ones as the blocks do."""
    turned = blocks.reshape(blocks.shape[0], -1) ^ np.uint8(HIGHEST_BITS[bits])
    if bits == 8:
        return onnx_ir.Tensor(turned.view(np.int8), name=name)
    shape = onnx_ir.Shape((turned.shape[0], turned.shape[1] * 2))
    return onnx_ir.PackedTensor(turned.reshape(-1), ELEMENTS[bits], shape=shape, name=name)


def blocked_layers(stage: Stage) -> list[fx.Node]:
    """Every `blocked_linear` of a stage."""
    return stage.graph.graph.find_nodes(op="call_function", target=BLOCKED_LINEAR)  # type: ignore[return-value]


def block_size(node: fx.Node) -> int:
    """Input channels of a `blocked_linear` that share a scale."""
    return node.args[6]  # type: ignore[return-value]


def rounds(node: fx.Node) -> bool:
    """Whether a `blocked_linear` rounds its activations."""
    return bool(node.args[7])


def in_blocks_of(stage: Stage, group: int) -> Stage:
    """The stage whose layers that round activations have blocks of one size, for engines with one size for all.

    The weights are the same: the parts of a block have its scale. Activations are rounded in the smaller blocks.

    Args:
        stage: the blocks of its layers are multiples of `group`.
        group: input channels that share a scale afterwards.
    """
    graph = copy_graph(stage)
    for node in graph.graph.find_nodes(op="call_function", target=BLOCKED_LINEAR):
        bits = node.args[5]
        if not rounds(node) or block_size(node) == group:
            continue
        parts = block_size(node) // group
        blocks, scales = (attribute(graph, str(item.target)) for item in node.args[1:3])
        changed = {1: blocks.reshape(blocks.shape[0], blocks.shape[1] * parts, -1), 2: _repeated(scales, parts)}
        if node.args[3] is not None:
            zeros = unpack_bits(attribute(graph, str(node.args[3].target)), bits, scales.shape[1])
            changed[3] = pack_bits(_repeated(zeros, parts), bits)
        with graph.graph.inserting_before(node):
            for place, value in changed.items():
                name = add_buffer(graph, f"{node.args[place].target}_of_{group}", value)
                node.update_arg(place, graph.graph.get_attr(name))
        node.update_arg(6, group)
    return finish(stage, graph)


def _repeated(values: torch.Tensor, parts: int) -> torch.Tensor:
    """One value [N, blocks] for each part of a block: [N, blocks * parts]."""
    return values.repeat_interleave(parts, dim=1)
