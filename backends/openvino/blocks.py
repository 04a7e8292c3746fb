"""What a compiled model makes of layers whose weights are a few bits in blocks. Torch-free.

Such a layer is right when its weights are still in their few bits in the compiled model, and when activations are
rounded to 8 bits exactly where that was asked for. The compiled model says the first. It does not say the second, so a
layer of the same width and blocks is asked for a product that differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .precision import BELOW_A_LEVEL, OUTPUTS, ROWS, rounds_anywhere, stored_type, text, unpacked_for_amx

BITS = {"u2": 2, "u4": 4, "u8": 8}
ZERO_POINT = 4  # argument of a compiled product
MOST_WIDTH = 4
"""Blocks in a layer that is asked: more of them change nothing."""


@dataclass(frozen=True)
class BlockedSite:
    """A product with weights in blocks, as a model has it before it is compiled.

    Attributes:
        weight: name of its codes.
        products: names that the compiled model may give it: its own, and those of what adds its bias.
        element: type of the codes.
        width: width of the layer, M features.
        block: number of features that share a scale.
        outputs: number of features that it computes, N.
    """

    weight: str
    products: tuple[str, ...]
    element: str
    width: int
    block: int
    outputs: int = OUTPUTS


def blocked_sites(model: Any) -> list[BlockedSite]:
    """The products of an `openvino.Model` whose weights are constants [N, blocks, block] of a few bits."""
    found = []
    for operation in model.get_ordered_ops():
        codes = _codes(operation.input_value(1).get_node()) if operation.get_type_name() == "MatMul" else None
        if codes is None:
            continue
        readers = [target.get_node() for target in operation.output(0).get_target_inputs()]
        products = tuple(node.get_friendly_name() for node in (operation, *readers))
        outputs, blocks, block = codes.shape
        element = stored_type(codes.get_output_element_type(0))
        found.append(BlockedSite(codes.get_friendly_name(), products, element, blocks * block, block, outputs))
    return found


def misfits(
    compiled: Any, sites: list[BlockedSite], rounded: frozenset[str], settings: Mapping[str, Any], group: int
) -> dict[str, str]:
    """The sites that a compiled model computes otherwise than asked: weight -> what was found.

    A processor that rounds no activations at run time keeps them in float in every site, which is not held against any;
    neither is it that AMX has no form for a narrow one.

    Args:
        compiled: an `openvino.CompiledModel`.
        sites: sites of the model it was compiled from.
        rounded: weights of the sites whose activations are to be rounded to 8 bits.
        settings: it was compiled with.
        group: features of a token that share a scale.
    """
    layers = {
        name: layer
        for layer in compiled.get_runtime_model().get_ops()
        for name in text(layer, "originalLayersNames").split(",")
    }
    able = bool(rounded) and rounds_anywhere(settings)
    asked: dict[tuple[str, int, int], bool] = {}
    found = {}
    for site in sites:
        if unpacked_for_amx(site.width, site.outputs, settings):
            continue
        layer = next((layers[name] for name in site.products if name in layers), None)
        reason = _unpacked(layer, site)
        if not reason:
            key = (site.element, min(site.width, MOST_WIDTH * site.block), site.block)
            if key not in asked:
                asked[key] = rounds_blocked_activations(*key, group, settings)
            integers = asked[key] and _zero_point(layer) in BITS
            if site.weight in rounded and able and not integers:
                reason = f"its blocks of {site.block} with groups of {group} keep activations in float"
            elif site.weight not in rounded and integers:
                reason = f"its activations are rounded to 8 bits in groups of {group}"
        if reason:
            found[site.weight] = reason
    return found


def rounds_blocked_activations(element: str, width: int, block: int, group: int, settings: Mapping[str, Any]) -> bool:
    """Whether a layer with weights in blocks rounds its activations to 8 bits, by what it computes.

    Its input has a value of 1 and one of 0.3 levels below; only the second reaches the output. Integers round it to 0.
    """
    import openvino
    import openvino.opset13 as operations

    zero = 1 << (BITS[element] - 1)
    codes = np.full((OUTPUTS, width), zero, np.uint8)
    codes[:, 1] = zero + 1
    shape = [OUTPUTS, width // block, block]
    weight = operations.convert(_constant(codes, shape, element), "f32")
    offset = operations.convert(_constant(np.array([zero], np.uint8), [1], element), "f32")
    scaled = operations.multiply(operations.subtract(weight, offset), np.ones((*shape[:2], 1), np.float32))
    x = operations.parameter([-1, ROWS, width], np.float32)
    product = operations.matmul(x, operations.reshape(scaled, [OUTPUTS, width], False), False, True)
    model: Any = openvino.Model([product], [x], "probe")  # type: ignore[misc]
    options = {**settings, "DYNAMIC_QUANTIZATION_GROUP_SIZE": group}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    values = np.zeros((1, ROWS, width), np.float32)
    values[..., 0] = 1
    values[..., 1] = BELOW_A_LEVEL
    return not np.any(request.infer([values])[0])


def _constant(codes: np.ndarray, shape: list[int], element: str) -> Any:
    """A constant of a few bits; it holds its values, where one made of a tensor would read memory of this process."""
    import openvino

    return openvino.op.Constant(getattr(openvino.Type, element), openvino.Shape(shape), codes.reshape(-1).tolist())


def _codes(operation: Any) -> Any:
    """The constant [N, blocks, block] of a few bits that a weight is unpacked from, or None."""
    while operation.get_type_name() in ("Reshape", "Slice", "Multiply", "Subtract", "Convert"):
        operation = operation.input_value(0).get_node()
    if operation.get_type_name() != "Constant" or len(operation.get_output_partial_shape(0)) != 3:
        return None
    return operation if stored_type(operation.get_output_element_type(0)) in BITS else None


def _unpacked(layer: Any, site: BlockedSite) -> str:
    """What is wrong with the weights of a layer; empty when they are in their few bits."""
    if layer is None:
        return "no layer of the compiled model has its name"
    kind = text(layer, "layerType")
    types = [stored_type(layer.get_input_element_type(i)) for i in range(layer.get_input_size())]
    if kind != "FullyConnected" or types[1] != site.element:
        return f"it is a {kind} of {' and '.join(types[:2])}, with unpacked weights"
    return ""


def _zero_point(layer: Any) -> str:
    """The type of its zero points; products of integers have those of the codes."""
    return stored_type(layer.get_input_element_type(ZERO_POINT)) if layer.get_input_size() > ZERO_POINT else ""
