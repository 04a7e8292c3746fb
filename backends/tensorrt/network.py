"""From an ONNX file to a network definition: parsing, what the parser refuses, and what the layers compute in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ...loop.ports import Port
from .description import Layer
from .provider import Message

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
"""NumPy names of TensorRT's types; others are written in lower case."""


@dataclass(frozen=True)
class RefusedNode:
    """A node of the ONNX graph that the parser has no form for."""

    name: str
    operator: str
    reason: str


class ParserRefusal(Exception):
    """The parser refused a graph."""

    def __init__(self, nodes: tuple[RefusedNode, ...]):
        super().__init__("; ".join(f"{node.operator}: {node.reason}" for node in nodes))
        self.nodes = nodes


def parse(tensorrt: ModuleType, network: Any, log: Any, model: Path | bytes) -> None:
    """Fill an empty network from an ONNX file, or from its bytes.

    Raises:
        ParserRefusal: it has nodes that the parser refuses.
    """
    parser = tensorrt.OnnxParser(network, log)
    parsed = parser.parse(model) if isinstance(model, bytes) else parser.parse_from_file(str(model))
    if not parsed:
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise ParserRefusal(tuple(RefusedNode(e.node_name(), e.node_operator(), _reason(e.desc())) for e in errors))


def _reason(text: str) -> str:
    """What the parser says, without its complaints about the missing driver and its empty `false`."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and "CUDA driver version" not in line]
    reason = " ".join(lines)
    return "it has no form for this operator" if reason in ("", "false") else reason


def layers(network: Any) -> tuple[Layer, ...]:
    """Name, kind and output types of every layer; a strongly typed engine keeps these types."""
    return tuple(_layer(network.get_layer(i)) for i in range(network.num_layers))


def _layer(layer: Any) -> Layer:
    types = tuple(dtype_name(layer.get_output_type(i)) for i in range(layer.num_outputs))
    return Layer(name=layer.name, kind=layer.type.name, types=types)


def ports(network: Any) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Inputs and outputs of a network; a dimension that is chosen at run time is None."""
    inputs = tuple(_port(network.get_input(i)) for i in range(network.num_inputs))
    return inputs, tuple(_port(network.get_output(i)) for i in range(network.num_outputs))


def _port(tensor: Any) -> Port:
    return Port(tensor.name, tuple(None if size < 0 else int(size) for size in tensor.shape), dtype_name(tensor.dtype))


def dtype_name(dtype: Any) -> str:
    """The NumPy name of a TensorRT type."""
    name = str(dtype.name)
    return DTYPES.get(name, name.lower())


def error_lines(messages: list[Message]) -> list[str]:
    """What TensorRT logged as errors; that a machine without a driver has none is not one."""
    found = [message.text for message in messages if message.severity in ("ERROR", "INTERNAL_ERROR")]
    return list(dict.fromkeys(text for text in found if "CUDA driver version" not in text))
