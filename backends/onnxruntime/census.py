"""What ONNX Runtime makes of a stage: its operators, counted after the engine's own graph optimization.

An engine may undo a quantization and say nothing: MatMul and Add between quantize and dequantize pairs become one float
Gemm, fed by a DequantizeLinear that runs at every call, which is slower than the float layer was. So a quantized stage
is opened once with the options it will be deployed with, and the graph that results has to compute as many products in
integers as the stage has quantized layers.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import fx

from ...ir import operators  # noqa: F401  (registers the stepfold:: operators)
from ...ir.names import module_path
from ...ir.program import Stage, attribute
from ...loop.errors import StepfoldError
from ..ports import first_line
from .session import PROVIDERS, on, session_options

logger = logging.getLogger(__name__)

QUANTIZED = (torch.ops.stepfold.qlinear.default, torch.ops.stepfold.blocked_linear.default)
"""The layers of a stage that have to run in integers, each as one product."""

INTEGER_PRODUCTS = frozenset(
    {
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QGemm",
        "QLinearMatMul",
    }
)
FLOAT_PRODUCTS = frozenset({"FusedGemm", "FusedMatMul", "FusedMatMulActivation", "Gemm", "MatMul", "TransposeMatMul"})
LAYOUT = frozenset({"Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
NAMED = 5  # layers that a message names

WEIGHTS_FILE = "optimized.data"


@dataclass(frozen=True)
class QuantizedLayer:
    """A quantized layer of a stage: the path of its module, and the name of its weight."""

    site: str
    weight: str


@dataclass(frozen=True)
class Census:
    """The operators of an optimized graph.

    Attributes:
        counts: operator -> number of nodes.
        trapped: float products that read what a DequantizeLinear makes of integers, as a reader can find them.
        integer_inputs: names of what the integer products read.
    """

    counts: Mapping[str, int]
    trapped: tuple[str, ...]
    integer_inputs: frozenset[str]

    @property
    def integer_products(self) -> int:
        """How many products run in integers."""
        return sum(count for operator, count in self.counts.items() if operator in INTEGER_PRODUCTS)


def require_integer_products(stage: Stage, path: Path) -> Census | None:
    """Check that every quantized layer of a stage runs in integers.

    Args:
        stage: stage that was lowered.
        path: its `.onnx` file.

    Returns:
        The census, or None for a stage without quantized layers, which is not opened.

    Raises:
        StepfoldError: ONNX Runtime cannot load the file, or runs quantized layers in float.
    """
    layers = quantized_layers(stage)
    if not layers:
        return None
    found = census(optimized_model(path))
    logger.info("stage %s: %s", stage.name, ", ".join(f"{name} {n}" for name, n in sorted(found.counts.items())))
    if found.trapped or found.integer_products < len(layers):
        lost = [layer.site for layer in layers if layer.weight not in found.integer_inputs]
        raise StepfoldError(_message(stage.name, found, len(layers), lost))
    return found


def quantized_layers(stage: Stage) -> tuple[QuantizedLayer, ...]:
    """The quantized layers of a stage in graph order; equal calls, which an engine makes once, count once."""
    layers: dict[str, QuantizedLayer] = {}
    for node in stage.graph.graph.nodes:
        if node.target in QUANTIZED:
            arguments = [a.target if isinstance(a, fx.Node) and a.op == "get_attr" else a for a in node.args]
            held = [str(a.target) for a in node.all_input_nodes if a.op == "get_attr"]
            weight = max(held, key=lambda name: attribute(stage.graph, name).numel())
            layers.setdefault(f"{node.target} {arguments}", QuantizedLayer(module_path(node), weight))
    return tuple(layers.values())


def optimized_model(path: Path) -> onnx.ModelProto:
    """The graph that ONNX Runtime runs for a file on the CPU, without its weights.

    Raises:
        StepfoldError: it cannot load the file.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="stepfold-census-") as folder:
        options = session_options(None)
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        # beside the graph, because a protobuf ends at 2 GiB
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", WEIGHTS_FILE)
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        try:
            onnxruntime.InferenceSession(str(path), options, **on(PROVIDERS["cpu"]))
        except Exception as error:  # ONNX Runtime has a dozen error classes without a common base
            raise StepfoldError(
                f"{path.name}: ONNX Runtime {onnxruntime.__version__} cannot load the emitted file: {first_line(error)}"
            ) from error
        return onnx.load(options.optimized_model_filepath, load_external_data=False)


def census(model: onnx.ModelProto) -> Census:
    """Count the operators of a graph, those of its branches included, and find trapped products."""
    nodes = list(_nodes(model.graph))
    writers = {name: node for node in nodes for name in node.output}
    trapped = []
    for node in nodes:
        if node.op_type in FLOAT_PRODUCTS:
            sources = [_behind_layout(name, writers) for name in node.input[:2]]
            fed = [source for source in sources if source is not None and source.op_type == "DequantizeLinear"]
            if fed:
                read = ", ".join(source.input[0] for source in fed)
                trapped.append(f"{node.op_type} {node.name or node.output[0]} (of {read})")
    integer = [node for node in nodes if node.op_type in INTEGER_PRODUCTS]
    return Census(
        counts=dict(Counter(node.op_type for node in nodes)),
        trapped=tuple(trapped),
        integer_inputs=frozenset(name for node in integer for name in node.input),
    )


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for entry in node.attribute:
            for branch in (*([entry.g] if entry.HasField("g") else []), *entry.graphs):
                yield from _nodes(branch)


def _behind_layout(name: str, writers: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """The node that computes a value, layout operators skipped; None for an input or a weight."""
    node = writers.get(name)
    while node is not None and node.op_type in LAYOUT:
        node = writers.get(node.input[0])
    return node


def _message(stage: str, found: Census, expected: int, lost: list[str]) -> str:
    counted = ", ".join(f"{name} {n}" for name, n in sorted(found.counts.items()) if name in INTEGER_PRODUCTS)
    received = f"ONNX Runtime runs {found.integer_products} ({counted or 'none'})"
    parts = [f"stage {stage}: expected {expected} quantized layers to run in integers; {received}."]
    if found.trapped:
        parts.append(f"Float products of dequantized integers: {_listed(found.trapped)}.")
    if lost:
        parts.append(f"Layers without an integer product: {_listed(lost)}.")
    parts.append(
        "Such layers are slower than in float: leave them out with --set 'quantize.skip=[...]', or build with the version "
        "of onnxruntime in constraints.txt."
    )
    return " ".join(parts)


def _listed(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
