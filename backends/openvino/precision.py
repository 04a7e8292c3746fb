"""Which layers with 8-bit weights a compiled model computes in integers. Torch-free.

The graph does not tell: weights in 8 bits also serve a float product, which unpacks them. What the plugin made of the
layer does (`CompiledModel.get_runtime_model`), except for activations that are quantized on the way into the product:
there it reports the type of the weights whether it rounds activations or not, so a layer of the same width is asked
for a product that differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..instructions import instructions

INTEGERS = ("i8", "u8")
MOVES = ("Transpose", "Reorder", "Reshape", "Convert")
ROWS, OUTPUTS = 16, 16
PLAIN_WIDTH = 64
"""In features of a layer whose activations are rounded wherever any are."""
AMX, AMX_ROW, AMX_NARROW = "amx_bf16", 32, 512
"""The instructions, the features in a row of a tile, and the width from which a layer need not be whole rows."""
BELOW_A_LEVEL = np.float32(0.3 / 127)


@dataclass(frozen=True)
class IntegerSite:
    """A product with 8-bit weights, as a model has it before it is compiled.

    Attributes:
        weight: name of the weight, which the compiled model keeps where it renames the product.
        width: width of the layer, M features.
        dynamic: whether its activations are float in the graph.
        outputs: number of features that it computes, N.
    """

    weight: str
    width: int
    dynamic: bool
    outputs: int = OUTPUTS


def integer_sites(model: Any) -> list[IntegerSite]:
    """The products of an `openvino.Model` whose weights are 8-bit constants."""
    found = []
    for operation in model.get_ordered_ops():
        if operation.get_type_name() != "MatMul":
            continue
        weight = _stored(operation.input_value(1).get_node())
        if weight is None:
            continue
        dynamic = not _dequantized(operation.input_value(0).get_node())
        found.append(IntegerSite(weight.get_friendly_name(), weight.shape[0], dynamic, weight.shape[1]))
    return found


def float_sites(compiled: Any, sites: list[IntegerSite], settings: Mapping[str, Any], group: int) -> dict[str, str]:
    """The sites that a compiled model computes in float: weight -> what was found.

    A processor that rounds no activations at run time computes every dynamic site in float, which is not held against
    any of them; neither is it that AMX has no form for a narrow one.

    Args:
        compiled: an `openvino.CompiledModel`.
        sites: sites of the model it was compiled from.
        settings: it was compiled with.
        group: features of a token that share a scale, where activations are quantized at run time.
    """
    layers = _layers(compiled)
    dynamic = {site.width for site in sites if site.dynamic}
    able = bool(dynamic) and rounds_anywhere(settings)
    rounded = {width: not able or rounds_activations(width, group, settings) for width in dynamic}
    found: dict[str, str] = {}
    for site in sites:
        if site.dynamic and unpacked_for_amx(site.width, site.outputs, settings):
            continue
        layer = layers.get(site.weight)
        types = _argument_types(layer) if layer is not None else ()
        expected = 1 if site.dynamic else 2  # arguments of the layer that are 8-bit
        if layer is None:
            found[site.weight] = "no product of the compiled model reads its weight"
        elif sum(kind in INTEGERS for kind in types) < expected:
            found[site.weight] = f"it is a {text(layer, 'layerType')} of {' and '.join(types)}"
        elif site.dynamic and not rounded[site.width]:
            found[site.weight] = f"its width {site.width} against groups of {group} keeps activations in float"
    return found


def unpacked_for_amx(width: int, outputs: int, settings: Mapping[str, Any]) -> bool:
    """Whether the plugin unpacks the weights of a layer here, so that its product is one of floats: right, and slower.

    In bfloat16 the kernels of oneDNN for AMX take weights of few bits only where a layer fills their tiles (OpenVINO,
    `FullyConnected::isSupportedCompressedOperation`).
    """
    if settings.get("INFERENCE_PRECISION_HINT") != "bf16" or AMX not in instructions():
        return False
    widest = max(width, outputs)
    return widest <= AMX_ROW or (widest <= AMX_NARROW and width % AMX_ROW != 0)


def rounds_anywhere(settings: Mapping[str, Any]) -> bool:
    """Whether this processor rounds activations on their way into any product; without VNNI, OpenVINO does not.

    There the same layers are products of floats with weights that are unpacked from 8 bits: right, and slower.
    """
    return rounds_activations(PLAIN_WIDTH, PLAIN_WIDTH // 2, settings)


def rounds_activations(width: int, group: int, settings: Mapping[str, Any]) -> bool:
    """Whether a layer with 8-bit weights rounds its activations to 8 bits, by what it computes.

    Its input has a value of 1 and one of 0.3 levels below; only the second reaches the output. Integers round it to 0.
    """
    if width < 2:
        return False
    import openvino
    import openvino.opset13 as operations

    weight = np.zeros((width, OUTPUTS), np.int8)
    weight[1] = 1
    x = operations.parameter([-1, ROWS, width], np.float32)
    scaled = operations.multiply(
        operations.convert(operations.constant(weight), "f32"), np.ones((1, OUTPUTS), np.float32)
    )
    model: Any = openvino.Model(  # type: ignore[misc]
        [operations.matmul(x, scaled, False, False)], [x], "probe"
    )
    options = {**settings, "DYNAMIC_QUANTIZATION_GROUP_SIZE": group}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    values = np.zeros((1, ROWS, width), np.float32)
    values[..., 0] = 1
    values[..., 1:2] = BELOW_A_LEVEL
    return not np.any(request.infer([values])[0])


def _stored(operation: Any) -> Any:
    """The 8-bit constant [M, N] that a value is unpacked from, or None."""
    while operation.get_type_name() in ("Multiply", "Subtract", "Convert", "Reshape", "Transpose"):
        operation = operation.input_value(0).get_node()
    if operation.get_type_name() != "Constant" or len(operation.shape) != 2:  # blocks have three dimensions
        return None
    return operation if stored_type(operation.get_output_element_type(0)) in INTEGERS else None


def _dequantized(operation: Any) -> bool:
    """Whether a value is unpacked from 8 bits."""
    while operation.get_type_name() in ("Multiply", "Subtract"):
        operation = operation.input_value(0).get_node()
    return operation.get_type_name() == "Convert" and stored_type(operation.get_input_element_type(0)) in INTEGERS


def _layers(compiled: Any) -> dict[str, Any]:
    """The layers of a compiled model by the names of the constants that they are given as weights."""
    return {
        name: layer
        for layer in compiled.get_runtime_model().get_ops()
        if layer.get_input_size() > 1
        for name in _constant_names(layer.input_value(1).get_node())
    }


def _constant_names(layer: Any) -> list[str]:
    """Names of the constant that a layer reorders, or is; none for what is computed from inputs."""
    while text(layer, "layerType") in MOVES:
        layer = layer.input_value(0).get_node()
    return text(layer, "originalLayersNames").split(",") if text(layer, "layerType") == "Const" else []


def _argument_types(layer: Any) -> tuple[str, ...]:
    return tuple(stored_type(layer.get_input_element_type(i)) for i in range(min(2, layer.get_input_size())))


def text(layer: Any, key: str) -> str:
    """What a compiled model notes of a layer."""
    return layer.get_rt_info()[key].astype(str)


def stored_type(element_type: Any) -> str:
    """The name of an element type, as in `f32`."""
    return element_type.get_type_name()
